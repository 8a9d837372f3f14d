"""An adapter beside a quantized file: its weights are learnt beside, or its source is approached again."""

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from engine.llama import Adapter as NativeAdapter
from engine.llama import Context, Model, evaluate
from models.store import Store
from quantize.convert import convert
from quantize.divergence import log_softmax, score
from quantize.errors import QuantizeError
from quantize.gguf_files.mixed_file import MixedSource, Rows, write_mixed
from quantize.gguf_files.parts import Parts
from quantize.network.hessian import Hessians
from quantize.source import find
from quantize.transforms.folded import Fold, Folded
from quantize.transforms.maps import Scale
from quantize.tuning import run as tuning
from quantize.tuning.encoding import CannotEncode
from quantize.tuning.folder import FolderTaken
from quantize.tuning.network import LoraShape
from quantize.tuning.quantized_base import OtherBase, check, fill
from quantize.tuning.settings import Settings
from quantize.tuning.training import Schedule

#: Config class -> what of it changes rows or values on the way into a GGUF.
FAMILIES = {
    "LlamaConfig": {},  # interleaved rows of q and k
    "Gemma3TextConfig": {"head_dim": 16, "query_pre_attn_scalar": 16},  # shifted norms, tied head
    "Qwen2Config": {},  # biases
}


def rounded(source: Path, out: Path, kind: str) -> Path:
    """Every matrix in one type, round to nearest."""
    opened = MixedSource.open(source)

    def encode(rows: Rows) -> np.ndarray:
        return gguf.quants.quantize(rows.weights, gguf.GGMLQuantizationType[rows.type])

    types = {tensor.name: kind for tensor in opened.quantizable}
    write_mixed(opened, out, types, encode, parts=Parts(out.parent / "parts"), made_from=lambda *_: "nearest")
    return out


@pytest.fixture(scope="module")
def full(tiny_llama, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("full") / "full.gguf"
    convert(tiny_llama.path, out, dtype="F32")
    return out


@pytest.fixture(scope="module")
def base(full) -> Path:
    """The tiny Llama in Q4_0."""
    return rounded(full, full.parent / "q4.gguf", "Q4_0")


@pytest.fixture(scope="module")
def own_text(tmp_path_factory) -> Path:
    """A journal of conversations as `lq quantize` leaves it."""
    path = tmp_path_factory.mktemp("own") / "calibration.jsonl"
    draw = np.random.default_rng(0)
    lines = [{"key": "k"}]
    for number in range(24):
        tokens = draw.integers(300, 320, 16).tolist()
        spans = [{"role": "template", "n_tokens": 4}, {"role": "assistant", "n_tokens": 12}]
        lines.append(
            {"number": number, "seed": 0, "temperature": 1.0, "tokens": tokens, "spans": spans}
            | {"user": "", "assistant": ""}
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


@pytest.fixture(scope="module")
def asked(tiny_llama, base, own_text, tmp_path_factory) -> Settings:
    """A distillation of a second; its `out` is to be replaced."""
    return Settings(
        source=find(str(tiny_llama.path), store=Store(tmp_path_factory.mktemp("home"))),
        data=own_text,
        out=Path("unset"),
        name="recovered",
        shape=LoraShape(rank=8, alpha=16),
        schedule=Schedule(epochs=8, batch_size=6, learning_rate=5e-3, evaluations=3),
        four_bit=False,
        max_length=64,
        share=0.25,
        final_rank=None,
        energy=None,
        base=base,
        distill=True,
        device="cpu",
        compute="f32",
        checkpointing=False,
        command="lq tune tiny --objective distill",
    )


def tune(settings: Settings):
    return tuning.run(settings, progress=lambda *_: None, tell=lambda _: None)


@pytest.mark.parametrize("config", FAMILIES)
def test_a_full_precision_gguf_gives_the_checkpoints_own_weights_back(config, make_tiny, tmp_path):
    import transformers

    tiny = make_tiny(config, "llama2", **FAMILIES[config])
    convert(tiny.path, tmp_path / "full.gguf", dtype="F32")
    check(tiny.path, tmp_path / "full.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    fill(model, tiny.path, tmp_path / "full.gguf")
    for name, parameter in tiny.model.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name], parameter, atol=1e-6, rtol=0)


def test_the_language_part_of_an_image_and_text_model_is_filled(make_tiny, tmp_path):
    """Its parameters have other names than the file's recipes go by."""
    tiny = make_tiny("Gemma3TextConfig", "llama2", **FAMILIES["Gemma3TextConfig"])
    convert(tiny.path, tmp_path / "full.gguf", dtype="F32")

    class Wrapped:
        def named_parameters(self):
            for name, parameter in tiny.model.named_parameters():
                yield name.replace("model.", "model.language_model.", 1), parameter
            yield "model.vision_tower.weight", torch.nn.Parameter(torch.zeros(1))

    expected = {name: parameter.clone() for name, parameter in tiny.model.named_parameters()}
    with torch.no_grad():
        for parameter in tiny.model.parameters():
            parameter.zero_()
    fill(Wrapped(), tiny.path, tmp_path / "full.gguf")
    for name, parameter in tiny.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=0)


