"""The file that a conversion writes: types, completeness, a full disk, memory."""

import errno
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from models.gguf import read_header
from models.tensor_types import TensorType
from quantize.convert import convert
from quantize.disk import DiskFull
from quantize.gguf_files import writer as gguf_file

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_matrices_get_the_asked_type_and_vectors_stay_float32(dtype, checkpoint, tmp_path):
    header = convert(checkpoint, tmp_path / "out.gguf", dtype=dtype)
    types = {len(tensor.shape): tensor.type for tensor in header.tensors}
    assert types == {2: TensorType[dtype], 1: TensorType.F32}
    assert {tensor.type for tensor in header.tensors if len(tensor.shape) == 2} == {TensorType[dtype]}
    assert header.metadata["general.file_type"] == {"F32": 0, "F16": 1, "BF16": 32}[dtype]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_checkpoints_own_type_is_kept(dtype, tiny_llama, tmp_path):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama.path, dtype=getattr(torch, dtype))
    folder = shutil.copytree(tiny_llama.path, tmp_path / "checkpoint")
    model.save_pretrained(folder)
    header = convert(folder, tmp_path / "out.gguf")
    expected = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    assert {tensor.type.name for tensor in header.tensors if len(tensor.shape) == 2} == {expected}


def test_bfloat16_rounds_like_gguf_py(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "exact.gguf", dtype="F32")
    convert(checkpoint, tmp_path / "rounded.gguf", dtype="BF16")
    exact = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "exact.gguf").tensors}
    for tensor in gguf.GGUFReader(tmp_path / "rounded.gguf").tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            wanted = gguf.quants.quantize(exact[tensor.name], tensor.tensor_type)
            np.testing.assert_array_equal(tensor.data, wanted)


def test_head_that_repeats_the_embedding_of_a_tied_model_is_left_out(make_tiny, tmp_path):
    from safetensors.numpy import load_file, save_file

    tiny = make_tiny("LlamaConfig", "llama2", tie_word_embeddings=True)
    weights = load_file(tiny.path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    save_file(weights, tiny.path / "model.safetensors")
    assert "output.weight" not in {t.name for t in convert(tiny.path, tmp_path / "tied.gguf").tensors}
    weights["lm_head.weight"][5] += 1
    save_file(weights, tiny.path / "model.safetensors")
    assert "output.weight" in {t.name for t in convert(tiny.path, tmp_path / "own.gguf").tensors}


def test_progress_ends_at_the_whole_size(checkpoint, tmp_path):
    seen = []
    header = convert(checkpoint, tmp_path / "out.gguf", progress=lambda *step: seen.append(step))
    assert {what for what, _, _ in seen} == {"convert"}
    assert seen[-1][1] == seen[-1][2] == header.tensor_bytes
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_full_disk_is_told_before_writing(checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(gguf_file.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskFull, match=r"it needs \d\d MB \(0 MB free on that disk\)"):
        convert(checkpoint, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_disk_that_fills_while_writing_leaves_the_destination_alone(checkpoint, tmp_path):
    out = tmp_path / "out.gguf"
    out.write_text("precious")

    def fill(_what, done, total):
        if done > total // 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFull, match="choose another --out"):
        convert(checkpoint, out, progress=fill)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["out.gguf"]
    assert out.read_text() == "precious"


def test_limit_of_the_operating_system_on_a_file_is_a_full_disk(checkpoint, tmp_path):
    out = tmp_path / "out.gguf"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(DiskFull):
            convert(checkpoint, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("*out.gguf*"))


# ru_maxrss would include what the parent had when it forked; VmHWM starts anew with the program.
MEASURE = """
import sys
from pathlib import Path
from quantize.convert import convert
convert(Path(sys.argv[1]), Path(sys.argv[2]), dtype=sys.argv[3])
heavy = sorted({"torch", "transformers", "llama_cpp"} & sys.modules.keys())
status = Path("/proc/self/status").read_text().split()
print(int(status[status.index("VmHWM:") + 1]) * 1024, *heavy)
"""


def peak_bytes(checkpoint, out, dtype):
    command = [sys.executable, "-c", MEASURE, checkpoint, out, dtype]
    run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    peak, *heavy = run.stdout.split()
    assert heavy == [], "conversion imports what it must not"
    return int(peak)


def test_smollm2_converts_in_a_fraction_of_its_size(smollm2_checkpoint, tmp_path):
    weights = (smollm2_checkpoint / "model.safetensors").stat().st_size
    peak = peak_bytes(smollm2_checkpoint, tmp_path / "out.gguf", "F32")
    assert peak < weights < read_header(tmp_path / "out.gguf").size_bytes
    assert peak < 1 << 30


def test_memory_does_not_grow_with_the_embedding(tiny_llama, tmp_path):
    """Rows stream: an embedding and a head of 512 MB each pass through far less."""
    wide = shutil.copytree(tiny_llama.path, tmp_path / "wide")
    config = json.loads((wide / "config.json").read_text())
    sizes = {"hidden_size": 4096, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    (wide / "config.json").write_text(json.dumps(config | sizes))
    write_zeros(wide / "model.safetensors", config | sizes)
    peak = peak_bytes(wide, tmp_path / "out.gguf", "F32")
    assert peak < 400 << 20
    assert (wide / "model.safetensors").stat().st_size > 1000 << 20


def write_zeros(path, config):
    """Weights of zeros, sparse on disk."""
    from quantize.families.supported import recognise

    family, settings = recognise(config)
    header, offset = {}, 0
    for recipe in family.recipes(settings):
        size = int(np.prod(recipe.shape)) * 4
        header[recipe.source] = {
            "dtype": "F32",
            "shape": recipe.shape,
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
