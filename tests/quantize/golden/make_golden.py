"""Write golden/smollm2.json: what llama.cpp's own converter makes of the rebuilt SmolLM2 checkpoint.

That converter ships in the source distribution of llama-cpp-python only, so its result is kept as hashes.
It needs sentencepiece beside what our tests install.

usage: python tests/quantize/golden/make_golden.py UNPACKED_SDIST CHECKPOINT
       (pip download --no-binary :all: --no-deps llama-cpp-python==0.3.36; the checkpoint is the tests' own,
       .cache/checkpoints/smollm2)
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf

GOLDEN = Path(__file__).with_name("smollm2.json")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def summary(path: Path) -> dict[str, Any]:
    """Metadata (long values as hashes) and one hash a tensor of a GGUF."""
    reader = gguf.GGUFReader(path)
    metadata = {}
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            value = field.contents()
            text = json.dumps(value, ensure_ascii=False)
            short = value if len(text) < 200 else {"sha256": sha256(text.encode())}
            metadata[key] = {"type": "/".join(kind.name for kind in field.types), "value": short}
    tensors = {
        tensor.name: {
            "type": tensor.tensor_type.name,
            "shape": [int(n) for n in tensor.shape],
            "sha256": sha256(tensor.data.tobytes()),
        }
        for tensor in reader.tensors
    }
    return {"metadata": metadata, "tensors": tensors}


def main() -> None:
    """Run the converter and write the golden file."""
    converter = Path(sys.argv[1]) / "vendor/llama.cpp/convert_hf_to_gguf.py"
    checkpoint = Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "smollm2.gguf"
        subprocess.run(
            [sys.executable, converter, checkpoint, "--outfile", out, "--outtype", "bf16"], check=True
        )
        golden = {"checkpoint": file_sha256(checkpoint / "model.safetensors")} | summary(out)
    GOLDEN.write_text(json.dumps(golden, indent=1, ensure_ascii=False, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
