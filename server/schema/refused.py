"""Fields of the OpenAI API that this server does not serve: declared, so that each is refused with a reason.

`null` is accepted, as some clients send every field they know. Nothing that would change an answer is ever
accepted and ignored.
"""

from server.schema.sampling import GenerationFields

#: field -> what to do instead; the sentence goes to the client.
REASONS = {
    "tools": "tool calls are not supported; describe the tools in the messages, or leave it out",
    "tool_choice": "tool calls are not supported; leave it out",
    "parallel_tool_calls": "tool calls are not supported; leave it out",
    "functions": "function calls are not supported; leave it out",
    "function_call": "function calls are not supported; leave it out",
    "tool_calls": "tool calls are not supported; put the result into a user message",
    "tool_call_id": "tool calls are not supported; put the result into a user message",
    "audio": "this server reads and writes text alone; leave it out",
    "modalities": 'this server reads and writes text alone; leave it out or send ["text"]',
    "moderation": "there is no moderation model here; leave it out",
    "prediction": "predicted outputs are not supported; leave it out",
    "reasoning_effort": "the models here have no reasoning effort to set; leave it out",
    "verbosity": "ask for a short or long answer in the messages; leave it out",
    "web_search_options": "there is no web search; name a `collection` to search your documents",
    "prompt_cache_retention": "cached prompts live as long as there is room; leave it out",
    "prompt_cache_options": "cached prompts live as long as there is room; leave it out",
    "name": "participants' names do not reach the model; write the name into the content",
    "suffix": "text cannot be inserted before a suffix; leave it out",
    "best_of": "use `n` and choose yourself; leave it out or send 1",
    "dimensions": "the embedder has one width; leave it out",
    "store": "nothing is stored here; leave it out or send false",
    "service_tier": 'there is one service tier; leave it out or send "auto"',
    "include_obfuscation": "streams are not padded; leave it out or send false",
}


class RefusedChatFields(GenerationFields, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Fields of every completion, and those of OpenAI's chat completions that can only be null here."""

    tools: None = None
    tool_choice: None = None
    parallel_tool_calls: None = None
    functions: None = None
    function_call: None = None
    audio: None = None
    moderation: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None
    prompt_cache_retention: None = None
    prompt_cache_options: None = None
