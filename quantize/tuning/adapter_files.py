"""The adapter as PEFT's folder of safetensors, and what `models.lora_gguf` needs to make a GGUF of it.

Owns names, scales and ranks as PEFT writes them.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from models.atomic import whole
from models.gguf import Header, TensorInfo
from models.tensor_types import TensorType
from quantize.convert import Prepared
from quantize.steps import write_text

Factors = Mapping[str, tuple[np.ndarray, np.ndarray]]  # module -> (b, a), scale in b


def write_peft(folder: Path, factors: Factors, *, base_model: str, card: str) -> None:
    """Write adapter_config.json, adapter_model.safetensors and README.md; each whole or not at all.

    Ranks may differ from module to module. The scale is in the factors, so alpha is each module's rank.
    """
    from peft import LoraConfig

    ranks = {module: a.shape[0] for module, (_, a) in factors.items()}
    usual = max(ranks.values())
    other = {module: rank for module, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
        r=usual,
        lora_alpha=usual,
        rank_pattern=other,
        alpha_pattern=dict(other),
        target_modules=sorted({module.rpartition(".")[2] for module in factors}),
    ).to_dict()
    tensors = {}
    for module, (b, a) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(b)
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / "adapter_model.safetensors") as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    write_text(folder / "adapter_config.json", json.dumps(plain, indent=2, default=str) + "\n")
    write_text(folder / "README.md", card)


def header_of(base: Prepared, checkpoint: Path) -> Header:
    """The header that the converted model would have, without converting it."""
    metadata = {key: value.value for part in base.writer.kv_data for key, value in part.items()}
    tensors = tuple(
        TensorInfo(output.name, output.shape[::-1], TensorType[output.dtype], 0, output.size_bytes)
        for output in base.outputs
    )
    return Header(checkpoint, 3, 32, metadata, tensors, 0, sum(tensor.size_bytes for tensor in tensors))
