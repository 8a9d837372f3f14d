"""Encoders and decoders of two layers with random weights, written as GGUF in a moment, and their truth.

`bert` and `qwen3` write a file that pools as it is told; `hidden` asks transformers' model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

WIDTH, INNER, HEADS, LAYERS, CONTEXT = 32, 64, 4, 2, 96
POOLINGS = {"none": 0, "mean": 1, "cls": 2, "last": 3, "rank": 4}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,?!"
WORDS = ["the", "a", "cat", "dog", "house", "tree", "river", "runs", "sleeps", "is", "red", "blue", "where"]
VOCABULARY = [*SPECIAL, *LETTERS, *WORDS, *(f"##{letter}" for letter in LETTERS), "##s", "##ing"]
VOCABULARY = list(dict.fromkeys(VOCABULARY))
TEMPLATE = "[CLS]the {query} [MASK]{document}[SEP]"

Weights = dict[str, np.ndarray]


def bert(path: Path, *, pooling: str | None = "mean", head: bool = False, seed: int = 1) -> Path:
    """An encoder; `head`: with a classifier's two layers and one label."""
    writer = _writer(path, "bert", pooling)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_token_type_count(2)
    _write(writer, bert_weights(head=head, seed=seed))
    return path


def qwen3(path: Path, *, pooling: str | None = "last", head: bool = False, seed: int = 1) -> Path:
    """A decoder; `head`: with two labels, yes and no, and a prompt for pairs."""
    writer = _writer(path, "qwen3", pooling)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_head_count_kv(HEADS)
    writer.add_key_length(WIDTH // HEADS)
    writer.add_value_length(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    if head:
        writer.add_classifier_output_labels(["yes", "no"])
        writer.add_chat_template([{"name": "rerank", "template": TEMPLATE}])
    _write(writer, qwen3_weights(head=head, seed=seed))
    return path


def bert_weights(*, head: bool, seed: int) -> Weights:
    """By the names that GGUF has for them, in the shapes that torch has."""
    draw = _Draw(seed)
    weights = {
        "token_embd.weight": draw(len(VOCABULARY), WIDTH),
        "token_types.weight": draw(2, WIDTH),
        "position_embd.weight": draw(CONTEXT, WIDTH),
        "token_embd_norm.weight": 1 + draw(WIDTH),
        "token_embd_norm.bias": draw(WIDTH),
    }
    shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH, WIDTH), "attn_v": (WIDTH, WIDTH)}
    shapes |= {"attn_output": (WIDTH, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER)}
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            weights[f"blk.{layer}.{name}.weight"] = draw(*shape)
            weights[f"blk.{layer}.{name}.bias"] = draw(shape[0])
        for name in ("attn_output_norm", "layer_output_norm"):
            weights[f"blk.{layer}.{name}.weight"] = 1 + draw(WIDTH)
            weights[f"blk.{layer}.{name}.bias"] = draw(WIDTH)
    if head:
        weights |= {"cls.weight": draw(WIDTH, WIDTH), "cls.bias": draw(WIDTH)}
        weights |= {"cls.output.weight": draw(1, WIDTH), "cls.output.bias": draw(1)}
    return weights


def qwen3_weights(*, head: bool, seed: int) -> Weights:
    """The same for a decoder."""
    draw = _Draw(seed)
    weights = {
        "token_embd.weight": draw(len(VOCABULARY), WIDTH),
        "output.weight": draw(len(VOCABULARY), WIDTH),
        "output_norm.weight": 1 + draw(WIDTH),
    }
    shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH, WIDTH), "attn_v": (WIDTH, WIDTH)}
    shapes |= {"attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH)}
    shapes |= {"ffn_down": (WIDTH, INNER)}
    for layer in range(LAYERS):
        weights |= {f"blk.{layer}.{name}.weight": draw(*shape) for name, shape in shapes.items()}
        weights |= {f"blk.{layer}.{name}.weight": 1 + draw(WIDTH) for name in ("attn_norm", "ffn_norm")}
        for name in ("attn_q_norm", "attn_k_norm"):
            weights[f"blk.{layer}.{name}.weight"] = 1 + draw(WIDTH // HEADS)
    if head:
        weights["cls.output.weight"] = draw(2, WIDTH)
    return weights


def tokenize(text: str, folder: Path) -> list[int]:
    """Token ids as transformers has them, without special tokens."""
    from transformers import BertTokenizer

    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(VOCABULARY))
    return BertTokenizer(str(vocabulary))(text, add_special_tokens=False)["input_ids"]


def hidden(architecture: str, weights: Weights, tokens: list[int]) -> np.ndarray:
    """(tokens, WIDTH): what transformers' model has after its last layer and norm."""
    import torch

    model = _bert_model() if architecture == "bert" else _qwen3_model()
    names = _BERT_NAMES if architecture == "bert" else _QWEN3_NAMES
    state = {_renamed(name, names): torch.from_numpy(value) for name, value in weights.items()}
    wanted = set(model.state_dict()) - {"embeddings.position_ids"}
    model.load_state_dict({name: state[name] for name in wanted}, strict=False)
    with torch.no_grad():
        return model(torch.tensor([tokens])).last_hidden_state[0].numpy()


class _Draw:
    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> np.ndarray:
        # As spread as BERT's own. Larger ones amplify what llama.cpp rounds to 16 bits: keys, values, GELU.
        return self._random.normal(0, 0.05, shape).astype(np.float32)


def _writer(path: Path, architecture: str, pooling: str | None) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    if pooling is not None:
        writer.add_uint32(f"{architecture}.pooling_type", POOLINGS[pooling])
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    # As converters write WordPiece: a mark where words begin, none inside of them.
    pieces = [
        text if text in SPECIAL else text[2:] if text.startswith("##") else f"▁{text}" for text in VOCABULARY
    ]
    writer.add_token_list(pieces)
    writer.add_token_types([3 if text in SPECIAL else 1 for text in VOCABULARY])
    for add, text in (
        (writer.add_bos_token_id, "[CLS]"), (writer.add_sep_token_id, "[SEP]"),
        (writer.add_unk_token_id, "[UNK]"), (writer.add_pad_token_id, "[PAD]"),
        (writer.add_mask_token_id, "[MASK]"),
    ):  # fmt: skip
        add(VOCABULARY.index(text))
    return writer


def _write(writer: gguf.GGUFWriter, weights: Mapping[str, np.ndarray]) -> None:
    for name, value in weights.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _bert_model() -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=INNER, max_position_embeddings=CONTEXT, hidden_act="gelu",
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


def _qwen3_model() -> Any:
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=len(VOCABULARY), hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, head_dim=WIDTH // HEADS, intermediate_size=INNER, rms_norm_eps=1e-6,
        max_position_embeddings=CONTEXT, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    return Qwen3Model(config).eval()


_BERT_NAMES = {
    "token_embd_norm": "embeddings.LayerNorm",
    "token_embd": "embeddings.word_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "position_embd": "embeddings.position_embeddings",
    "blk.": "encoder.layer.",
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output_norm": "attention.output.LayerNorm",
    "attn_output": "attention.output.dense",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
}
_QWEN3_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "blk.": "layers.",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """A GGUF name as transformers has it; the first of `names` that fits a part holds for it."""
    *places, kind = name.split(".")
    prefix = names["blk."] + places[1] + "." if places[0] == "blk" else ""
    return f"{prefix}{names.get(places[-1], places[-1])}.{kind}"
