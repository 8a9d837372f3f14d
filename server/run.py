"""Serve until told to stop: the port first, then the engines, then HTTP, and everything down again in order.

The only file that knows uvicorn, sockets and signals.
"""

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import uvicorn

from engine.request import EngineInfo
from models.placement import Bytes
from models.store import Store
from server.app import create_app
from server.auth import read_keys
from server.engines import Plan
from server.errors import gigabytes
from server.fleet import Standing
from server.service import Service, opened
from server.settings import Settings, SettingsError

#: What models that write no text read.
TEXTS = {"embedding": "text to embed", "rerank": "text to rank, query included"}
SIGNALS = (signal.SIGINT, signal.SIGTERM)

Ready = Callable[[str, Service], None]


class PortTaken(SettingsError):
    def __init__(self, host: str, port: int) -> None:
        super().__init__(f"port {port} of {host} is in use: stop what uses it, or choose another with --port")


def serve(settings: Settings, *, store: Store | None = None, ready: Ready | None = None) -> None:
    """Serve until SIGINT (raises KeyboardInterrupt once everything is down) or SIGTERM (returns).

    `ready` is called once with the URL and the service, when requests are answered.
    """
    read_keys(settings)  # before anything is loaded
    _log_to_stderr()
    with contextlib.closing(_listen(settings.server.host, settings.server.port)) as listener:
        received = asyncio.run(_serve(settings, listener, store, ready or announce))
    if signal.SIGINT in received:
        raise KeyboardInterrupt


def announce(url: str, service: Service) -> None:
    """What each model got of the machine, what the operator should know, where to ask and how to stop."""
    roster = service.roster
    for name, standing in roster.standings().items():
        print(share(roster.plans[name], standing, roster.fleet.budget), flush=True)
    models = roster.models()
    names = ", ".join(model.id for model in models)
    for model in models:
        if model.n_ctx and model.n_ctx_train and model.n_ctx > model.n_ctx_train:
            warning = (
                f"warning: {model.id} was trained on {model.n_ctx_train} tokens; with n_ctx {model.n_ctx} "
                f"what it writes beyond them may be nonsense (--n-ctx {model.n_ctx_train} keeps within)"
            )
            print(warning, file=sys.stderr, flush=True)
    key = ", API key required" if service.keys.required else ""
    print(f"lq serves {names} at {url}/v1 (API: {url}/docs{key}); Ctrl-C stops", flush=True)


def share(plan: Plan, standing: Standing, budget: Bytes) -> str:
    """What a model got, chosen or given, in one line."""
    config, trained = plan.config, plan.facts.n_ctx_train
    shortened = f" (of {trained})" if trained and config.n_ctx < trained else ""
    what = TEXTS.get(config.kind, "request")
    parts = [f"{config.n_ctx} tokens a {what}{shortened}", f"{config.n_parallel} at once"]
    if config.kv_cells:
        parts.append(f"{config.kv_cells} tokens together")
    info = standing.engine.info if standing.engine else None
    if config.kind == "text":
        parts.append(cells(plan))
    parts += [layers(plan, info)] if layers(plan, info) else []
    if info and info.n_gpu_layers < max(1, info.n_layers):
        parts.append(counted(info.n_threads, "thread"))
        if info.slow_attention:
            parts.append(f"llama.cpp's own attention ({info.slow_attention})")
    parts += memory(plan.footprint.place, budget)
    if not info:
        parts.append("loaded on first use")
    if standing.member.keep_alive_s is not None:
        parts.append(f"unloaded after {standing.member.keep_alive_s:g} s without requests")
    return f"{plan.name}: {', '.join(parts)}"


def cells(plan: Plan) -> str:
    """The type of keys and values, and why it is that one where it was chosen."""
    k, v = plan.config.kv_type_k, plan.config.kv_type_v
    types = f"{k} cells" if k == v else f"keys {k}, values {v}"
    return f"{types} ({plan.why_cells})" if plan.why_cells else types


def layers(plan: Plan, info: EngineInfo | None) -> str:
    """How many layers are on the GPU, or will be; "" without one."""
    if info:
        return f"{info.n_gpu_layers} of {info.n_layers} layers on {info.gpu}" if info.gpu else ""
    count = min(plan.config.n_gpu_layers or 0, plan.n_layers) if plan.footprint.device_bytes else 0
    return f"{count} of {plan.n_layers} layers on the GPU" if count else ""


def memory(taken: Bytes, budget: Bytes) -> list[str]:
    """What it takes of each memory."""
    parts = [f"{gigabytes(taken.host)} of {gigabytes(budget.host)}"]
    if budget.device:
        parts.append(f"{gigabytes(taken.device)} of {gigabytes(budget.device)} on the GPU")
    return parts


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class _Server(uvicorn.Server):
    """Leaves signals to `_serve`, and says when it answers."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()


async def _serve(
    settings: Settings, listener: socket.socket, store: Store | None, ready: Ready
) -> list[signal.Signals]:
    """The signals that ended it."""
    received: list[signal.Signals] = []
    running = asyncio.current_task()
    server: _Server | None = None

    def stop(number: signal.Signals) -> None:
        received.append(number)
        if server is None:
            assert running is not None  # this is a coroutine
            running.cancel()  # engines are still being loaded
        elif server.should_exit:
            server.force_exit = True
        else:
            # Streams that outlive the drain are cut; uvicorn would log a traceback for each.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            server.should_exit = True

    _on_signals(stop)
    try:
        async with opened(settings, store=store) as service:
            config = uvicorn.Config(
                create_app(service),
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=int(settings.server.drain_s),
            )
            server = _Server(config, lambda: ready(_url(listener), service))
            await server.serve(sockets=[listener])
    except asyncio.CancelledError:
        if not received:
            raise
    return received


def _on_signals(stop: Callable[[signal.Signals], None]) -> None:
    if threading.current_thread() is threading.main_thread():
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, stop, number)


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket; taken before the models are loaded, so that a taken port is said at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise SettingsError(f"host {host!r} is no address of this machine: {error.strerror}") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(host, port) from None
        raise SettingsError(f"cannot listen on {host} port {port}: {error.strerror}") from None
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}"


def _log_to_stderr() -> None:
    """One line a request: id, method, route, status, seconds, name of the key. Never what was asked."""
    logger = logging.getLogger("lq")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
