"""Which tensors of a model may be quantized, and to which types, by llama.cpp's own rules.

Facts of llama.cpp (`tensor_allows_quantization` of src/llama-quant.cpp, as pinned); decides nothing.
"""

from collections.abc import Iterable, Sequence

from models.tensor_types import TensorType

#: Matrices that stay as they are: small, or read by code that takes no blocks. Parts of names.
KEPT_PARTS = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel",
    "per_layer_model_proj", "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight",
    "indexer.q_proj.weight", "time_mix_first.weight", "time_mix_w0.weight", "time_mix_w1.weight",
    "time_mix_w2.weight", "time_mix_v0.weight", "time_mix_v1.weight", "time_mix_v2.weight",
    "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight", "time_mix_g1.weight",
    "time_mix_g2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight", "attn_rel_b.weight", ".position_embd", "sam.pos_embd", "sam.neck.",
    "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger", "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
#: And the whole names of two tables.
KEPT_NAMES = frozenset({"position_embd.weight", "token_types.weight"})
#: One architecture has more of them.
GLM5_NEXT, GLM5_NEXT_PARTS = "glm5-next", (
    "hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate",
    "indexer_compressor_ape", "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight",
    "ssm_beta.weight", "attn_kv_a_mqa.weight", "attn_k_b.weight", "attn_v_b.weight",
)  # fmt: skip


def may_be_quantized(name: str, shape: Sequence[int], architecture: str | None = None) -> bool:
    """Whether llama.cpp would quantize this tensor; `shape` in ggml's order.

    One column counts as a vector. Tensors of four dimensions, which are convolutions, are none of ours.
    """
    n_dimensions = max((index for index, length in enumerate(shape, 1) if length > 1), default=0)
    if not 2 <= n_dimensions <= 3 or not name.endswith("weight") or name in KEPT_NAMES:
        return False
    parts = KEPT_PARTS + (GLM5_NEXT_PARTS if architecture == GLM5_NEXT else ())
    return not any(part in name for part in parts)


def fitting_types(row_length: int, types: Iterable[str]) -> tuple[str, ...]:
    """Those of these types whose blocks fill a row, in their order."""
    return tuple(name for name in types if row_length % TensorType[name].block_elements == 0)
