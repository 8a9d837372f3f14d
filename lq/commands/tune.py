"""`lq tune`: chats in, a LoRA adapter out that `lq serve` and `lq quantize --lora` take.

Reads options, shows progress and the table. What happens is quantize.tuning's.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from models.store import Store
    from quantize.tuning.report import Report
    from quantize.tuning.settings import Settings


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("tune")(tune)


def tune(
    source: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Checkpoint: store name, hf:ORG/NAME (pulled first) or folder."),
    ],
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            metavar="FILE",
            help='Chats, one a line: {"messages": [{"role": "user", "content": …}, …]}. '
            'Only what the assistant says is learnt; "weight": 0 in a message leaves it out. Or what '
            "MODEL wrote itself: work/calibration.jsonl of an `lq quantize` run.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for adapter and report.")],
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="N", help="The adapter's name in the store; by default DIR's."),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            "--base",
            metavar="GGUF",
            help="Quantized file of MODEL that the adapter is to run beside: its weights are learnt beside, "
            "rounding included; MODEL's own by default.",
        ),
    ] = None,
    objective: Annotated[
        Literal["chats", "distill"],
        typer.Option(
            "--objective",
            help="What is learnt: the chats' answers, or to predict with --base what MODEL predicts.",
        ),
    ] = "chats",
    qlora: Annotated[
        bool, typer.Option("--qlora", help="Hold the model in 4 bits (NF4) meanwhile; off by default.")
    ] = False,
    rank: Annotated[int, typer.Option("--rank", metavar="R", help="Rank of the adapter.")] = 16,
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", metavar="A", help="The adapter counts A/R times; twice the rank by default."),
    ] = None,
    dropout: Annotated[
        float, typer.Option("--dropout", metavar="P", help="Share of the adapter's inputs dropped.")
    ] = 0.0,
    modules: Annotated[
        str | None,
        typer.Option(
            "--modules", metavar="A,B", help="Linear layers, such as q_proj,v_proj; by default all."
        ),
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", metavar="N", help="Times that all chats are read.")] = 3,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", metavar="N", help="Steps at most; no limit by default.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", help="Chats a step.")] = 8,
    micro_tokens: Annotated[
        int | None,
        typer.Option(
            "--micro-tokens",
            metavar="N",
            help="Tokens computed at once, padding included: less takes less memory, and the same steps; "
            "1024, on a GPU 4096.",
        ),
    ] = None,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", metavar="X", help="Of AdamW, at its highest.")
    ] = 2e-4,
    warmup: Annotated[
        float,
        typer.Option("--warmup", metavar="P", min=0, max=1, help="Share of the steps in which it rises."),
    ] = 0.05,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            metavar="N",
            help="Tokens of a chat, the rest is cut off; 1024, or fewer where the model reads fewer.",
        ),
    ] = None,
    held_out: Annotated[
        float, typer.Option("--held-out", metavar="P", help="Share of the chats kept back for measuring.")
    ] = 0.1,
    evaluations: Annotated[
        int, typer.Option("--evaluations", metavar="N", min=1, help="Times that the held-out loss is taken.")
    ] = 10,
    final_rank: Annotated[
        int | None,
        typer.Option(
            "--final-rank", metavar="R", help="Cut the adapter to this rank afterwards; not by default."
        ),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            "--energy",
            metavar="P",
            help="Cut each layer to the rank that keeps this share of its squares, such as 0.99; "
            "not by default.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of factors, order and split.")] = 0,
    dtype: Annotated[
        Literal["auto", "f32", "bf16"],
        typer.Option("--dtype", help="What is computed in; auto: bf16 on a GPU that has it, else f32."),
    ] = "auto",
    device: Annotated[
        str | None,
        typer.Option(
            "--device", metavar="D", help="cpu, cuda or cuda:N; by default the GPU, if there is one."
        ),
    ] = None,
    checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Compute layers twice instead of keeping what they gave; by default on a GPU.",
        ),
    ] = None,
    to_store: Annotated[
        bool, typer.Option("--store/--no-store", help="Put the adapter into the store, for `lq serve`.")
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print report.json on stdout; off by default.")
    ] = False,
) -> None:
    """Teach a model from chats: a LoRA adapter, measured on chats that were kept back.

    Needs the extra `tune` (peft). A run that is interrupted goes on where it stopped when the same command is
    given again. DIR gets adapter/ (PEFT, safetensors), adapter.gguf, report.md and the loss curve.
    """
    from models.store import Store
    from quantize.source import unseen
    from quantize.tuning.network import LoraShape, default_compute, default_device, require_peft
    from quantize.tuning.settings import Settings
    from quantize.tuning.training import Schedule

    require_peft()
    where = out.expanduser().absolute()
    device = device or default_device()
    if micro_tokens is None:
        micro_tokens = 4096 if device.startswith("cuda") else 1024
    settings = Settings(
        source=unseen(source),
        data=data.expanduser(),
        out=where,
        name=name or where.name,
        shape=LoraShape(
            rank,
            2.0 * rank if alpha is None else alpha,
            dropout,
            tuple(modules.split(",")) if modules else (),
        ),
        schedule=Schedule(
            epochs=epochs,
            max_steps=max_steps,
            batch_size=batch_size,
            micro_tokens=micro_tokens,
            learning_rate=learning_rate,
            warmup=warmup,
            evaluations=evaluations,
            seed=seed,
        ),
        four_bit=qlora,
        max_length=max_length,
        share=held_out,
        final_rank=final_rank,
        energy=energy,
        base=base.expanduser() if base else None,
        distill=objective == "distill",
        device=device,
        compute=default_compute(device) if dtype == "auto" else dtype,
        checkpointing=device.startswith("cuda") if checkpointing is None else checkpointing,
        command=shlex.join(["lq", *sys.argv[1:]]),
    )
    report = _run(settings, Store.default(), to_store=to_store)
    if as_json:
        from quantize.tuning.report import to_json

        print(to_json(report), end="")
    else:
        _show(report, settings, stored=to_store)


def _run(settings: Settings, store: Store, *, to_store: bool) -> Report:
    """Find the model, tune, store; what cannot work is refused before the work that it would waste."""
    from dataclasses import replace

    from lq.progress import task_progress
    from models.reference import new_name
    from models.source import disk_errors
    from quantize.source import find
    from quantize.tuning import run
    from quantize.tuning.folder import Folder

    settings.check()
    adapter = Folder(settings.out).adapter
    if to_store:
        store.check_free(adapter, name=new_name(None, settings.name))
    with task_progress() as progress:
        found = find(settings.source.given, store=store, progress=progress)
        settings = replace(settings, source=found)
        report = run.run(
            settings, progress=progress, tell=lambda line: print(line, file=sys.stderr, flush=True)
        )
        if to_store:
            with disk_errors(store.root):
                store.add(
                    adapter, name=settings.name, kind="adapter", licence=found.licence, replace=True,
                    progress=progress,
                )  # fmt: skip
    return report


def _show(report: Report, settings: Settings, *, stored: bool) -> None:
    """What was measured, and what to do next."""
    from quantize.tuning.report import table

    for label, value in table(report):
        print(f"{label}\t{value}" if not sys.stdout.isatty() else f"{label:40}{value}")
    for warning in report.warnings:
        print(f"note: {warning}")
    adapter = settings.name if stored else settings.out / "adapter"
    print(f"report: {settings.out / 'report.md'}")
    print(f"serve it: lq serve {settings.base or f'GGUF-OF-{report.source}'} --lora {adapter}")
    print(f"or merge it: lq quantize {settings.source.given} --lora {adapter} --out DIR")
