"""POST /v1/chat/completions."""

from litestar import Request, post
from litestar.response.base import ASGIResponse

from server import answer
from server.adapters import adapted
from server.holding import Holding
from server.prepare_chat import chat
from server.routes.completing import complete
from server.schema.chat import AnswerMessage, ChatCompletion, ChatRequest, Choice
from server.schema.usage import Usage
from server.stream import ChatFrames
from server.work import Work


@post("/v1/chat/completions", status_code=200, tags=["chat"])
async def chat_completions(request: Request) -> ASGIResponse:
    """Answer a conversation, with passages of a collection when one is named."""
    async with Holding() as holding:
        prepare = holding.before(adapted(chat))
        response = await complete(
            request, ChatRequest, prepare, prefix="chatcmpl", frames=ChatFrames, whole=whole
        )
        return holding.until_sent(response)


def whole(
    envelope: answer.Envelope, work: Work, choices: list[answer.Collected], usage: Usage
) -> ChatCompletion:
    """The answer of a request that does not stream."""
    return ChatCompletion(
        id=envelope.id,
        created=envelope.created,
        model=envelope.model,
        system_fingerprint=envelope.fingerprint,
        choices=[_choice(index, each, work) for index, each in enumerate(choices)],
        usage=usage,
    )


def _choice(index: int, collected: answer.Collected, work: Work) -> Choice:
    message = AnswerMessage(content=collected.content)
    if work.sources is not None:
        message.sources = work.sources
    wants_logprobs = work.requests[index].logprobs is not None
    return Choice(
        index=index,
        message=message,
        logprobs=answer.chat_logprobs(collected.logprobs) if wants_logprobs else None,
        finish_reason=answer.finish(collected.done),
    )
