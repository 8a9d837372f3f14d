"""`lq quantize` as people and scripts meet it, with the real small model once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import resource, sys
from lq.main import main
if __name__ == "__main__":
    largest, hard = int(sys.argv.pop(1)), resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    if largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    main()
"""


@pytest.fixture
def lq(tmp_path):
    """A function: arguments -> finished process; `largest` is the size in bytes no file may grow beyond."""
    script = tmp_path / "script.py"
    script.write_text(CODE, "utf-8")

    def run(*arguments: object, largest: int = 0) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "LQ_HOME": str(tmp_path / "home"),
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "100",
        }
        command = [sys.executable, str(script), str(largest), "quantize", *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=500, check=False
        )

    return run


def one_line(run: subprocess.CompletedProcess[str]) -> str:
    """The error of a run that ended as expected errors do."""
    assert run.returncode == 1, run.stderr
    lines = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, run.stderr
    assert "Traceback" not in run.stderr
    return lines[0]


@pytest.mark.slow
def test_the_small_model_is_quantized_measured_and_stays_close(lq, smollm2_checkpoint, tmp_path):
    out = tmp_path / "out"
    run = lq(
        smollm2_checkpoint, "--out", out, "--types", "Q8_0,Q4_0", "--calibration-tokens", 300,
        "--eval-tokens", 150, "--threads", 1, "--store", "--json",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report == json.loads((out / "report.json").read_text("utf-8"))
    q8, q4 = report["files"]
    assert q8["chats"]["kl"]["mean"] < 0.01
    assert q8["chats"]["kl"]["mean"] < q4["chats"]["kl"]["mean"] < 0.5
    assert q8["chats"]["same_top"]["mean"] > 0.9
    assert report["calibration"]["origin"].startswith(
        "written by the model itself (run as Q8_0), every other"
    )
    assert report["source"]["types"]["shares"][0]["type"] == "BF16"
    lines = map(json.loads, (out / "work" / "evaluation.jsonl").read_text("utf-8").splitlines())
    first = next(line for line in lines if "tokens" in line)  # others say why a conversation was dropped
    assert first["tokens"][0] == 1  # <|im_start|> itself, not its letters
    stored = sorted(path.name for path in (tmp_path / "home" / "models").iterdir())
    assert stored == ["smollm2-q4_0", "smollm2-q8_0"]
    reader = gguf.GGUFReader(out / "smollm2-Q4_0.gguf")
    assert np.isfinite(gguf.dequantize(reader.tensors[0].data, reader.tensors[0].tensor_type)).all()


def test_help_names_every_option_with_unit_and_default(lq):
    text = lq("--help").stdout
    for option in (
        "--out", "--types", "--lora", "--calibration", "--seed", "--calibration-tokens", "--eval-tokens",
        "--eval-text", "--name", "--pre", "--threads", "--keep-source", "--allow-requantize", "--store",
        "--prune-layers", "--kv-cache",
    ):  # fmt: skip
        assert option in text, option
    assert "24576" in text
    assert "tokens" in text


def test_the_default_types_are_those_of_the_floor():
    from lq.commands.quantize import DEFAULT_TYPES
    from quantize.gguf_files import types

    assert tuple(DEFAULT_TYPES.split(",")) == types.DEFAULT_TYPES


def test_a_wrong_type_is_one_line_with_the_close_name(lq, tiny_llama, tmp_path):
    error = one_line(lq(tiny_llama.path, "--out", tmp_path / "out", "--types", "Q4_KM"))
    assert "'Q4_KM'" in error
    assert "Q4_K_M" in error
    assert not (tmp_path / "out").exists()


def test_a_needy_type_without_calibration_is_one_line(lq, tiny_llama, tmp_path):
    run = lq(tiny_llama.path, "--out", tmp_path / "out", "--types", "IQ2_XXS", "--calibration", "none")
    assert "IQ2_XXS needs an importance matrix" in one_line(run)


def test_an_unknown_source_is_one_line(lq, tmp_path):
    assert "no-such-model" in one_line(lq("no-such-model", "--out", tmp_path / "out"))


def test_an_out_folder_that_cannot_be_made_is_one_line(lq, tiny_llama, tmp_path):
    (tmp_path / "file").write_text("in the way", "utf-8")
    assert "file" in one_line(lq(tiny_llama.path, "--out", tmp_path / "file" / "out"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_out_folder_without_permission_is_one_line(lq, tiny_llama, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "Permission denied" in one_line(lq(tiny_llama.path, "--out", tmp_path / "closed" / "out"))


def test_a_disk_that_fills_up_is_one_line_and_the_rerun_completes(lq, tiny_llama, tmp_path):
    """Files may grow to what the converted source needs, not to what the report's predictions need."""
    out = tmp_path / "out"
    options = (
        tiny_llama.path, "--out", out, "--name", "tiny", "--types", "Q8_0", "--eval-tokens", 200,
        "--calibration-tokens", 300, "--threads", 1,
    )  # fmt: skip
    error = one_line(lq(*options, largest=20_000_000))
    assert "could not write" in error or "predictions need" in error
    assert "--out" in error
    assert not list(out.rglob("*.partial"))
    made = (out / "tiny-Q8_0.gguf").stat().st_mtime_ns
    run = lq(*options)
    assert run.returncode == 0, run.stderr
    assert (out / "tiny-Q8_0.gguf").stat().st_mtime_ns == made
    title, header = run.stdout.splitlines()[:2]
    assert title == "# on held-out self-written chats"
    assert header.startswith("type\tMB\tbits/weight")
    assert f"serve one: lq serve {out / 'tiny-Q8_0.gguf'}" in run.stdout
    assert "\x1b" not in run.stdout + run.stderr


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_an_adapter_is_merged_and_changes_the_files(lq, tiny_llama, tmp_path):
    import copy

    import peft
    import torch

    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, target_modules=["q_proj"])
    peft.get_peft_model(copy.deepcopy(tiny_llama.model), config).save_pretrained(tmp_path / "adapter")
    out = tmp_path / "out"
    common = ("--out", out, "--name", "tiny", "--types", "F16", "--calibration", "none", "--eval-tokens", 64)
    assert lq(tiny_llama.path, *common).returncode == 0
    shutil.copy(out / "tiny-F16.gguf", tmp_path / "plain.gguf")
    run = lq(tiny_llama.path, *common, "--lora", tmp_path / "adapter", "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["source"]["adapter"] == "adapter"
    plain, merged = (
        {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
        for path in (tmp_path / "plain.gguf", out / "tiny-F16.gguf")
    )
    changed = {name for name in plain if not np.array_equal(plain[name], merged[name])}
    assert changed == {f"blk.{i}.attn_q.weight" for i in range(3)}
