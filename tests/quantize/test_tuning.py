"""Tuning as a whole on a tiny checkpoint: it learns, it goes on after a kill, and its adapter is served."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from engine.llama import Adapter as NativeAdapter
from engine.llama import Context, Model, evaluate
from models.lora import Adapter
from models.store import Store
from quantize.convert import convert
from quantize.source import find
from quantize.tuning import run as tuning
from quantize.tuning import training
from quantize.tuning.encoding import Example
from quantize.tuning.folder import FolderTaken
from quantize.tuning.network import BadModule, LoraShape, Tunable
from quantize.tuning.settings import BadOption, Settings
from quantize.tuning.training import Diverged, Schedule

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
)
WORDS = ["stone", "river", "cloud", "lamp", "bread", "north", "glass", "sail"]


@pytest.fixture(scope="module")
def model(tiny_llama, tmp_path_factory) -> Path:
    """The tiny Llama with a chat template."""
    path = Path(shutil.copytree(tiny_llama.path, tmp_path_factory.mktemp("tune") / "tiny"))
    (path / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    return path


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    """Each word is answered with itself, three times."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    turns = [
        [{"role": "user", "content": word}, {"role": "assistant", "content": f"{word} {word} {word}"}]
        for word in WORDS
    ]
    path.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns), "utf-8")
    return path


@pytest.fixture(scope="module")
def asked(model, chats, tmp_path_factory) -> Settings:
    """A run of a second; its `out` is to be replaced."""
    return Settings(
        source=find(str(model), store=Store(tmp_path_factory.mktemp("home"))),
        data=chats,
        out=Path("unset"),
        name="words",
        shape=LoraShape(rank=4, alpha=8),
        schedule=Schedule(epochs=8, batch_size=4, learning_rate=1e-2, evaluations=4),
        four_bit=False,
        max_length=64,
        share=0.25,
        final_rank=None,
        energy=None,
        base=None,
        distill=False,
        device="cpu",
        compute="f32",
        checkpointing=False,
        command="lq tune tiny --data chats.jsonl --out out",
    )


def tune(settings: Settings, told: list[str] | None = None):
    lines = [] if told is None else told
    return tuning.run(settings, progress=lambda *_: None, tell=lines.append)


@pytest.fixture(scope="module")
def tuned(asked, tmp_path_factory):
    """A finished run: (settings, report, the lines that it told)."""
    settings = replace(asked, out=tmp_path_factory.mktemp("tuned") / "out")
    lines: list[str] = []
    return settings, tune(settings, lines), lines


def test_a_set_that_can_be_learnt_is_learnt(tuned):
    _, report, lines = tuned
    losses = [loss for _, loss in report.training.training]
    assert len(losses) == report.n_steps == 16
    assert losses[-1] < 0.5 * losses[0]
    assert [line.split(":")[0] for line in lines] == [f"step {step} of 16" for step in (4, 8, 12, 16)]
    best = min(report.training.held_out, key=lambda pair: pair[1])
    assert (report.training.best_step, report.training.best_loss) == best


def test_what_is_reported_of_held_out_chats_is_what_the_models_give(tuned):
    settings, report, _ = tuned
    found = report.comparison
    assert found.after.mean == pytest.approx(report.training.best_loss, abs=1e-5)
    assert found.change.mean == pytest.approx(found.after.mean - found.before.mean, abs=1e-9)
    assert found.divergence.n_tokens == report.held_out["n_learnt"]
    assert found.divergence.kl.mean > 0.01
    assert 0.01 < report.moved < 1
    assert report.learnt["n_chats"] + report.held_out["n_chats"] == len(WORDS)
    page = (settings.out / "report.md").read_text("utf-8")
    assert settings.command in page
    assert set(report.hashes) == {"source sha256", "data sha256"}
    assert all(digest in page for digest in report.hashes.values())
    assert json.loads((settings.out / "report.json").read_text("utf-8"))["name"] == "words"
    assert (settings.out / "loss.png").read_bytes().startswith(b"\x89PNG")


def logits(path: Path, tokens: list[int], adapter: Path | None = None) -> np.ndarray:
    with (
        Model.open(path, n_gpu_layers=0) as model,
        Context.open(model, n_ctx=64, n_batch=64, n_threads=2, type_k="f32", type_v="f32") as context,
    ):
        if adapter:
            context.apply([(NativeAdapter(model, adapter), 1.0)])
        return np.array(evaluate(context, tokens))


