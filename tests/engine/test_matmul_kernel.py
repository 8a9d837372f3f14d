"""Our kernels for blocks of 32 weights give what llama.cpp's gives, to the last bit, for any number of rows.

In a whole model attention is llama.cpp's plain one on both sides, so that nothing else differs.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from llama_cpp import llama_cpp as native

from engine.kernels import calls, library_path, min_rows
from quantize.structure.pruned_file import Pruning
from tests.engine.ggml_graph import Weights

FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "IQ4_NL": 25}  # llama_ftype
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 40, 130)  # tokens of a call: rows below, at and above a pass
needs_kernel = pytest.mark.skipif(
    not library_path().is_file() or calls("matmul") < 0, reason="no kernel on this machine, or for its CPU"
)

COMPUTE = """
import sys
from pathlib import Path
import numpy as np
from engine import kernels
if sys.argv[3] == "llama.cpp":
    kernels.install = lambda _: None
from engine import llama
plain = llama.native.llama_init_from_model
def without_flash_attention(model, parameters):
    parameters.flash_attn_type = 0
    return plain(model, parameters)
llama.native.llama_init_from_model = without_flash_attention
results = []
with (
    llama.Model.open(Path(sys.argv[1]), use_mmap=False) as model,
    llama.Context.open(model, n_ctx=256, n_threads=int(sys.argv[4])) as context,
):
    assert sys.argv[3] == "llama.cpp" or llama.without_kernels() is None, llama.without_kernels()
    for length in map(int, sys.argv[5:]):
        context.clear()
        context.batch.clear()
        context.batch.extend(range(1000, 1000 + length), start=0, sequence=0, output=True)
        context.decode()
        results.append(context.logits(length - 1).copy())
assert sys.argv[3] == "llama.cpp" or kernels.calls("matmul") != 0, "it was not used"
np.save(sys.argv[2], results)
"""


@pytest.fixture(scope="module")
def small(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers of the model: all there is to a kernel, in a sixth of the time."""
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    Pruning.of(smollm2_gguf, range(5, 30)).write(path)
    return path


@pytest.fixture(scope="module", params=FILE_TYPES)
def quantized(request, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / f"smollm2-{request.param}.gguf"
    parameters = native.llama_model_quantize_default_params()
    parameters.ftype, parameters.allow_requantize = FILE_TYPES[request.param], True
    parameters.nthread, parameters.pure = 2, True  # Q5_K beside IQ4_NL has other bits in llama.cpp
    assert native.llama_model_quantize(str(small).encode(), str(path).encode(), parameters) == 0
    return path


def logits(path: Path, folder: Path, *, kernels: str, n_threads: int) -> np.ndarray:
    """Of the last token of each call, by a process of its own: installing is for good."""
    result = folder / f"{kernels}-{n_threads}.npy"
    arguments = [str(path), str(result), kernels, str(n_threads), *map(str, LENGTHS)]
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", COMPUTE, *arguments], cwd=root, check=True, timeout=300)
    return np.load(result)


@pytest.mark.skipif(not library_path().is_file(), reason="lq was installed without a C++ compiler: no kernel")
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_every_number_of_rows_gives_the_bits_that_llama_cpp_gives(quantized, tmp_path, n_threads):
    ours = logits(quantized, tmp_path, kernels="lq", n_threads=n_threads)
    theirs = logits(quantized, tmp_path, kernels="llama.cpp", n_threads=2)
    assert np.isfinite(ours).all()
    for length, a, b in zip(LENGTHS, ours, theirs, strict=True):
        assert np.array_equal(a, b), f"{length} rows: {np.abs(a - b).max()}"


# ggml_type, bytes of a block, numbers of 16 bits at its beginning
BY_COLUMN = {"Q4_1": (3, 20, 2), "Q5_0": (6, 22, 1), "Q5_1": (7, 24, 2), "Q8_0": (8, 34, 1)}


@needs_kernel
@pytest.mark.parametrize("n_blocks", [1, 2, 3, 16, 17])
@pytest.mark.parametrize("kind", BY_COLUMN)
def test_columns_of_any_length_give_a_row_the_same_bits(our_matmul, their_matmul, kind, n_blocks):
    """The models above have columns of an even number of blocks."""
    type, n_bytes, n_halves = BY_COLUMN[kind]
    random = np.random.default_rng(n_blocks)
    blocks = random.integers(256, size=(6, n_blocks, n_bytes), dtype=np.uint8)
    halves = random.normal(size=(6, n_blocks, n_halves)).astype(np.float16)
    blocks[..., : 2 * n_halves] = halves.view(np.uint8)
    weights = Weights(type, 32 * n_blocks, blocks.reshape(6, -1), False)
    groups = [random.normal(size=(n, weights.length)).astype(np.float32) for n in (1, 2, 5)]
    groups += [np.full((1, weights.length), value, np.float32) for value in (0, -3, 1e-39)]
    found, expected = our_matmul.compute(weights, groups), their_matmul.compute(weights, groups)
    assert our_matmul.taken == sum(len(rows) >= min_rows() for rows in groups)
    assert their_matmul.taken == 0
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a.view(np.int32), b.view(np.int32)), f"{len(a)} rows: {np.abs(a - b).max()}"


@needs_kernel
@pytest.mark.parametrize("type", [2, 20], ids=["Q4_0", "IQ4_NL"])
def test_the_first_part_of_each_repacked_column_is_right_too(our_matmul, their_matmul, type):
    """llama.cpp finds columns by their distance, which is then not what a part of one takes."""
    random = np.random.default_rng(type)
    blocks = random.integers(256, size=(48, 4, 18), dtype=np.uint8)
    blocks[..., :2] = random.normal(size=(48, 4, 1)).astype(np.float16).view(np.uint8)
    weights = Weights(type, 128, blocks.reshape(48, -1), True)
    groups = [random.normal(size=(n, 64)).astype(np.float32) for n in (1, 3)]
    found, expected = our_matmul.compute(weights, groups), their_matmul.compute(weights, groups)
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a, b)
