"""Turn a PEFT LoRA into the adapter GGUF that llama.cpp applies at load.

Scales, rsLoRA's and patterns' included, are folded so that llama.cpp's alpha / rank gives each module its
own. What llama.cpp's adapters cannot express (DoRA, whole tensors) is refused; `lq quantize` merges it.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from models.atomic import whole
from models.errors import ModelsError
from models.gguf import Header
from models.lora import Adapter, AdapterMismatch, Factors

#: Architectures whose attention rows and tensor names are proven equal to the checkpoint's, but for
#: those whose q and k rows the conversion permutes.
ARCHITECTURES = frozenset({"llama", "qwen2", "qwen3", "gemma3", "phi3"})
_PERMUTED = frozenset({"llama"})
_EMBEDDING, _HEAD = "token_embd", "output"
#: Key of a GGUF whose weights `lq quantize --explore` changed before rounding: what was done, by commas. The
#: model is the same, but a factor trained on the checkpoint meets other inputs and rows.
TRANSFORMS = "lq.transforms"
#: The way out for models that `lq quantize` cannot merge into either.
_GGUF_ADAPTER = "give a GGUF adapter, such as llama.cpp's convert_lora_to_gguf.py writes"


class NotConvertible(ModelsError):
    """An adapter that llama.cpp could not apply, or not faithfully."""

    def __init__(self, path: Path, reason: str, *, remedy: str | None = None) -> None:
        merge = f"merge it into its checkpoint instead: `lq quantize CHECKPOINT --lora {path} --out DIR`"
        super().__init__(f"{path}: {reason}; {remedy or merge}")


def convert_adapter(adapter_path: Path, base: Header, out: Path) -> Path:
    """Write the adapter for the model `base` as the file `out`, complete or not at all; returns `out`."""
    import gguf

    adapter = Adapter.open(adapter_path)
    _refuse(adapter, base)
    factors = {name: adapter.factors(module) for name, module in _targets(adapter, base).items()}
    alpha = _alpha(factors)
    writer = gguf.GGUFWriter(None, str(base.architecture))
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, (a, b) in _tensors(factors, base, alpha):
        writer.add_tensor(f"{name}.weight.lora_a", a)
        writer.add_tensor(f"{name}.weight.lora_b", b)
    with whole(out) as partial:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return out


def _refuse(adapter: Adapter, base: Header) -> None:
    if base.architecture not in ARCHITECTURES:
        raise NotConvertible(
            adapter.path,
            f"adapters for the architecture {base.architecture!r} are not converted, only for "
            f"{', '.join(sorted(ARCHITECTURES))}",
            remedy=_GGUF_ADAPTER,
        )
    if TRANSFORMS in base.metadata:
        raise NotConvertible(
            adapter.path,
            f"the weights of {base.path.name} were changed before rounding ({base.metadata[TRANSFORMS]}), "
            "and an adapter trained on the checkpoint does not fit them",
        )
    if adapter.config.use_dora:
        raise NotConvertible(adapter.path, "a DoRA adapter (use_dora) cannot be applied while serving")
    if adapter.replaced:
        raise NotConvertible(
            adapter.path,
            f"it replaces whole tensors (modules_to_save: {adapter.replaced[0]}), only factors can",
        )


def _targets(adapter: Adapter, base: Header) -> dict[str, str]:
    """GGUF tensor name less `.weight` -> module; every one exists in the base with fitting shape."""
    import gguf

    architecture = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[str(base.architecture)]
    names = gguf.get_tensor_name_map(architecture, int(base.hyperparameter("block_count") or 0))
    shapes = {tensor.name: tensor.shape for tensor in base.tensors}
    targets: dict[str, str] = {}
    for module in adapter.modules:
        prefix = "" if module.startswith("lm_head") else "model."
        name = names.get_name(prefix + module)
        if name in (_EMBEDDING, _HEAD) and f"{_HEAD}.weight" not in shapes:
            raise NotConvertible(adapter.path, f"{module} is adapted, but the model ties embedding and head")
        if name is None or f"{name}.weight" not in shapes:
            raise AdapterMismatch(_stranger(adapter, base, module))
        _check_shape(adapter, base, module, shapes[f"{name}.weight"])
        targets[name] = module
    return targets


def _check_shape(adapter: Adapter, base: Header, module: str, shape: tuple[int, ...]) -> None:
    factors = adapter.factors(module)
    wanted = (factors.a.shape[1], factors.b.shape[0])
    wanted = wanted[::-1] if factors.embedding else wanted
    if shape != wanted:
        raise AdapterMismatch(
            _stranger(adapter, base, module)
            + f": {list(shape[::-1])} here, {list(wanted[::-1])} in the adapter"
        )


def _stranger(adapter: Adapter, base: Header, module: str) -> str:
    trained = adapter.config.base_model
    return (
        f"{adapter.path} is an adapter of another model than {base.path.name}"
        f"{f' (it was trained on {trained})' if trained else ''}: {module} does not fit"
    )


def _alpha(factors: dict[str, Factors]) -> float:
    """The alpha of the first module; the others are scaled to it. Never 0, which llama.cpp reads as none."""
    alphas = (float(np.float32(factor.scale * factor.rank)) for factor in factors.values())
    return next((alpha for alpha in alphas if alpha), 1.0)


def _tensors(
    factors: dict[str, Factors], base: Header, alpha: float
) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    for name, factor in factors.items():
        b = factor.b
        if base.architecture in _PERMUTED and name.endswith((".attn_q", ".attn_k")):
            b = _permuted(b, _heads(base, key=name.endswith(".attn_k")))
        ratio = factor.scale * factor.rank / alpha
        if abs(ratio - 1) > 1e-6:
            b = b * np.float32(ratio)
        a = factor.a.T if factor.embedding else factor.a
        yield name, (np.ascontiguousarray(a), np.ascontiguousarray(b))


def _heads(base: Header, *, key: bool) -> int:
    heads = base.hyperparameter("attention.head_count")
    heads = base.hyperparameter("attention.head_count_kv") or heads if key else heads
    if not isinstance(heads, int):
        raise NotConvertible(
            base.path,
            f"attention.head_count is {heads!r}, one number for all layers is needed",
            remedy=_GGUF_ADAPTER,
        )
    return heads


def _permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection in the order that llama.cpp's rotary embedding wants."""
    out, rank = rows.shape
    return rows.reshape(heads, 2, out // heads // 2, rank).swapaxes(1, 2).reshape(out, rank)