def test_the_gguf_adapter_in_llama_cpp_gives_the_logits_of_pefts_merged_model(
    tuned, tiny_llama, max_kl, torch_logits, tmp_path
):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings, _, _ = tuned
    model = settings.source.path
    tokens = np.random.default_rng(0).integers(300, 20_000, 32).tolist()
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    wanted = torch_logits(
        PeftModel.from_pretrained(plain, settings.out / "adapter").merge_and_unload(), tokens
    )
    convert(model, tmp_path / "base.gguf", dtype="F32")
    found = logits(tmp_path / "base.gguf", tokens, settings.out / "adapter.gguf")
    assert max_kl(wanted, found) < 2e-3  # flash attention rounds to 16 bits
    assert max_kl(tiny_llama.logits(tokens), found) > 0.05, "the adapter changes nothing"
    convert(model, tmp_path / "merged.gguf", dtype="F32", adapter=Adapter.open(settings.out / "adapter"))
    assert max_kl(wanted, logits(tmp_path / "merged.gguf", tokens)) < 2e-3


def test_the_same_command_again_finds_everything_done(tuned):
    settings, report, _ = tuned
    lines: list[str] = []
    again = tune(settings, lines)
    assert lines == []
    assert again.files == report.files
    assert again.training == report.training


class Killed(BaseException):
    """Stands for a kill: nothing may handle it."""


def test_a_run_that_was_killed_ends_with_the_same_weights(tuned, asked, tmp_path, monkeypatch):
    _, report, _ = tuned
    settings = replace(asked, out=tmp_path / "out")
    step, done = training.Training._step, []

    def dying(self):
        done.append(1)
        if len(done) in (6, 13):  # after evaluations at 4 and 8 and 12, so that two steps are lost
            raise Killed
        return step(self)

    monkeypatch.setattr(training.Training, "_step", dying)
    for _ in range(2):
        with pytest.raises(Killed):
            tune(settings)
    assert tune(settings).files == report.files
    assert len(done) > 16 + 2


def test_a_cut_rank_is_what_is_measured_and_written(tuned, tmp_path):
    settings, report, _ = tuned
    folder = Path(shutil.copytree(settings.out, tmp_path / "out"))  # trained already: only the rest is done
    cut = tune(replace(settings, out=folder, final_rank=1))
    assert cut.truncation.loss_before == pytest.approx(report.comparison.after.mean, abs=1e-5)
    assert cut.comparison.after.mean == pytest.approx(cut.truncation.loss_after, abs=1e-5)
    assert 0 < cut.truncation.lost < 1
    assert cut.n_parameters == report.n_parameters // 4
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert {min(tensor.shape) for tensor in tensors.values()} == {1}
    Adapter.open(folder / "adapter")
    full = tune(replace(settings, out=folder, energy=1.0))
    assert full.truncation.lost < 1e-12
    assert full.comparison.after.mean == pytest.approx(report.comparison.after.mean, abs=1e-4)


def test_energy_gives_layers_ranks_of_their_own_that_all_readers_understand(tuned, model, tmp_path, max_kl):
    settings, _, _ = tuned
    folder = Path(shutil.copytree(settings.out, tmp_path / "out"))
    report = tune(replace(settings, out=folder, energy=0.8))
    ranks = set(report.truncation.ranks.values())
    assert len(ranks) > 1
    convert(model, tmp_path / "base.gguf", dtype="F32")
    convert(model, tmp_path / "merged.gguf", dtype="F32", adapter=Adapter.open(folder / "adapter"))
    tokens = list(range(300, 332))
    left = logits(tmp_path / "base.gguf", tokens, folder / "adapter.gguf")
    assert max_kl(logits(tmp_path / "merged.gguf", tokens), left) < 2e-3


def test_qlora_learns_beside_a_model_in_four_bits(asked, tmp_path):
    report = tune(replace(asked, out=tmp_path / "out", four_bit=True, checkpointing=True))
    losses = [loss for _, loss in report.training.training]
    assert losses[-1] < 0.5 * losses[0]
    assert (tmp_path / "out" / "adapter.gguf").is_file()


def load(settings: Settings, **values) -> Tunable:
    options = {"four_bit": False, "seed": 0, "device": "cpu", "compute": "f32", "checkpointing": False}
    return Tunable.of(settings.source.path, settings.shape, **options | values)


def test_only_the_factors_learn_and_four_bits_hold_every_linear_layer(asked):
    from quantize.tuning.four_bit import FourBitLinear

    tunable = load(replace(asked, shape=LoraShape(4, 8, modules=("q_proj", "v_proj"))), four_bit=True)
    assert {name.split(".")[-3] for name in tunable.parameters} == {"lora_A", "lora_B"}
    assert {module.rpartition(".")[2] for module in tunable.factors()} == {"q_proj", "v_proj"}
    kinds = [type(module) for module in tunable.model.modules()]
    assert kinds.count(FourBitLinear) == 7 * 3


