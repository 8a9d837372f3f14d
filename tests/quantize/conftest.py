"""Tiny random checkpoints of each family with real tokenizers, and their logits in llama.cpp."""

import json
import resource
import shutil
import struct
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from quantize.settings import Settings

TYPES = ("Q8_0", "Q4_K_M")
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 256,
}


@dataclass(frozen=True)
class Tiny:
    """A saved checkpoint and the transformers model it holds, float32, attention computed plainly."""

    path: Path
    model: Any

    def logits(self, tokens: list[int]) -> np.ndarray:
        """(tokens, vocabulary) float32, by transformers."""
        return torch_logits(self.model, tokens)


def torch_logits(model: Any, tokens: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


def n_vocab(folder: Path) -> int:
    """Rows an embedding needs for a tokenizer.json."""
    spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    ids = [*spec["model"]["vocab"].values(), *(token["id"] for token in spec["added_tokens"])]
    return max(ids) + 1


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory, tokenizer_dir) -> Callable[..., Tiny]:
    """A function: (transformers config class name, tokenizer name or folder, **config) -> Tiny."""
    import torch
    import transformers

    def make(config: str, tokenizer: str | Path, *, pad: int = 0, **values: Any) -> Tiny:
        source = tokenizer_dir(tokenizer) if isinstance(tokenizer, str) else tokenizer
        if "vocab_size" not in values:
            values["vocab_size"] = n_vocab(source) + pad
        values = {**SHAPE, **values}
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, config)(**values), dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms and biases start as ones and zeros, which would hide errors
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        path = tmp_path_factory.mktemp("checkpoint") / config.removesuffix("Config").lower()
        model.eval().save_pretrained(path)
        for file in source.iterdir():
            shutil.copy(file, path)
        return Tiny(path, model)

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_tiny) -> Tiny:
    """The smallest of them, for tests that only need a checkpoint; copy it before changing it."""
    return make_tiny("LlamaConfig", "llama2", eos_token_id=2)


