"""A request made ready for the engine, and the fields that both kinds of completion turn into sampling."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from engine.bounds import check_length
from engine.request import GenerationRequest, Sampling
from server.errors import BadRequest
from server.limits import Policy
from server.roster import Target
from server.schema.sampling import GenerationFields
from server.schema.usage import Source

SAMPLING_NAMES = tuple(item.name for item in fields(Sampling))


@dataclass(frozen=True, slots=True)
class Work:
    """Everything that is known before the first token: one engine request a choice."""

    target: Target
    requests: tuple[GenerationRequest, ...]
    prefixes: tuple[str, ...] = ()  # text before each choice (echo)
    sources: list[Source] | None = None  # None: not grounded
    prompt_field: str = "messages"  # where the request holds its prompt
    n_choices: int = 1  # requests in a row that continue the same prompt

    def check(self) -> None:
        """Raise BadRequest for more sequences than the engine takes even when nothing else runs."""
        config = self.target.plan.config
        room = config.n_parallel + config.max_queue
        if len(self.requests) > room:
            raise BadRequest(
                f"n: prompts times choices make {len(self.requests)} sequences and the server takes {room} "
                "at once: send fewer, or raise `max_queue` of the model in lq.toml",
                param="n",
            )

    async def prompt_sizes(self, *, count_texts: bool) -> tuple[int, ...]:
        """Tokens of each prompt; of a text that is not counted here 0, until the engine tells at the end."""
        return tuple([await self._size(each, count_texts) for each in self.requests[:: self.n_choices]])

    def longest_answer(self, sizes: Sequence[int]) -> int:
        """Tokens of all choices at most, as far as `max_tokens` says so; `sizes` are those of the prompts."""
        n_ctx = self.target.engine.info.n_ctx
        each = [
            min(request.max_tokens or 0, max(0, n_ctx - sizes[number // self.n_choices]))
            for number, request in enumerate(self.requests)
        ]
        return sum(each)

    def on_behalf_of(self, policy: Policy) -> tuple[GenerationRequest, ...]:
        """The requests with the key's place in the scheduler and its part of the cache."""
        return tuple(
            replace(request, tenant=policy.tenant, cache_salt=policy.salt(request.cache_salt))
            for request in self.requests
        )

    async def _size(self, request: GenerationRequest, count_texts: bool) -> int:
        if not isinstance(request.prompt, str):
            return len(request.prompt)
        if not count_texts:
            return 0
        check_length(request.prompt, self.target.engine.info.n_ctx)
        tokens = await self.target.engine.tokenize(
            request.prompt, add_special=request.add_special, parse_special=request.parse_special
        )
        return len(tokens)


def sampling(target: Target, body: GenerationFields, *, grammar: str | None) -> Sampling:
    """The request's own fields over the assistant's defaults over the engine's."""
    values = {}
    for name in SAMPLING_NAMES:
        for origin in (body, target.assistant):
            if (value := getattr(origin, name, None)) is not None:
                values[name] = value
                break
    biases = body.logit_bias or {}
    for token in biases:
        if not 0 <= token < target.engine.info.n_vocab:
            problem = (
                f"logit_bias: {token} is not a token of the model, which has {target.engine.info.n_vocab}"
            )
            raise BadRequest(problem, param="logit_bias")
    values |= {"logit_bias": tuple(biases.items()), "grammar": grammar}
    return Sampling(**values)


def choices(request: GenerationRequest, n: int) -> tuple[GenerationRequest, ...]:
    """The same request n times; a given seed counts up, so that the choices differ and stay repeatable."""
    seed = request.sampling.seed
    if seed is None or n == 1:
        return (request,) * n
    seeds = [(seed + number) % 2**63 for number in range(n)]
    return tuple(replace(request, sampling=replace(request.sampling, seed=one)) for one in seeds)


def stop_strings(body: GenerationFields) -> tuple[str, ...]:
    """`stop` as a tuple."""
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
