"""What the dense decoders share: embedding, attention, gated feed-forward, norms, and their keys.

The families say how they differ; nothing here knows a family's name.
"""

import gguf

from quantize.families.config import Config, UnsupportedConfig
from quantize.families.recipe import Recipe

SILU = ("silu", "swish")


def check_plain(config: Config, *, activation: str = "hidden_act", allowed: tuple[str, ...] = SILU) -> None:
    """Refuse what changes the arithmetic and has no place in a GGUF of these families."""
    config.require(activation, allowed, "llama.cpp computes this family with one activation")
    if config.get("quantization_config"):
        quantized = config.get("quantization_config")
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise UnsupportedConfig(
            "quantization_config.quant_method",
            method,
            "is already quantized; give the full-precision checkpoint",
        )
    if config.integer("num_attention_heads") % config.n_head_kv:
        raise UnsupportedConfig(
            "num_key_value_heads", config.n_head_kv, "does not divide num_attention_heads"
        )
    if config.head_dim % 2:
        raise UnsupportedConfig("head_dim", config.head_dim, "must be even for rotary embeddings")


def check_square_attention(config: Config) -> None:
    """Refuse a head width that llama.cpp's graph of this family cannot have."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if config.head_dim * heads != hidden:
        raise UnsupportedConfig(
            "head_dim",
            config.head_dim,
            f"is not hidden_size / num_attention_heads = {hidden} / {heads}, as llama.cpp needs it here",
        )


def check_full_rotation(config: Config) -> None:
    """Refuse rotary embeddings over a part of the head."""
    parameters = config.get("rope_parameters") or {}
    factor = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if factor != 1.0:
        raise UnsupportedConfig(
            "partial_rotary_factor", factor, "is not supported for this family; only 1.0 is"
        )


def window_notes(config: Config, window: int | None) -> tuple[str, ...]:
    """What the user should know of a sliding window that the GGUF does not carry.

    context_length stays the full one, as llama.cpp's own converter writes it.
    """
    context = config.integer("max_position_embeddings")
    if window is None or window >= context:
        return ()
    return (
        f"The model slides a window of {window} tokens, which llama.cpp does not have for this architecture: "
        f"in texts longer than that, up to its {context}, the GGUF attends to all tokens and answers may "
        "differ from the checkpoint's.",
    )


def write_decoder(config: Config, writer: gguf.GGUFWriter) -> None:
    """The keys every family has."""
    writer.add_block_count(config.integer("num_hidden_layers"))
    writer.add_context_length(config.integer("max_position_embeddings"))
    writer.add_embedding_length(config.integer("hidden_size"))
    writer.add_feed_forward_length(config.integer("intermediate_size"))
    writer.add_head_count(config.integer("num_attention_heads"))
    writer.add_head_count_kv(config.n_head_kv)
    writer.add_layer_norm_rms_eps(config.number("rms_norm_eps"))


def write_head_dim(config: Config, writer: gguf.GGUFWriter) -> None:
    """The head's width, which llama.cpp would otherwise derive."""
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)


def ends(config: Config, *, shift: float = 0.0) -> list[Recipe]:
    """Embedding, last norm, and the head (dropped later where it is tied)."""
    vocab, hidden = config.integer("vocab_size"), config.integer("hidden_size")
    return [
        Recipe("model.embed_tokens.weight", "token_embd.weight", (vocab, hidden)),
        Recipe("model.norm.weight", "output_norm.weight", (hidden,), shift=shift),
        Recipe("lm_head.weight", "output.weight", (vocab, hidden)),
    ]


def attention(
    config: Config, layer: int, *, qkv_bias: bool = False, output_bias: bool = False, interleave: bool = False
) -> list[Recipe]:
    """q, k, v and output of one layer; `interleave`: rotary pairs are neighbours in the GGUF."""
    hidden, dim = config.integer("hidden_size"), config.head_dim
    q, kv = config.integer("num_attention_heads"), config.n_head_kv
    source, target = f"model.layers.{layer}.self_attn", f"blk.{layer}"
    recipes = []
    for letter, heads, rotates in (("q", q, True), ("k", kv, True), ("v", kv, False)):
        pairs = heads if rotates and interleave else 0
        name, out = f"{source}.{letter}_proj", f"{target}.attn_{letter}"
        recipes.append(Recipe(f"{name}.weight", f"{out}.weight", (heads * dim, hidden), heads=pairs))
        if qkv_bias:
            recipes.append(Recipe(f"{name}.bias", f"{out}.bias", (heads * dim,), heads=pairs))
    recipes.append(Recipe(f"{source}.o_proj.weight", f"{target}.attn_output.weight", (hidden, q * dim)))
    if output_bias:
        recipes.append(Recipe(f"{source}.o_proj.bias", f"{target}.attn_output.bias", (hidden,)))
    return recipes


def feed_forward(config: Config, layer: int, *, bias: bool = False) -> list[Recipe]:
    """gate, up and down of one layer."""
    hidden, inner = config.integer("hidden_size"), config.integer("intermediate_size")
    recipes = []
    for part, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
        source, target = f"model.layers.{layer}.mlp.{part}_proj", f"blk.{layer}.ffn_{part}"
        recipes.append(Recipe(f"{source}.weight", f"{target}.weight", shape))
        if bias:
            recipes.append(Recipe(f"{source}.bias", f"{target}.bias", shape[:1]))
    return recipes


def norms(config: Config, layer: int, names: dict[str, str], *, shift: float = 0.0) -> list[Recipe]:
    """Norms over the hidden width: {name in the checkpoint: name in the GGUF}."""
    width = (config.integer("hidden_size"),)
    return [
        Recipe(f"model.layers.{layer}.{source}.weight", f"blk.{layer}.{target}.weight", width, shift=shift)
        for source, target in names.items()
    ]


def head_norms(config: Config, layer: int, *, shift: float = 0.0) -> list[Recipe]:
    """The norms over each query and key head."""
    return [
        Recipe(
            f"model.layers.{layer}.self_attn.{letter}_norm.weight",
            f"blk.{layer}.attn_{letter}_norm.weight",
            (config.head_dim,),
            shift=shift,
        )
        for letter in "qk"
    ]


PRE_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
