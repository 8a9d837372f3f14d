"""POST /v1/completions."""

from litestar import Request, post
from litestar.response.base import ASGIResponse

from server import answer
from server.adapters import adapted
from server.holding import Holding
from server.prepare_completion import completion
from server.routes.completing import complete
from server.schema.completion import Completion, CompletionRequest, TextChoice
from server.schema.usage import Usage
from server.stream import TextFrames
from server.work import Work


@post("/v1/completions", status_code=200, tags=["completions"])
async def completions(request: Request) -> ASGIResponse:
    """Continue one or several texts as they are."""
    async with Holding() as holding:
        prepare = holding.before(adapted(completion))
        response = await complete(
            request, CompletionRequest, prepare, prefix="cmpl", frames=TextFrames, whole=whole
        )
        return holding.until_sent(response)


def whole(envelope: answer.Envelope, work: Work, choices: list[answer.Collected], usage: Usage) -> Completion:
    """The answer of a request that does not stream."""
    return Completion(
        id=envelope.id,
        created=envelope.created,
        model=envelope.model,
        system_fingerprint=envelope.fingerprint,
        choices=[_choice(index, each, work) for index, each in enumerate(choices)],
        usage=usage,
    )


def _choice(index: int, collected: answer.Collected, work: Work) -> TextChoice:
    prefix = work.prefixes[index]
    wants_logprobs = work.requests[index].logprobs is not None
    return TextChoice(
        index=index,
        text=prefix + collected.content,
        logprobs=answer.text_logprobs(collected.logprobs, offset=len(prefix)) if wants_logprobs else None,
        finish_reason=answer.finish(collected.done),
    )
