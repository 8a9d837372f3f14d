"""Serving under load: lq against llama-server, or against itself with other options.

    python -m benchmarks.serving --scenarios shared-prefix,rag --rounds 5

What is measured, from the outside in:
- scenarios.py   what the clients do: who arrives when, asks what, and leaves when; each a pure function
- texts.py       prompts of a stated length in tokens of the model under test, the same for both servers
- client.py      one streamed request over HTTP/1.1 and everything that is noted of it
- load.py        all clients of a scenario at once, in one asyncio process
- play.py        one round, and what is measured beside it: the same without some, or each request alone
- footprint.py   memory while a round lasts; alone.py: texts against those written alone; keys.py: API keys
- figures.py     one round -> figures (tokens/s, time to first token, longest gap, ...)
- neighbours.py, promises.py   figures of what clients do to one another; of texts and memory
- progress.py    tokens that had come by a moment
- compare.py     rounds -> medians, quartiles, ratios of paired rounds
- contest.py     both servers side by side, the rounds alternating between them
- report.py, plots.py   markdown, JSON, PNG and SVG

Both servers get the same file, threads, slots and KV cells, and the same requests at the same times. The load
generator shares the machine with them, so it does as little as it can for each chunk.
"""
