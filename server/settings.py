"""What to serve and how: `lq.toml`, checked strictly, and the changes that the command line makes to it.

Names and numbers only: nothing is opened or resolved here.
"""

import difflib
import ipaddress
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import msgspec
from msgspec import Meta, Struct

from server import key_settings
from server.errors import ServerError
from server.key_settings import Key, Limits
from server.model_settings import Adapter, Model, joined
from server.schema.sampling import Positive, SamplingFields

T = TypeVar("T")

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_EMBEDDER = "all-minilm-l6-v2"
NAME = re.compile(r"\w[\w.:-]{0,99}")


class SettingsError(ServerError):
    """`lq.toml` or the command line asks for something impossible."""


class HTTP(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[server]"""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000  # 0: any free one
    api_key_file: str | None = None
    max_body_mb: Annotated[float, Meta(gt=0, le=1024)] = 10.0  # MiB
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    prompts: str | None = None  # folder of prompt files, found before the shipped ones
    drain_s: Annotated[float, Meta(ge=0, le=600)] = 5.0  # seconds that running requests get at the end
    memory_budget_mb: Annotated[float, Meta(gt=0, le=2**40)] | None = None  # all models; None: 80 % of free
    gpu_memory_budget_mb: Annotated[float, Meta(gt=0, le=2**40)] | None = None  # of the GPU's; None: 90 %


class Assistant(SamplingFields, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[assistants.NAME]: a model with adapters, a prompt, a collection and sampling defaults."""

    model: str
    lora: tuple[str | Adapter, ...] = ()
    adapter: str | None = None  # one of the model's `adapters`
    adapter_scale: Annotated[float, Meta(ge=-100, le=100)] | None = None  # None: the model's for that adapter
    prompt: str | None = None
    prompt_variables: dict[str, str] = msgspec.field(default_factory=dict)
    collection: str | None = None
    passages: Annotated[int, Meta(ge=1, le=50)] | None = None
    max_tokens: Positive | None = None


class Embedder(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[embedder]: what /v1/embeddings answers with; a collection brings its own."""

    model: str = DEFAULT_EMBEDDER  # store name or folder
    max_queue: Annotated[int, Meta(ge=1, le=10_000)] = 64  # jobs that may wait


class Settings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole of lq.toml."""

    server: HTTP = HTTP()
    models: dict[str, Model] = msgspec.field(default_factory=dict)
    assistants: dict[str, Assistant] = msgspec.field(default_factory=dict)
    embedder: Embedder = Embedder()
    keys: dict[str, Key] = msgspec.field(default_factory=dict)
    limits: Limits = Limits()

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.server.host).is_loopback
        except ValueError:
            return self.server.host == "localhost"


def load(path: Path) -> Settings:
    """Settings from a file; relative paths in it are relative to its folder."""
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such configuration file") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path}: is not TOML: {error}") from None
    _refuse_unknown(values, Settings, "", path)
    for section, kind in (("models", Model), ("assistants", Assistant), ("keys", Key)):
        entries = values.get(section)
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            _convert(entry, kind, f"{section}.{name}", path)
    settings = _convert(values, Settings, "", path)
    return _anchored(complete(settings, str(path)), path.parent)


def complete(settings: Settings, where: str) -> Settings:
    """Check names, and add the models that assistants take straight from the store."""
    models = dict(settings.models)
    for name, assistant in settings.assistants.items():
        if name in models:
            raise SettingsError(f"{where}: {name!r} is a model and an assistant; rename one")
        models.setdefault(assistant.model, Model())
        if assistant.adapter_scale is not None and assistant.adapter is None:
            raise SettingsError(f"{where}: assistants.{name}: `adapter_scale` needs an `adapter`")
        there = models[assistant.model].adapters
        if assistant.adapter is not None and assistant.adapter not in there:
            known = ", ".join(there) or "none"
            raise SettingsError(
                f"{where}: assistants.{name}: the model {assistant.model!r} has no adapter "
                f"{assistant.adapter!r} (there are: {known})"
            )
    for name in [*models, *settings.assistants, *settings.keys]:
        if not NAME.fullmatch(name):
            raise SettingsError(f"{where}: {name!r} is no name: use letters, digits, `-`, `_`, `.`, `:`")
    if problem := key_settings.problem(settings.keys):
        raise SettingsError(f"{where}: {problem}")
    return msgspec.structs.replace(settings, models=models)


def with_models(settings: Settings, models: dict[str, Model], **http: Any) -> Settings:
    """The settings with models added and fields of [server] replaced (None keeps what is there).

    A model that the settings have already keeps its options; adapters given for it come on top.
    """
    given = {key: value for key, value in http.items() if value is not None}
    server = with_options(settings.server, given)
    merged = dict(settings.models)
    for name, model in models.items():
        merged[name] = _joined(name, merged[name], model) if name in merged else model
    if not merged:
        merged = {DEFAULT_MODEL: Model()}
    return complete(msgspec.structs.replace(settings, server=server, models=merged), "command line")


