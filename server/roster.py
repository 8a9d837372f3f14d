"""The names that a client may ask for, and what stands behind each."""

import copy
import difflib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from msgspec import UNSET

from engine.request import Kind, ModelLoadFailed, Tenant
from prompts import template
from prompts.message import Message
from prompts.template import Prompt
from rag.collection import Passage
from server import chat_prompt
from server.engines import Engine, Plan
from server.errors import DOES, ModelNotLoaded, UnknownModel, WrongKind
from server.fleet import Fleet, Standing
from server.grounding import Retriever
from server.schema.model import Adapter, Model
from server.settings import Assistant, Settings, SettingsError


@dataclass(frozen=True, slots=True)
class Target:
    """A model, or an assistant on top of one."""

    name: str
    fleet: Fleet
    plan: Plan
    assistant: Assistant | None = None
    prompt: Prompt | None = None

    @property
    def engine(self) -> Engine:
        """The engine, which is there for as long as a lease of it is held (see `Roster.lease`)."""
        return self.fleet.engine(self.plan.config)

    @property
    def max_tokens(self) -> int | None:
        return self.assistant.max_tokens if self.assistant else None

    @property
    def adapter_scales(self) -> dict[str, float]:
        """The adapters that a request may name, and how strongly each counts if the request does not say."""
        scales = dict(self.plan.adapter_scales)
        own = self.assistant
        if own is not None and own.adapter is not None and own.adapter_scale is not None:
            scales[own.adapter] = own.adapter_scale
        return scales

    async def chat_prompt(self, messages: Sequence[Message]) -> chat_prompt.Part | tuple[int, ...]:
        """The chat prompt of the messages, as the engine takes it."""
        return await chat_prompt.prompt(self.engine, messages, model=self.name, control=self.plan.control)

    async def tokens(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The chat prompt of the messages as token ids."""
        return await chat_prompt.tokens(self.engine, messages, model=self.name, control=self.plan.control)


class Roster:
    """Models and assistants by name, the embedder's name, prompts and collections.

    `embedder` is None when the settings' one is not in the store.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        plans: Mapping[str, Plan],
        fleet: Fleet,
        retriever: Retriever,
        embedder: str | None,
    ) -> None:
        self.settings = settings
        self.tenant = Tenant()
        self._embedder = embedder
        self.retriever = retriever
        self.plans = plans
        self.fleet = fleet
        self._started = int(time.time())
        folder = settings.server.prompts
        self._prompt_folder = Path(folder) if folder else None
        self._targets = {name: self._target(name, plan) for name, plan in plans.items()}

    def on_behalf_of(self, tenant: Tenant) -> "Roster":
        """The same roster, whose leases and searches are this tenant's."""
        own = copy.copy(self)
        own.tenant = tenant
        return own

    async def search(self, collection: str, question: str, *, k: int) -> list[Passage]:
        """The best passages of a collection; raises what `Retriever.search` does."""
        return await self.retriever.search(collection, question, k=k, tenant=self.tenant)

    def get(self, name: str, *, kind: Kind = "text") -> Target:
        """The model or assistant; UnknownModel lists what there is, WrongKind says what the name is for."""
        target = self._targets.get(name)
        if target is not None and target.plan.config.kind == kind:
            return target
        if target is not None:
            raise WrongKind(name, target.plan.config.kind)
        if name in self._embedder_names():
            raise WrongKind(name, "embedding")
        fitting = [each for each, found in self._targets.items() if found.plan.config.kind == kind]
        close = difflib.get_close_matches(name, fitting, n=1)
        there = f"there are: {', '.join(fitting)}" if fitting else f"none here {DOES[kind]}"
        raise UnknownModel(name, f"did you mean {close[0]!r}?" if close else there)

    def is_embedding(self, name: str) -> bool:
        """Whether a name is that of an embedding model with an engine."""
        return name in self._targets and self._targets[name].plan.config.kind == "embedding"

    @asynccontextmanager
    async def lease(self, name: str, *, kind: Kind = "text") -> AsyncIterator[Target]:
        """The model or assistant with its engine, which is started if need be and stays until the end.

        Raises UnknownModel, WrongKind, ModelNotLoaded, or what `Fleet.lease` does while it waits.
        """
        target = self.get(name, kind=kind)
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(self.fleet.lease(target.plan.config, self.tenant))
            except (ModelLoadFailed, OSError) as error:
                folder = f"{target.plan.config.model_path.parent}/"
                raise ModelNotLoaded(name, str(error).replace(folder, "")) from error
            yield target

    def standings(self) -> dict[str, Standing]:
        """How each engine is doing, by the name of its first model."""
        distinct = {plan.name: plan.config for plan in self.plans.values()}
        return {standing.member.name: standing for standing in map(self.fleet.standing, distinct.values())}

    def names(self, standing: Standing) -> list[str]:
        """The models and assistants that an engine answers for."""
        return [name for name, plan in self.plans.items() if plan.config == standing.member.config]

    def adapter_scales(self, name: str) -> dict[str, float]:
        """Those of a model or assistant; see Target."""
        return self._targets[name].adapter_scales

    def embedder(self, name: str) -> str:
        """The embedder that a name means, as the settings call it."""
        long, short = self._embedder_names()
        own = [each for each in self._targets if self.is_embedding(each)]
        there = f"embedding models here: {', '.join([*own, short] if self._embedder else own)}"
        if name in self._targets:
            raise WrongKind(name, self._targets[name].plan.config.kind, there)
        if self._embedder is None:
            fetch = f"`lq pull {short}` fetches one, then start the server again"
            raise UnknownModel(name, there if own else f"no embedder is here: {fetch}")
        if name not in (long, short):
            raise UnknownModel(name, there)
        return self._embedder

    def _embedder_names(self) -> tuple[str, str]:
        """Both names of the embedder: the settings', and without a folder in front."""
        name = self.settings.embedder.model
        return name, Path(name).name

    def prompt(self, name: str) -> Prompt:
        return template.load(name, folder=self._prompt_folder)

    def prompt_names(self) -> list[str]:
        return template.names(folder=self._prompt_folder)

    def models(self) -> list[Model]:
        """Everything that has a name, the embedder last."""
        found = [self._describe(target) for target in self._targets.values()]
        if self._embedder is not None:
            found.append(Model(id=Path(self._embedder).name, created=self._started, kind="embedding"))
        return found

    def _target(self, name: str, plan: Plan) -> Target:
        assistant = self.settings.assistants.get(name)
        if assistant is None:
            return Target(name, self.fleet, plan)
        if plan.config.kind != "text":
            raise SettingsError(f"assistants.{name}: its model {assistant.model!r} {DOES[plan.config.kind]}")
        wanted = assistant.prompt or ("grounded" if assistant.collection else None)
        prompt = self.prompt(wanted) if wanted else None
        if prompt and prompt.uses_sources != bool(assistant.collection):
            need = (
                "needs a `collection`" if prompt.uses_sources else "has no place for a collection's sources"
            )
            raise SettingsError(f"assistants.{name}: the prompt {prompt.name!r} {need}")
        if assistant.prompt_variables and not prompt:
            raise SettingsError(f"assistants.{name}: `prompt_variables` needs a `prompt`")
        if prompt:
            prompt.render(question="?", variables=assistant.prompt_variables)
        return Target(name, self.fleet, plan, assistant, prompt)

    def _describe(self, target: Target) -> Model:
        config, facts = target.plan.config, target.plan.facts
        model = Model(
            id=target.name,
            created=self._started,
            kind="chat" if config.kind == "text" else config.kind,
            n_ctx=config.n_ctx,
            max_model_len=config.n_ctx,
            n_ctx_train=UNSET if facts.n_ctx_train is None else facts.n_ctx_train,
            n_params=facts.n_params,
            size_bytes=facts.size_bytes,
            architecture=facts.architecture,
            description=facts.description,
        )
        scales = target.adapter_scales
        if scales:
            model.adapters = [Adapter(name=name, scale=scale) for name, scale in scales.items()]
        if target.assistant is not None:
            model.kind = "assistant"
            if (adapter := target.assistant.adapter) is not None:
                model.adapter = Adapter(name=adapter, scale=scales[adapter])
            model.base = target.assistant.model
            if target.prompt:
                model.prompt = target.prompt.name
            if target.assistant.collection:
                model.collection = target.assistant.collection
        return model
