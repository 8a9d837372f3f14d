"""Write imatrix_golden.npz: what llama.cpp's own llama-imatrix collects on handbook.txt, to compare with.

usage: make_imatrix_golden.py LLAMA_IMATRIX MODEL.gguf
LLAMA_IMATRIX is the program built from the same llama.cpp commit as llama-cpp-python; MODEL the SmolLM2
checkpoint of the tests, converted to F32. In F32, processors differ by 1e-4 (SSE against AVX2); with
quantized weights, whose products round the activations, by 2e-2. Tensors that read the same activations hold
the same numbers, so one of each is kept.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from quantize.calibration.imatrix import ImportanceMatrix

FOLDER = Path(__file__).parent
CHUNK = 256
KEPT = ("attn_q", "attn_output", "ffn_up", "ffn_down")


def main() -> None:
    program, model = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "matrix.gguf"
        # a chunk a batch: llama-imatrix ignores what is left over when several are cut into micro-batches
        options = ["-c", str(CHUNK), "-b", str(CHUNK), "-t", "2", "--no-ppl", "-o", str(out)]
        subprocess.run([program, "-m", model, "-f", str(FOLDER / "handbook.txt"), *options], check=True)
        matrix = ImportanceMatrix.read(out)
    kept = {name: entry for name, entry in matrix.entries.items() if name.split(".")[2] in KEPT}
    arrays = {name: _shortened(entry.means()) for name, entry in kept.items()}
    count = {int(entry.counts[0]) for entry in kept.values()}
    np.savez_compressed(FOLDER / "imatrix_golden.npz", count=list(count), **arrays)


def _shortened(values: np.ndarray) -> np.ndarray:
    """Mantissas cut to 15 bits (relative error below 2e-5), so that the file compresses."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x80) & 0xFFFFFF00).view(np.float32)


if __name__ == "__main__":
    main()
