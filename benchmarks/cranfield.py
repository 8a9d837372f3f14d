"""nDCG@10 of the collection's search on Cranfield, for several ways to join vectors and words.

    python benchmarks/cranfield.py DATA EMBEDDER_FOLDER

DATA holds corpus.jsonl, queries.jsonl and qrels.tsv (BEIR's layout). The documents are indexed as `lq index`
would; the table says what each share of the vector side and what reciprocal ranks give, and the time a query.
"""

import argparse
import csv
import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from rag.embed import Embedder
from rag.ingest import index
from rag.retrieve import POOL, Candidate, candidates, rank
from rag.store import FILE_NAME, Database
from rag.vectors import VectorIndex

Ranking = Callable[[Sequence[Candidate]], list[int]]


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("data", type=Path, help="folder with corpus.jsonl, queries.jsonl, qrels.tsv")
    arguments.add_argument("embedder", type=Path, help="sentence-transformers folder")
    options = arguments.parse_args()
    embedder = Embedder.load(options.embedder)
    with tempfile.TemporaryDirectory() as folder:
        documents, collection = Path(folder) / "documents", Path(folder) / "cranfield"
        write_documents(options.data / "corpus.jsonl", documents)
        report = index(collection, [documents], embedder=embedder)
        print(f"{report.added} documents, {report.embedded_windows} windows, {report.seconds:.0f} s")
        evaluate(options.data, collection, embedder)


def write_documents(corpus: Path, folder: Path) -> None:
    folder.mkdir()
    for line in corpus.read_text("utf-8").splitlines():
        one = json.loads(line)
        if text := one["text"].strip():
            (folder / f"{one['_id']}.txt").write_text(text, "utf-8")


def evaluate(data: Path, collection: Path, embedder: Embedder) -> None:
    queries = [json.loads(line) for line in (data / "queries.jsonl").read_text("utf-8").splitlines()]
    relevant = judgements(data / "qrels.tsv")
    queries = [query for query in queries if relevant[query["_id"]]]
    database = Database(collection / FILE_NAME)
    settings = database.settings()
    assert settings is not None
    vectors = VectorIndex.open(collection, database, settings.dimension)
    rows = database.rows("SELECT c.id, f.title, f.name FROM chunks c JOIN files f ON f.id = c.file_id")
    document_of = {chunk: Path(name).stem for chunk, _, name in rows}
    embedded = embedder.queries([query["text"] for query in queries])
    started = time.perf_counter()
    found = [
        candidates(query["text"], vector, database=database, index=vectors, settings=settings, pool=POOL)
        for query, vector in zip(queries, embedded, strict=True)
    ]
    print(f"{1000 * (time.perf_counter() - started) / len(queries):.1f} ms a query without its embedding")
    for name, ranking in rankings().items():
        scores = [
            ndcg([document_of[chunk] for chunk in ranking(some)], relevant[query["_id"]])
            for query, some in zip(queries, found, strict=True)
        ]
        print(f"{name:<28} nDCG@10 {sum(scores) / len(scores):.4f}")
    database.close()


def rankings() -> dict[str, Ranking]:
    found: dict[str, Ranking] = {}
    for tenths in range(11):
        share = tenths / 10
        found[f"vectors {share:.1f}"] = lambda some, share=share: [
            one.chunk_id for _, one in rank(some, weight=share)
        ]
    return found | {f"reciprocal ranks, k = {k}": lambda some, k=k: reciprocal(some, k) for k in (10, 60)}


def reciprocal(found: Sequence[Candidate], k: int) -> list[int]:
    scores: dict[int, float] = defaultdict(float)
    worded = [one for one in found if one.bm25 > 0]
    for side in (
        sorted(found, key=lambda one: -one.cosine),
        sorted(worded, key=lambda one: -one.bm25),
    ):
        for place, one in enumerate(side, start=1):
            scores[one.chunk_id] += 1 / (k + place)
    return sorted(scores, key=lambda chunk: -scores[chunk])


def judgements(path: Path) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = defaultdict(dict)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            found[row["query-id"]][row["corpus-id"]] = int(row["score"])
    return found


def ndcg(ranked: Sequence[str], relevant: dict[str, int], depth: int = 10) -> float:
    """Linear gains, as BEIR counts; a document counts at its first chunk."""
    gains = [relevant.get(one, 0) for one in dict.fromkeys(ranked)][:depth]
    ideal = sorted(relevant.values(), reverse=True)[:depth]
    return discounted(gains) / discounted(ideal)


def discounted(gains: Sequence[int]) -> float:
    return sum(max(gain, 0) / math.log2(place + 1) for place, gain in enumerate(gains, start=1))


if __name__ == "__main__":
    main()
