"""A plain completion request -> what the engine runs: texts or token ids, continued as they are."""

from engine.request import GenerationRequest
from server.errors import BadRequest
from server.roster import Roster, Target
from server.schema.completion import MAX_PROMPTS, CompletionRequest
from server.work import Work, choices, sampling, stop_strings

#: What OpenAI's completions write when max_tokens is left out.
COMPLETION_TOKENS = 16


async def completion(roster: Roster, body: CompletionRequest) -> Work:
    """Prompts are continued as they are, special tokens read; no chat template, no prompt file."""
    target = roster.get(body.model)
    if target.assistant is not None:
        problem = f"{body.model!r} is an assistant and answers chats: use /v1/chat/completions"
        raise BadRequest(problem, param="model", code="not_a_completion_model")
    if body.echo and body.logprobs is not None:
        raise BadRequest("echo: the prompt's own logprobs are not computed; send one of both", param="echo")
    prompts = _prompts(body, target)
    echoes = [await _echo(target, prompt) if body.echo else "" for prompt in prompts]
    requests: list[GenerationRequest] = []
    for prompt in prompts:
        request = GenerationRequest(
            prompt=prompt,
            sampling=sampling(target, body, grammar=None),
            max_tokens=body.max_tokens or COMPLETION_TOKENS,
            stop=stop_strings(body),
            logprobs=body.logprobs,
            ignore_eos=bool(body.ignore_eos),
            parse_special=True,
            cache_salt=body.cache_salt or "",
            replayable=not body.stream,
        )
        requests += choices(request, body.n or 1)
    prefixes = [echo for echo in echoes for _ in range(body.n or 1)]
    return Work(
        target,
        tuple(requests),
        prefixes=tuple(prefixes),
        prompt_field="prompt",
        n_choices=body.n or 1,
    )


def _prompts(body: CompletionRequest, target: Target) -> list[str | tuple[int, ...]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        prompts: list[str | tuple[int, ...]] = [prompt]
    elif prompt and all(isinstance(item, int) for item in prompt):
        prompts = [tuple(item for item in prompt if isinstance(item, int))]
    else:
        prompts = [
            tuple(item) if isinstance(item, list) else item for item in prompt if not isinstance(item, int)
        ]
        if len(prompts) != len(prompt):
            raise BadRequest("prompt: mixes token ids with texts; send either", param="prompt")
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise BadRequest(f"prompt: {len(prompts)} prompts; send 1 to {MAX_PROMPTS}", param="prompt")
    for one in prompts:
        _check_prompt(one, target)
    return prompts


def _check_prompt(prompt: str | tuple[int, ...], target: Target) -> None:
    n_vocab = target.engine.info.n_vocab
    if isinstance(prompt, tuple) and max(prompt) >= n_vocab:
        problem = f"prompt: {max(prompt)} is not a token of the model, which has {n_vocab}"
        raise BadRequest(problem, param="prompt")
    if prompt == "" and not target.engine.info.add_bos:
        raise BadRequest("prompt: is empty, and the model has no token to begin with", param="prompt")


async def _echo(target: Target, prompt: str | tuple[int, ...]) -> str:
    return prompt if isinstance(prompt, str) else await target.engine.detokenize(prompt)