def test_a_base_that_was_changed_before_rounding_is_refused(full, tiny_llama, tmp_path):
    source, out = Folded.open(full, Hessians(tmp_path, "none")), tmp_path / "changed.gguf"
    n = source.shape("blk.0.attn_v.weight")[0]
    source.then(Fold("biases", added={"blk.0.attn_v.bias": n}, corrects=True)).write(out)
    with pytest.raises(OtherBase, match=r"has blk\.0\.attn_v\.bias, which the checkpoint lacks"):
        check(tiny_llama.path, out)
    source.then(Fold("doubled", rows={"blk.0.attn_v.weight": Scale(np.full(n, 2.0))})).write(out)
    with pytest.raises(OtherBase, match=r"changed before rounding \(doubled\)"):
        check(tiny_llama.path, out)


def logits(path: Path, texts: list[list[int]], adapter: Path | None = None) -> list[np.ndarray]:
    with (
        Model.open(path, n_gpu_layers=0) as model,
        Context.open(model, n_ctx=64, n_batch=64, n_threads=2, type_k="f32", type_v="f32") as context,
    ):
        if adapter:
            context.apply([(NativeAdapter(model, adapter), 1.0)])
        return [np.array(evaluate(context, tokens)) for tokens in texts]


def mean_kl(reference: list[np.ndarray], candidate: list[np.ndarray]) -> float:
    left, right = np.concatenate(reference), np.concatenate(candidate)
    return float(score(log_softmax(left), right, np.zeros(len(left), np.int64)).kl.mean())


def test_distilling_brings_a_quantized_file_nearer_to_its_source_in_llama_cpp_too(asked, full, tmp_path):
    report = tune(replace(asked, out=tmp_path / "out"))
    found = report.comparison
    assert found.after.mean < 0.85 * found.before.mean
    assert found.divergence.kl.mean == pytest.approx(found.after.mean, abs=1e-9)
    assert "source sha256" in report.hashes
    assert "base sha256" in report.hashes
    assert "mean KLD to the source before" in (tmp_path / "out" / "report.md").read_text("utf-8")
    seen = [json.loads(line)["tokens"] for line in asked.data.read_text("utf-8").splitlines()[1:]]
    adapter = tmp_path / "out" / "adapter.gguf"
    wanted = logits(full, seen)
    plain, better = (mean_kl(wanted, logits(asked.base, seen, beside)) for beside in (None, adapter))
    assert better < 0.85 * plain


def test_chats_are_learnt_beside_the_rounded_weights(asked, base, tmp_path):
    report = tune(replace(asked, out=tmp_path / "out", distill=False))
    assert report.base == base.name
    assert report.comparison.after.mean < report.comparison.before.mean
    with pytest.raises(FolderTaken, match=r"base sha256|--objective"):
        tune(replace(asked, out=tmp_path / "out", distill=False, base=None))


def test_a_gguf_of_another_model_is_refused(make_tiny, tiny_llama, tmp_path):
    wider = make_tiny("LlamaConfig", "llama2", intermediate_size=128)
    convert(wider.path, tmp_path / "wider.gguf", dtype="F32")
    with pytest.raises(OtherBase, match=r"blk\.0\.ffn_gate\.weight as \[96, 64\], it has it as \[128, 64\]"):
        check(tiny_llama.path, tmp_path / "wider.gguf")
    other = make_tiny("Qwen2Config", "llama2")
    convert(other.path, tmp_path / "qwen.gguf", dtype="F32")
    with pytest.raises(OtherBase, match="architecture is 'qwen2', the checkpoint's is 'llama'"):
        check(tiny_llama.path, tmp_path / "qwen.gguf")


def test_own_text_of_another_vocabulary_is_refused(asked, own_text, tmp_path):
    lines = own_text.read_text("utf-8").replace("[3", "[99999, 3", 1)
    (tmp_path / "other.jsonl").write_text(lines, "utf-8")
    with pytest.raises(CannotEncode, match=r"tokens beyond the model's 32000; give what this model wrote"):
        tune(replace(asked, out=tmp_path / "out", data=tmp_path / "other.jsonl"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"base": None}, r"--objective distill .* give it as --base FILE\.gguf"),
        ({"four_bit": True}, r"--base and --qlora both"),
    ],
)
def test_options_that_contradict_each_other_are_refused(asked, changed, message, tmp_path):
    with pytest.raises(QuantizeError, match=message):
        tune(replace(asked, out=tmp_path / "out", **changed))
