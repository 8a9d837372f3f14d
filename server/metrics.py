"""Prometheus figures of the server; each application has a registry of its own."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from engine.request import Done
from models.placement import Bytes
from server.engine_metrics import EngineFigures
from server.limits import Usage
from server.snapshots import Told

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counts requests and tokens; the engines' own figures are read when somebody asks."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "lq_http_requests", "Requests answered.", ["method", "route", "status"], registry=registry
        )
        self.tokens = Counter(
            "lq_tokens", "Tokens by kind: prompt, cached (of prompt), completion.", ["model", "kind"],
            registry=registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "lq_time_to_first_token_seconds", "From the request to its first token.", ["model"],
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.duration = Histogram(
            "lq_request_duration_seconds", "From the request to the last byte.", ["route"],
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.open_requests = Gauge("lq_http_requests_open", "Requests being answered.", registry=registry)
        self.embedding_jobs = Gauge(
            "lq_embedding_jobs", "Embedding jobs, waiting ones too.", registry=registry
        )
        self.keys = KeyFigures(registry)
        self._engines = EngineFigures()
        registry.register(self._engines)

    def count(self, model: str, done: Done) -> None:
        """Add one finished sequence."""
        self.tokens.labels(model, "prompt").inc(done.n_prompt_tokens)
        self.tokens.labels(model, "cached").inc(done.n_cached_tokens)
        self.tokens.labels(model, "completion").inc(done.n_completion_tokens)

    def read(self, model: str, n_tokens: int) -> None:
        """Add what an embedding or reranking model has read for one request."""
        self.tokens.labels(model, "prompt").inc(n_tokens)

    def text(self, engines: Sequence[Told], *, budget: Bytes, held: Bytes) -> bytes:
        """The exposition format."""
        figures = self._engines
        figures.told, figures.budget, figures.held = engines, budget, held
        return generate_latest(self.registry)


class KeyFigures:
    """What each API key used, by its name in the configuration; never the key or its digest."""

    NOBODY = "-"  # where no key is needed, or the one given is wrong

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "lq_key_requests", "Completions and embeddings asked for, refused ones too.", ["key"],
            registry=registry,
        )  # fmt: skip
        self._refused = Counter(
            "lq_key_refused", "Requests that were refused or given up, by error code.", ["key", "reason"],
            registry=registry,
        )  # fmt: skip
        self._tokens = Counter(
            "lq_key_tokens", "Tokens by kind, of abandoned requests too: prompt, cached, completion.",
            ["key", "kind"], registry=registry,
        )  # fmt: skip
        self._open = Gauge("lq_key_requests_open", "Requests being answered.", ["key"], registry=registry)

    def know(self, key: str) -> None:
        """Show a key from the start, before it asks."""
        name = key or self.NOBODY
        self._requests.labels(name)
        self._open.labels(name)
        for kind in ("prompt", "cached", "completion"):
            self._tokens.labels(name, kind)

    def asked(self, key: str) -> None:
        self._requests.labels(key or self.NOBODY).inc()

    def entered(self, key: str) -> None:
        self._open.labels(key or self.NOBODY).inc()

    def refused(self, key: str, reason: str) -> None:
        self._refused.labels(key or self.NOBODY, reason).inc()

    def left(self, key: str, usage: Usage) -> None:
        name = key or self.NOBODY
        self._open.labels(name).dec()
        for kind in ("prompt", "cached", "completion"):
            self._tokens.labels(name, kind).inc(getattr(usage, kind))
