"""GET /v1/models: what can be asked, by name."""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType


class Adapter(msgspec.Struct, kw_only=True):
    """A LoRA adapter beside the model; its scale holds where a request names no `adapter_scale`."""

    name: str
    scale: float


class Model(msgspec.Struct, kw_only=True):
    """OpenAI's model object; the rest says what the model is and how much it reads."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["lq"] = "lq"
    kind: Literal["chat", "assistant", "embedding", "rerank"]
    n_ctx: int | UnsetType = UNSET  # tokens of one request, answer included
    max_model_len: int | UnsetType = UNSET  # the same, as vLLM calls it
    n_ctx_train: int | UnsetType = UNSET
    n_params: int | UnsetType = UNSET
    size_bytes: int | UnsetType = UNSET
    architecture: str | UnsetType = UNSET
    description: str | UnsetType = UNSET
    base: str | UnsetType = UNSET  # of an assistant: the model behind it
    adapters: list[Adapter] | UnsetType = UNSET  # that a request may name
    adapter: Adapter | UnsetType = UNSET  # of an assistant: used unless a request names another, or none
    prompt: str | UnsetType = UNSET
    collection: str | UnsetType = UNSET


class ModelList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Model]