@pytest.fixture
def checkpoint(tiny_llama: Tiny, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, free to be damaged."""
    return Path(shutil.copytree(tiny_llama.path, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def phi3_tokenizer(tokenizer_dir, tmp_path_factory) -> Path:
    """Phi-3's tokenizer: Llama 2's, with turn tokens that swallow the spaces after them."""
    folder = tmp_path_factory.mktemp("tokenizer") / "phi3"
    shutil.copytree(tokenizer_dir("llama2"), folder)
    spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    for token in spec["added_tokens"]:
        token["rstrip"] = token["content"] == "</s>"
    names = ["endoftext", "assistant", *(f"placeholder{i}" for i in range(1, 5)), "system", "end", "user"]
    for offset, name in enumerate(names):
        token = {"id": 32000 + offset, "content": f"<|{name}|>", "single_word": False, "lstrip": False}
        token |= {"rstrip": name != "endoftext", "normalized": False, "special": True}
        spec["added_tokens"].append(token)
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), "utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    config |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    del config["added_tokens_decoder"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


def message(number: int, data: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def sentencepiece_model(
    pieces: Iterable[tuple[str, float, int]], *, algorithm: int = 2, prefix: int = 1
) -> bytes:
    """The bytes of a tokenizer.model: (text, score, type) in the order of the ids."""
    data = b""
    for text, score, kind in pieces:
        piece = message(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + number(3, kind)
        data += message(1, piece)
    return data + message(2, number(3, algorithm)) + message(3, message(1, b"identity") + number(3, prefix))


@pytest.fixture(scope="session", name="sentencepiece_model")
def sentencepiece_model_fixture() -> Callable[..., bytes]:
    return sentencepiece_model


MISTRAL_CONTROLS = ("[INST]", "[/INST]", "[TOOL_CALLS]", *(f"[control_{i}]" for i in range(7)))


@pytest.fixture(scope="session")
def mistral_v3_model(tokenizer_dir) -> bytes:
    """A tokenizer.model as Mistral 7B v0.3's: Llama 2's pieces with control tokens after the first three."""
    from quantize.tokenizer.vocabulary import read_vocabulary

    llama = read_vocabulary(tokenizer_dir("llama2"), n_vocab=32_000, config={}).pieces
    pieces = [(piece.text, piece.score, min(int(piece.type), 6)) for piece in llama]
    pieces[:3] = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    controls = [(text, 0.0, 3) for text in MISTRAL_CONTROLS]
    return sentencepiece_model([*pieces[:3], *controls, *pieces[3:]])


#: How GPT-4o's tokenizer, which Phi-4-mini has, splits text.
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="session")
def phi4_tokenizer(tmp_path_factory) -> Path:
    """A small tokenizer of Phi-4-mini's shape: byte-level BPE with GPT-4o's rule and its turn tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tokenizer") / "phi4"
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(O200K), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    texts = [path.read_text("utf-8") for path in (Path(__file__).parent / "golden").glob("*.txt")]
    tokenizer.train_from_iterator(texts, trainer)
    swallowing = [AddedToken(f"<|{name}|>", rstrip=True) for name in ("assistant", "user", "system", "end")]
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>"), *swallowing])
    tokenizer.save(str(folder / "tokenizer.json"))
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": False, **ends}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


@pytest.fixture(scope="session")
def evaluate_gguf() -> Callable[..., np.ndarray]:
    """A function: (GGUF, tokens) -> (tokens, vocabulary) float32 logits by llama.cpp, all in float32.

    Flash attention is off: on CPUs it rounds to float16 within, which alone costs up to 1e-3 of divergence
    on weights as large as these.
    """
    from engine import llama

    defaults = llama.native.llama_context_default_params

    def plain_attention() -> Any:
        parameters = defaults()
        parameters.flash_attn_type = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED
        return parameters

    def run(path: Path, tokens: list[int]) -> np.ndarray:
        with pytest.MonkeyPatch.context() as patch, llama.Model.open(path, n_gpu_layers=0) as model:
            patch.setattr(llama.native, "llama_context_default_params", plain_attention)
            with llama.Context.open(
                model, n_ctx=256, n_batch=64, n_threads=2, type_k="f32", type_v="f32"
            ) as context:
                return np.array(llama.evaluate(context, tokens))

    return run


def max_kl(reference: np.ndarray, candidate: np.ndarray) -> float:
    """The largest KL(reference || candidate) in nats over the rows, in float64."""

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    left, right = log_softmax(reference), log_softmax(candidate[:, : reference.shape[1]])
    return float((np.exp(left) * (left - right)).sum(-1).max())


@pytest.fixture(scope="session", name="max_kl")
def max_kl_fixture() -> Callable[[np.ndarray, np.ndarray], float]:
    return max_kl


@pytest.fixture(scope="session")
def some_tokens() -> list[int]:
    """64 ids that every tokenizer of ours has."""
    return np.random.default_rng(1).integers(300, 20_000, 64).tolist()


@pytest.fixture(scope="session", name="torch_logits")
def torch_logits_fixture() -> Callable[[Any, list[int]], np.ndarray]:
    return torch_logits


@pytest.fixture(scope="session")
def asked(tiny_llama, tmp_path_factory) -> "Settings":
    """A small run; its `out` is to be replaced."""
    from models.store import Store
    from quantize.measure import Backend
    from quantize.settings import Settings
    from quantize.source import find, named

    source = named(find(str(tiny_llama.path), store=Store(tmp_path_factory.mktemp("home"))), "tiny")
    return Settings(
        source,
        Path("unset"),
        TYPES,
        calibration_tokens=600,
        eval_tokens=100,
        n_parallel=4,
        backend=Backend(1),
    )


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """Names of the steps that ran, in order."""
    from quantize import steps

    names: list[str] = []
    write = steps.Ledger._write

    def noting(self, step, facts, seconds):
        names.append(step.name)
        write(self, step, facts, seconds)

    monkeypatch.setattr(steps.Ledger, "_write", noting)
    return names


@contextmanager
def files_up_to(size_bytes: int):
    """Let no file grow beyond a size, here and in child processes: the next best thing to a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
