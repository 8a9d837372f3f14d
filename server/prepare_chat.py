"""A chat request and the named model or assistant -> messages -> what the engine runs.

Retrieval, then the prompt file, then the model's chat template.
"""

from collections.abc import Sequence

from engine.request import GenerationRequest
from prompts import template
from prompts.message import Message
from prompts.template import Prompt
from rag.collection import Passage
from server import grounding
from server.chat_prompt import Part
from server.errors import BadRequest
from server.grammar import JSON_OBJECT
from server.json_schema import to_grammar
from server.roster import Roster, Target
from server.schema.chat import (
    AssistantMessage,
    ChatRequest,
    Content,
    JSONObjectFormat,
    JSONSchemaFormat,
    UserMessage,
)
from server.settings import NAME
from server.work import Work, choices, sampling, stop_strings


async def chat(roster: Roster, body: ChatRequest) -> Work:
    """Retrieval, prompt file and chat template, in this order."""
    target = roster.get(body.model)
    _check_chat(body)
    messages = _merged(body)
    passages: list[Passage] | None = None
    if file := _prompt(roster, target, body):
        messages, passages = await _prompted(body, file, messages, roster=roster, target=target)
    prompt = await target.chat_prompt(messages)
    request = GenerationRequest(
        prompt=prompt.text if isinstance(prompt, Part) else prompt,
        add_special=not isinstance(prompt, Part) or prompt.add_special,
        parse_special=isinstance(prompt, Part) and prompt.parse_special,
        sampling=sampling(target, body, grammar=_grammar(body)),
        max_tokens=_max_tokens(body, target),
        stop=stop_strings(body),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        ignore_eos=bool(body.ignore_eos),
        cache_salt=body.cache_salt or "",
        replayable=not body.stream,
    )
    sources = None if passages is None else grounding.for_answer(passages)
    return Work(target, choices(request, body.n or 1), sources=sources, n_choices=body.n or 1)


def _max_tokens(body: ChatRequest, target: Target) -> int | None:
    return body.max_completion_tokens or body.max_tokens or target.max_tokens


def _check_chat(body: ChatRequest) -> None:
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        problem = "max_tokens and max_completion_tokens differ: send one"
        raise BadRequest(problem, param="max_completion_tokens")
    if body.top_logprobs and not body.logprobs:
        raise BadRequest("top_logprobs needs `logprobs: true`", param="top_logprobs")


def _text(content: Content) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _merged(body: ChatRequest) -> list[Message]:
    """System messages as one in front (most chat templates know no other place), turns behind it."""
    system, turns = [], []
    for message in body.messages:
        text = _text(message.content)
        if isinstance(message, UserMessage):
            turns.append(Message("user", text))
        elif isinstance(message, AssistantMessage):
            turns.append(Message("assistant", text))
        else:
            system.append(text)
    head = [Message("system", "\n\n".join(system))] if system else []
    return head + turns


def _prompt(roster: Roster, target: Target, body: ChatRequest) -> Prompt | None:
    """The prompt file to use: the request's, the assistant's, or `grounded` when there is a collection."""
    assistant = target.assistant
    collection = body.collection or (assistant.collection if assistant else None)
    if body.prompt is not None:
        if not NAME.fullmatch(body.prompt) or body.prompt.endswith(template.SUFFIX):
            problem = f"{body.prompt!r} is no name of a prompt; known: {', '.join(roster.prompt_names())}"
            raise BadRequest(problem, param="prompt", code="invalid_prompt")
        prompt = roster.prompt(body.prompt)
    elif target.prompt is not None:
        prompt = target.prompt
    elif collection:
        prompt = roster.prompt("grounded")
    else:
        _refuse_without(body, ("prompt_variables", "passages"))
        return None
    if collection and not prompt.uses_sources:
        problem = f"the prompt {prompt.name!r} has no place for the sources of a collection; use `grounded`"
        raise BadRequest(problem, param="prompt", code="invalid_prompt")
    if prompt.uses_sources and not collection:
        problem = f"the prompt {prompt.name!r} answers from sources: name a `collection`"
        raise BadRequest(problem, param="collection", code="missing_required_parameter")
    if not collection:
        _refuse_without(body, ("passages",))
    return prompt


def _refuse_without(body: ChatRequest, names: Sequence[str]) -> None:
    for name in names:
        if getattr(body, name) is not None:
            need = "a `prompt`" if name == "prompt_variables" else "a `collection`"
            raise BadRequest(f"{name} needs {need}", param=name)


async def _prompted(
    body: ChatRequest, prompt: Prompt, messages: Sequence[Message], *, roster: Roster, target: Target
) -> tuple[list[Message], list[Passage] | None]:
    """Messages after the prompt file, and the passages in them; the last user message is the question."""
    system = [message for message in messages if message.role == "system"]
    *history, last = [message for message in messages if message.role != "system"] or [Message("system", "")]
    if last.role != "user":
        problem = "the last message must be the user's: the prompt takes the question from it"
        raise BadRequest(problem, param="messages")
    assistant = target.assistant
    variables = (dict(assistant.prompt_variables) if assistant and not body.prompt else {}) | (
        body.prompt_variables or {}
    )

    def messages_with(passages: Sequence[Passage]) -> list[Message]:
        rendered = prompt.render(
            question=last.content,
            sources=grounding.for_prompt(passages),
            history=history,
            variables=variables,
        )
        return _with_system(rendered, system)

    collection = body.collection or (assistant.collection if assistant else None)
    if collection is None:
        return messages_with(()), None
    k = body.passages or (assistant.passages if assistant else None) or grounding.DEFAULT_PASSAGES
    found = await roster.search(collection, last.content, k=k)

    async def count(passages: Sequence[Passage]) -> int:
        return len(await target.tokens(messages_with(passages)))

    room = grounding.budget(target.engine.info.n_ctx, _max_tokens(body, target))
    kept = await grounding.fitting(found, count, budget=room)
    return messages_with(kept), kept


def _with_system(rendered: Sequence[Message], system: Sequence[Message]) -> list[Message]:
    """The client's system text behind the prompt's own, in one message."""
    if not system:
        return list(rendered)
    own = [message.content for message in rendered if message.role == "system"]
    head = Message("system", "\n\n".join([*own, *(message.content for message in system)]))
    return [head, *(message for message in rendered if message.role != "system")]


def _grammar(body: ChatRequest) -> str | None:
    match body.response_format:
        case JSONObjectFormat():
            return JSON_OBJECT
        case JSONSchemaFormat(json_schema=named):
            return to_grammar(named.schema, place="response_format.json_schema.schema")
        case _:
            return None
