"""All that a report says of a model's structure: one record, its sections of the card, its plots.

The parts are in files of their own; here they are put together.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from matplotlib.figure import Figure

from quantize.kv_cache import report as kv_report
from quantize.kv_cache.plot import cache_figure
from quantize.kv_cache.report import CacheReport
from quantize.structure import lattice_report, prune_report, tensor_report
from quantize.structure.lattice_report import LatticeReport
from quantize.structure.plots import tensor_figure
from quantize.structure.prune_report import PruneReport
from quantize.structure.tensor_report import TensorReport


@dataclass(frozen=True, slots=True)
class StructureReport:
    """What was not asked for, or not found, is None."""

    layers: PruneReport | None = None
    lattices: LatticeReport | None = None
    tensors: TensorReport | None = None
    cache: CacheReport | None = None


def sections(report: StructureReport) -> Iterable[str]:
    """Paragraphs of markdown, headings included."""
    yield from prune_report.sections(report.layers)
    yield from lattice_report.sections(report.lattices)
    yield from tensor_report.sections(report.tensors)
    yield from kv_report.sections(report.cache)


def figures(report: StructureReport) -> dict[str, Figure | None]:
    """Plots by the names that the sections refer to."""
    return {
        "tensors": tensor_figure(report.tensors) if report.tensors else None,
        "kv-cache": cache_figure(report.cache) if report.cache else None,
    }
