"""Texts -> vectors with a sentence-transformers folder of this machine; never the network.

Owns prefixes, batches, lengths and the token spans that chunks are cut by. Knows no files and no search.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rag import fingerprint
from rag.errors import RagError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

Progress = Callable[[int, int], None]  # (texts embedded, texts in all)

BATCH = 32
#: Models that read more are given windows of this many tokens at most: chunks are not longer.
MAX_TOKENS = 2048
_KOREAN = "육아휴직은자녀한명당일년까지사용할수있습니다"


class UnusableEmbedder(RagError):
    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path} does not load as an embedder: {reason}; "
            "give a sentence-transformers folder with .safetensors weights, or: lq pull all-minilm-l6-v2"
        )


#: Longer texts are tokenized in pieces: one call for 10 MB of dots takes 5.4 GB, in pieces it takes 1.4.
_PIECE_CHARACTERS = 50_000


class Embedder:
    """One model, loaded at first use (seconds); the fingerprint needs no loading. One thread at a time."""

    def __init__(self, path: Path, *, name: str) -> None:
        self.path = path
        self.name = name
        self.fingerprint = fingerprint.of_folder(path)

    @classmethod
    def load(cls, path: Path, *, name: str | None = None) -> "Embedder":
        """The embedder in a folder; UnusableEmbedder, here or at first use, says what is wrong with it."""
        path = Path(path)
        if not path.is_dir():
            raise UnusableEmbedder(path, "it is no folder")
        if not (path / "modules.json").is_file() and not (path / "config.json").is_file():
            raise UnusableEmbedder(path, "it has neither modules.json nor config.json")
        return cls(path, name=name or path.name)

    @property
    def dimension(self) -> int:
        dimension = int(self._model.get_embedding_dimension() or 0)
        if not dimension:
            raise UnusableEmbedder(self.path, "it does not say how long its vectors are")
        return dimension

    @property
    def max_tokens(self) -> int:
        """Tokens that the model reads at once, special ones and prefix included."""
        return min(int(self._model.max_seq_length or MAX_TOKENS), MAX_TOKENS)

    def documents(self, texts: Sequence[str], progress: Progress | None = None) -> np.ndarray:
        """(n, dimension) float32 of length 1, with the prefix that the model wants for documents."""
        return self._embed(self._model.encode_document, texts, progress)

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """(n, dimension) float32 of length 1, with the prefix that the model wants for questions."""
        return self._embed(self._model.encode_query, texts, None)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Character spans of the tokens of a text of any length, ascending, without special tokens."""
        result: list[tuple[int, int]] = []
        start = 0
        while start < len(text):
            end = _piece_end(text, start)
            offsets = self._tokenizer.encode(text[start:end], add_special_tokens=False).offsets
            result += [(start + first, start + last) for first, last in offsets if last > first]
            start = end
        return result

    def count_tokens(self, text: str) -> int:
        """Tokens that the model reads for a document, special ones and prefix included."""
        return len(self._tokenizer.encode(self._prefix + text).ids)

    @property
    def window_tokens(self) -> int:
        """Tokens of text that fit beside the special ones and the prefix."""
        return self.max_tokens - self.count_tokens("")

    @property
    def reads_hangul(self) -> bool:
        """Whether the vocabulary has Korean words: at most one token a syllable, none unknown."""
        tokens = self._tokenizer.encode(_KOREAN, add_special_tokens=False).tokens
        return len(tokens) <= len(_KOREAN) and not {"[UNK]", "<unk>"}.intersection(tokens)

    @functools.cached_property
    def _model(self) -> "SentenceTransformer":
        with _quiet():
            import torch
            from sentence_transformers import SentenceTransformer

            device = "cuda" if torch.cuda.is_available() else "cpu"
            options = {"use_safetensors": True}
            try:
                return SentenceTransformer(
                    str(self.path), device=device, local_files_only=True, model_kwargs=options
                )
            except Exception as error:  # the libraries raise every kind, down to bare KeyErrors
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise UnusableEmbedder(self.path, reason) from error

    @functools.cached_property
    def _tokenizer(self) -> "Tokenizer":
        """A copy of our own that neither cuts nor pads."""
        from tokenizers import Tokenizer

        backend = getattr(self._model.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UnusableEmbedder(self.path, "its tokenizer has no tokenizer.json")
        copy = Tokenizer.from_str(backend.to_str())
        copy.no_truncation()
        copy.no_padding()
        return copy

    @property
    def _prefix(self) -> str:
        return self._model.prompts.get("document") or ""

    def _embed(
        self, encode: Callable[..., Any], texts: Sequence[str], progress: Progress | None
    ) -> np.ndarray:
        """Longest first, so that a batch pads little and memory peaks at once."""
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        for first in range(0, len(order), BATCH):
            rows = order[first : first + BATCH]
            with _quiet():
                found = encode(
                    [texts[row] for row in rows],
                    batch_size=BATCH,
                    show_progress_bar=False,
                    convert_to_numpy=True,
                    normalize_embeddings=True,
                )
            if found.shape != vectors[rows].shape:
                problem = f"it writes vectors of {found.shape[-1]} numbers and says {self.dimension}"
                raise UnusableEmbedder(self.path, problem)
            vectors[rows] = found
            if progress:
                progress(first + len(rows), len(texts))
        if not np.isfinite(vectors).all():
            raise RagError(f"the embedder {self.name!r} wrote vectors that are not numbers; pull it again")
        return vectors


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The libraries' bars and warnings are about themselves, not about the user's documents."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.utils import logging

        level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()


def _piece_end(text: str, start: int) -> int:
    """Where the piece that begins at `start` ends: before a space or line break where there is one."""
    end = start + _PIECE_CHARACTERS
    if end >= len(text):
        return len(text)
    cut = max(text.rfind(" ", start + 1, end), text.rfind("\n", start + 1, end))
    return cut if cut > start else end
