"""Budgets: how they are written, what they leave for the tensors to the byte, and what this machine holds."""

import inspect
from dataclasses import replace
from pathlib import Path

import gguf
import pytest

from models.footprint import footprint, pieces_of
from models.gguf import read_header
from models.placement import Bytes, n_layers
from quantize.convert import convert
from quantize.gguf_files.mixed_file import ImportanceNote, MixedSource, Parts, Rows, write_mixed
from quantize.gguf_files.typemap import read_types
from quantize.mixes import budget as budgets
from quantize.mixes.allocate import Choice, Tensor, allocate
from quantize.mixes.budget import Budget, InvalidBudget, fit, parse_bits_per_weight, parse_sizes, room
from server import machine, model_settings, placing, shape

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16")
NOTE = ImportanceNote("imatrix.gguf", 211, dataset="calibration.jsonl", n_chunks=40)


@pytest.fixture(scope="module")
def source(tiny_llama, tmp_path_factory) -> MixedSource:
    out = tmp_path_factory.mktemp("source") / "tiny.gguf"
    convert(tiny_llama.path, out, dtype="BF16")
    return MixedSource.open(out)


def mix(source: MixedSource, budget: Budget) -> dict[str, str]:
    """The best mix, where a byte more is better in every tensor alike."""
    choices = source.choices(TYPES)
    tensors = [
        Tensor(name, tuple(Choice(kind, size, 1e6 / size) for kind, size in sizes.items()))
        for name, sizes in choices.items()
    ]
    return allocate(tensors, room(budget, source, choices, NOTE).tensor_bytes).best.types


def write(source: MixedSource, types: dict[str, str], folder: Path) -> Path:
    def encode(rows: Rows):
        return gguf.quants.quantize(rows.weights, gguf.GGMLQuantizationType[rows.type])

    out = folder / "out.gguf"
    write_mixed(
        source, out, types, encode, parts=Parts(folder / "parts"), made_from=lambda *_: "plain", note=NOTE
    )
    return out


def test_sizes_are_read_with_their_units_each_once():
    found = parse_sizes("95MB, 105 mb,1.2GiB,98000000,.5MiB,95000000,1.1kb,90.3MB")
    assert [each.file_bytes for each in found] == [
        95_000_000, 105_000_000, int(1.2 * 2**30), 98_000_000, 2**19, 1100, 90_300_000,
    ]  # fmt: skip
    assert [each.label for each in found[:4]] == ["95MB", "105mb", "1.2GiB", "98000000"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--size: '' has an empty place; give a list such as 95MB,105MB"),
        ("95MB,", "has an empty place"),
        ("95XB", "'95XB' is no size; give one such as 95MB, 90.5MiB or 1.2GB"),
        ("MB", "'MB' is no size"),
        ("-5MB", "'-5MB' is no size"),
        ("1e3MB", "'1e3MB' is no size"),
        ("95M", "'95M' is no size"),
        ("95", "'95' is 95 bytes, less than any model; add the unit, as in 95MB"),
        ("0GB", "'0GB' is 0 bytes"),
    ],
)
def test_texts_that_are_no_sizes_are_refused_with_an_example(text, message):
    with pytest.raises(InvalidBudget, match=message):
        parse_sizes(text)


def test_bits_per_weight_are_read_each_once():
    found = parse_bits_per_weight("4.5, 3.8,4.50,5")
    assert [(each.label, each.bits_per_weight) for each in found] == [
        ("4.5bpw", 4.5), ("3.8bpw", 3.8), ("5bpw", 5.0),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "4.5,", "four", "nan", "0", "-4", "45", "inf", "4,5bpw"])
def test_texts_that_are_no_bits_are_refused(text):
    with pytest.raises(InvalidBudget, match="--bits-per-weight: "):
        parse_bits_per_weight(text)


def test_the_file_is_never_over_its_budget_and_hardly_under_it(source, tmp_path):
    smallest = source.layout(dict.fromkeys(source.choices(TYPES), "Q4_0"), NOTE).size_bytes
    out = write(source, mix(source, Budget("x", file_bytes=smallest)), tmp_path)
    assert out.stat().st_size == smallest
    for more in (1_000, 10_001, 25_000):  # less than the smallest step of the embedding takes
        out = write(source, mix(source, Budget("x", file_bytes=smallest + more)), tmp_path)
        assert smallest + more - 600 < out.stat().st_size <= smallest + more


def test_what_is_left_for_tensors_is_exact(source, tmp_path):
    choices = source.choices(TYPES)
    types = {name: list(sizes)[i % len(sizes)] for i, (name, sizes) in enumerate(choices.items())}
    out = write(source, types, tmp_path)
    taken = sum(choices[name][kind] for name, kind in types.items())
    left = room(Budget("x", file_bytes=out.stat().st_size), source, choices, NOTE)
    assert left.tensor_bytes == taken
    assert left.header_bytes == read_header(out).data_offset
    assert left.header_bytes + left.kept_bytes + taken == out.stat().st_size


