"""Which LoRA adapters beside the model a request uses: its own choice, or the assistant's."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from server.errors import BadRequest
from server.roster import Roster, Target
from server.schema.sampling import GenerationFields
from server.work import Work

Prepare = Callable[[Roster, Any], Awaitable[Work]]


def adapted(prepare: Prepare) -> Prepare:
    """The same preparation, whose requests name their adapter."""

    async def prepared(roster: Roster, body: Any) -> Work:
        adapters = chosen(roster.get(body.model), body)
        work = await prepare(roster, body)
        if not adapters:
            return work
        return replace(work, requests=tuple(replace(each, adapters=adapters) for each in work.requests))

    return prepared


def chosen(target: Target, body: GenerationFields) -> tuple[tuple[str, float], ...]:
    """The adapter and its scale; none without a choice, or where the choice is the empty string."""
    assistant = target.assistant
    name = body.adapter if body.adapter is not None else assistant and assistant.adapter
    if not name:
        if body.adapter_scale is not None:
            raise BadRequest("adapter_scale needs an `adapter`", param="adapter_scale")
        return ()
    scales = target.adapter_scales
    if name not in scales:
        known = ", ".join(scales) or "none; [models.NAME] adapters in lq.toml loads some"
        raise BadRequest(f"adapter: {name[:100]!r} is not loaded; there are: {known}", param="adapter")
    return ((name, scales[name] if body.adapter_scale is None else body.adapter_scale),)