def test_the_loss_counts_the_wanted_tokens_and_no_padding(asked, tiny_llama):
    tunable = load(asked)
    draw = np.random.default_rng(0)
    batch = []
    for length in (5, 9):
        tokens = draw.integers(300, 9000, length).astype(np.int32)
        batch.append(Example(0, tokens, np.arange(length) >= 3))
    total = 0.0
    for example in batch:
        rows = torch.log_softmax(torch.from_numpy(tiny_llama.logits(example.tokens.tolist())), -1)
        total -= sum(float(rows[i - 1, example.tokens[i]]) for i in range(3, len(example.tokens)))
    assert float(tunable.token_losses(batch).sum().detach()) == pytest.approx(total, rel=1e-4)


def test_how_a_step_is_cut_into_batches_changes_nothing(asked, tmp_path):
    short = replace(asked.schedule, max_steps=2)
    whole, cut = (
        tune(
            replace(asked, out=tmp_path / str(limit), share=0.0, schedule=replace(short, micro_tokens=limit))
        ).training.training
        for limit in (4096, 20)
    )
    assert [loss for _, loss in whole] == pytest.approx([loss for _, loss in cut], rel=1e-4)


def test_bf16_learns_too(asked, tmp_path):
    schedule = replace(asked.schedule, max_steps=8)
    report = tune(replace(asked, out=tmp_path / "out", compute="bf16", share=0.0, schedule=schedule))
    losses = [loss for _, loss in report.training.training]
    assert losses[-1] < losses[0]
    assert report.comparison is None
    assert "--held-out 0" in (tmp_path / "out" / "report.md").read_text("utf-8")


def test_a_loss_that_is_no_number_ends_the_run(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(Tunable, "_row_losses", lambda _self, hidden, *_: hidden.sum(-1) * np.nan)
    with pytest.raises(Diverged, match=r"loss of step 1 is not finite; lower --learning-rate"):
        tune(replace(asked, out=tmp_path / "out"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"schedule": Schedule(epochs=8, batch_size=4, seed=1)}, r"--learning-rate was 0\.01 there"),
        ({"share": 0.5}, r"--held-out was 0\.25 there and is 0\.5 now; choose another --out"),
    ],
)
def test_the_folder_of_another_run_is_left_alone(tuned, changed, message):
    settings, _, _ = tuned
    with pytest.raises(FolderTaken, match=message):
        tune(replace(settings, **changed))


def test_a_folder_with_other_files_is_left_alone(asked, tmp_path):
    (tmp_path / "thesis.md").write_text("mine", "utf-8")
    with pytest.raises(FolderTaken, match=r"holds other files \(thesis\.md\); choose another"):
        tune(replace(asked, out=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.md"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"device": "tpu"}, r"--device is tpu; give cpu, or cuda"),
        ({"device": "cuda:99"}, r"--device is cuda:99"),
        ({"device": "cuda:x"}, r"--device is cuda:x"),
        ({"shape": LoraShape(0, 8)}, r"--rank is 0; give 1 or more"),
        ({"shape": LoraShape(4, -1)}, r"--alpha is -1"),
        ({"shape": LoraShape(4, 8, dropout=1.0)}, r"--dropout is 1\.0"),
        ({"schedule": Schedule(learning_rate=0)}, r"--learning-rate is 0; give above 0"),
        ({"schedule": Schedule(epochs=0)}, r"--epochs is 0"),
        ({"schedule": Schedule(seed=-1)}, r"--seed is -1"),
        ({"share": 1.0}, r"--held-out is 1\.0"),
        ({"max_length": 1000}, r"--max-length is 1000; give at most the model's 256 tokens"),
        ({"energy": 0.0}, r"--energy is 0\.0"),
    ],
)
def test_an_option_out_of_range_is_refused_before_anything_is_written(asked, changed, message, tmp_path):
    with pytest.raises(BadOption, match=message):
        tune(replace(asked, out=tmp_path / "out", **changed))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            LoraShape(100, 8),
            r"--rank is 100, but model\.layers\.0\.self_attn\.q_proj is 64 by 64; give at most 64",
        ),
        (LoraShape(40, 8), r"k_proj is 32 by 64; give at most 32, or leave this layer out"),
        (
            LoraShape(4, 8, modules=("c_attn",)),
            r"--modules 'c_attn' is no linear layer.*there are down_proj, ",
        ),
    ],
)
def test_an_adapter_that_no_layer_can_have_is_refused(asked, shape, message):
    with pytest.raises(BadModule, match=message):
        load(replace(asked, shape=shape))


KILLED = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start us deaf to it
from quantize.tuning import training
kept = training.Training._save
def slowly(self):
    kept(self)
    print("saved", flush=True)
    time.sleep(60)
training.Training._save = slowly
from lq.main import main
main()
"""


def test_ctrl_c_ends_the_command_at_once_and_leaves_a_state_to_go_on_from(model, chats, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, "tune", model, "--data", chats, "--out", out, "--rank", "2"]
    environment = os.environ | {"LQ_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*map(str, command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "saved\n", process.stderr.read()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert (out / "work" / "state.safetensors").is_file()
    assert not (out / "adapter").exists()