def test_bits_per_weight_are_those_of_the_type_map(source, tmp_path):
    choices = source.choices(TYPES)
    for bits in (4.7, 6.0, 8.1):
        types = mix(source, Budget("x", bits_per_weight=bits))
        found = read_types(write(source, types, tmp_path)).bits_per_weight
        assert found <= bits
    exact = room(Budget("x", bits_per_weight=8.0), source, choices, NOTE)
    vectors = sum(t.size_bytes for t in source.tensors if t.name not in choices)
    assert exact.tensor_bytes == source.n_parameters - vectors


def test_a_budget_below_the_smallest_file_names_it_in_all_units(source):
    choices = source.choices(TYPES)
    smallest = source.layout(dict.fromkeys(choices, "Q4_0"), NOTE)
    said = rf"smallest file has {smallest.size_bytes} bytes \(.*MB, .* bits per weight"
    with pytest.raises(InvalidBudget, match=rf"3bpw is too small: .* {said}"):
        room(Budget("3bpw", bits_per_weight=3.0), source, choices, NOTE)
    with pytest.raises(InvalidBudget, match=rf"2MB is too small: .* {said}") as info:
        room(Budget("2MB", file_bytes=2_000_000), source, choices, NOTE)
    size, bits = str(info.value).partition("(")[2].partition(" bits")[0].split(", ")
    for named in (*parse_sizes(size), *parse_bits_per_weight(bits)):
        least = sum(min(sizes.values()) for sizes in choices.values())
        assert room(named, source, choices, NOTE).tensor_bytes >= least


def test_what_fits_counts_with_the_servers_own_numbers():
    assert budgets.MEMORY_SHARE == machine.SHARE
    assert budgets.CONTEXT_SHARE == shape.CONTEXT_SHARE
    assert budgets.CONTEXT == shape.CELLS_EACH
    assert budgets.UNKNOWN_CONTEXT == shape.UNKNOWN_N_CTX
    assert budgets.N_PARALLEL == shape.PARALLEL_CPU
    assert model_settings.Model().cache_ram_mb << 20 == budgets.CACHE_BYTES


def served(source: MixedSource, file_bytes: int, memory: Bytes) -> tuple[placing.Placing | None, int]:
    """How the server places a model whose weights are that large, and the context that it gets."""
    pieces = pieces_of(read_header(source.path))
    layers = n_layers(pieces[0]) if memory.device else 0

    def cost(n_cells, n_parallel, types, gpu_layers):
        found = footprint(
            pieces, n_cells=n_cells, n_parallel=n_parallel, type_k=types[0], type_v=types[1],
            gpu_layers=gpu_layers,
        )  # fmt: skip
        more = file_bytes - found.weights_bytes
        on_gpu = more if gpu_layers else 0
        return replace(
            found,
            weights_bytes=file_bytes,
            cache_bytes=budgets.CACHE_BYTES,
            device_bytes=found.device_bytes + on_gpu,
        )

    wish = placing.Wish(cost=cost, n_layers=layers, n_ctx_train=pieces[0].n_ctx_train)
    placed = wish.place(memory)
    share = 1.0 if memory.device else shape.CONTEXT_SHARE
    return placed, wish._fitting(("f16", "f16"), layers, memory, share)


def test_the_server_gives_a_file_that_fits_its_context_in_f16_and_a_larger_one_not(source):
    memory = Bytes(2 << 30)
    size = fit(source.path, memory=memory).file_bytes
    assert size is not None
    placed, cells = served(source, size, memory)
    trained = read_header(source.path).n_ctx_train or 0
    assert placed is not None
    assert placed.types == ("f16", "f16")
    assert cells >= trained > 0
    assert served(source, size + (1 << 20), memory)[1] < trained


def test_more_context_leaves_less_for_the_file(source):
    memory = Bytes(2 << 30)
    sizes = [fit(source.path, memory=memory, n_ctx=n_ctx).file_bytes or 0 for n_ctx in (256, 4096, 65_536)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[2] > 0
    assert fit(source.path, memory=memory).label == "fit"


def test_on_a_gpu_the_file_lies_there_wholly_with_its_context(source):
    memory = Bytes(8 << 30, 1 << 30)
    size = fit(source.path, memory=memory).file_bytes
    assert size is not None
    assert size < memory.device
    placed, cells = served(source, size, memory)
    assert placed is not None
    assert placed.gpu_layers == n_layers(read_header(source.path))
    assert cells >= (read_header(source.path).n_ctx_train or 2**31)
    small = fit(source.path, memory=Bytes(8 << 30, 100 << 20))
    assert small == fit(source.path, memory=Bytes(8 << 30))


def test_where_nothing_is_left_it_says_what_takes_the_memory(source):
    with pytest.raises(InvalidBudget, match=r"--fit: 256 tokens of context .* in 105 MB of memory; free"):
        fit(source.path, memory=Bytes(100 << 20))
    assert "memory" in inspect.signature(fit).parameters


def test_this_machines_memory_is_asked_for_where_none_is_given(source, monkeypatch):
    monkeypatch.setattr(budgets, "available_memory", lambda: 4 << 30)
    assert fit(source.path) == fit(source.path, memory=Bytes(int(0.8 * (4 << 30))))