def with_options(kept: T, given: dict[str, Any]) -> T:
    """One table with options of the command line, by its fields' names, in place of what it has."""
    try:
        return msgspec.convert(msgspec.to_builtins(kept) | given, type(kept))
    except msgspec.ValidationError as error:
        problem, _, inner = str(error).partition(" - at `$")
        name = inner.strip(".`")
        option = f"--{name.replace('_', '-')}: " if name else ""
        value = _given(given, inner.rstrip("`"), hides_text=False)
        raise SettingsError(f"command line: {option}{problem[:1].lower()}{problem[1:]}{value}") from None


def _joined(name: str, configured: Model, given: Model) -> Model:
    here, there = given.model or name, configured.model or name
    if here != name and Path(here).resolve() != Path(there).resolve():
        raise SettingsError(
            f"command line: {name!r} means {there} in the configuration file and {here} here: "
            "leave one out, or rename the one in the file"
        )
    return joined(configured, given)


def _convert(values: Any, kind: type[T], place: str, path: Path) -> T:
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        problem, _, inner = str(error).partition(" - at `$")
        inner = inner.rstrip("`")
        where = f"{place}{inner}".lstrip(".") or "file"
        given = _given(values, inner, hides_text=where.startswith("keys"))
        raise SettingsError(f"{path}: `{where}`: {problem[:1].lower()}{problem[1:]}{given}") from None


def _given(values: Any, inner: str, *, hides_text: bool) -> str:
    """The value that msgspec's path leads to, as the end of an error; nothing for a table or a list.

    `hides_text` where somebody may have written an API key.
    """
    for name, number in re.findall(r"\.([^.\[]+)|\[(\d+)\]", inner):
        try:
            values = values[name] if name else values[int(number)]
        except (KeyError, IndexError, TypeError):
            return ""
    is_shown = isinstance(values, int | float if hides_text else str | int | float) and "sha256" not in inner
    return f"; it is {values!r:.100}" if is_shown else ""


def _refuse_unknown(values: Any, kind: type, place: str, path: Path) -> None:
    """Name the first unknown key with its nearest known one, descending into known sections."""
    if not isinstance(values, dict):
        return
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in values.items():
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(fields)}"
            raise SettingsError(f"{path}: unknown key `{place}{key}`: {hint}")
        inner = [part for part in (fields[key], *get_args(fields[key])) if _is_struct(part)]
        if inner and isinstance(value, dict):
            nested = value.items() if not _is_struct(fields[key]) else [("", value)]
            for name, entry in nested:
                _refuse_unknown(entry, inner[0], f"{place}{key}.{name}".rstrip(".") + ".", path)


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Struct)


def _anchored(settings: Settings, folder: Path) -> Settings:
    server = msgspec.structs.replace(
        settings.server,
        api_key_file=_anchor(settings.server.api_key_file, folder, always=True),
        prompts=_anchor(settings.server.prompts, folder, always=True),
    )
    models = {
        name: msgspec.structs.replace(
            model,
            model=_anchor(model.model, folder),
            draft_model=_anchor(model.draft_model, folder),
            lora=_anchor_adapters(model.lora, folder),
            adapters=dict(
                zip(model.adapters, _anchor_adapters(tuple(model.adapters.values()), folder), strict=True)
            ),
        )
        for name, model in settings.models.items()
    }
    assistants = {
        name: msgspec.structs.replace(
            assistant,
            prompt=_anchor(assistant.prompt, folder),
            lora=_anchor_adapters(assistant.lora, folder),
        )
        for name, assistant in settings.assistants.items()
    }
    embedder = msgspec.structs.replace(settings.embedder, model=_anchor(settings.embedder.model, folder))
    return msgspec.structs.replace(
        settings, server=server, models=models, assistants=assistants, embedder=embedder
    )


def _anchor(text: str | None, folder: Path, *, always: bool = False) -> str | None:
    """A path made relative to the file's folder; a store name (no slash, no such file) stays as it is."""
    if text is None:
        return None
    path = folder / Path(text).expanduser()
    return str(path) if always or "/" in text or path.exists() else text


def _anchor_adapters(adapters: tuple[str | Adapter, ...], folder: Path) -> tuple[Adapter, ...]:
    entries = [Adapter(path=entry) if isinstance(entry, str) else entry for entry in adapters]
    return tuple(Adapter(path=_anchor(entry.path, folder) or "", scale=entry.scale) for entry in entries)
