"""An embedder without a model: words hashed into a vector, and every text counted."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest


class HashEmbedder:
    """Texts that share words are near each other. `texts` are all that were embedded as documents."""

    reads_hangul = False
    window_tokens = 40
    dimension = 64

    def __init__(self, name: str = "hash", mark: str = "0123456789abcdef") -> None:
        self.name, self.fingerprint, self.texts = name, mark, []

    def documents(self, texts, progress=None):
        del progress
        self.texts += texts
        return self.queries(texts)

    def queries(self, texts):
        vectors = np.full((len(texts), self.dimension), 1e-3, np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()):
                vectors[row, hashlib.sha256(word.encode()).digest()[0] % self.dimension] += 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def spans(self, text):
        return [found.span() for found in re.finditer(r"\w+|[^\w\s]", text)]


@pytest.fixture
def embedder() -> HashEmbedder:
    return HashEmbedder()


@pytest.fixture
def make_embedder():
    """The class, for tests that need several."""
    return HashEmbedder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three documents of several sections."""
    root = tmp_path / "documents"
    (root / "inner").mkdir(parents=True)
    for name, subject in (("leave.md", "holiday"), ("inner/travel.md", "train"), ("pay.md", "salary")):
        (root / name).write_text(document(subject), "utf-8")
    return root


def document(subject: str, sections: int = 6) -> str:
    parts = [f"# About {subject}\n"]
    for number in range(sections):
        words = " ".join(f"{subject}{number}word{index}" for index in range(60))
        parts.append(f"## Part {number} of {subject}\n\nThe {subject} rule {number} says {words}.\n")
    return "\n".join(parts)
