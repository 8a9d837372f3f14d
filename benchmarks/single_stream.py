"""Decode speed of one stream: lq against llama-server.

Same commit of llama.cpp, same GGUF, same threads, the same OpenAI client code. Both servers run for the whole
time and the requests alternate, so that a drift of the machine meets both. The rate is tokens after the first
divided by the time after the first, as a client sees it. Each round gives a ratio of two runs that followed
one another, so that a machine that is faster in one minute than in the next does not sway it; their median
and quartiles are printed. Short rounds and many of them serve a machine that others use too.

usage: python -m benchmarks.single_stream [MODEL.gguf] [--rounds 41] [--tokens 96] [--threads N] [--json FILE]
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import httpx
import psutil

from benchmarks import servers

PROMPT = "Write a long story about a lighthouse keeper and the sea. Tell every detail of one winter's day."


def measure(url: str, tokens: int) -> dict[str, float]:
    """One streamed chat completion: seconds to the first token and tokens/s after it, as a client sees."""
    name = httpx.get(f"{url}/models").json()["data"][0]["id"]
    body = {
        "model": name,
        "ignore_eos": True,
        "messages": [{"role": "user", "content": PROMPT}],
        "temperature": 0,
    }
    body |= {"max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}}
    stamps: list[float] = []
    usage: dict[str, int] = {}
    started = time.perf_counter()
    with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=300) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            usage = chunk.get("usage") or usage
            if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                stamps.append(time.perf_counter())
    rate = (usage["completion_tokens"] - 1) / (stamps[-1] - stamps[0])
    return {"ttft_s": stamps[0] - started, "tokens_per_s": rate, "tokens": usage["completion_tokens"]}


def compare(model: Path, *, rounds: int, tokens: int, threads: int) -> dict[str, list[dict[str, float]]]:
    """Measurements by server name, alternating; one round before them warms both up."""
    results: dict[str, list[dict[str, float]]] = {"lq": [], "llama-server": []}
    with tempfile.TemporaryDirectory() as folder:
        ports = {name: servers.free_port() for name in results}
        ours = servers.lq_command(model, port=ports["lq"], threads=threads, n_ctx=4096, n_parallel=4)
        theirs = servers.llama_server_command(
            model, port=ports["llama-server"], threads=threads, n_ctx=4096, n_parallel=4
        )
        with (
            servers.running(ours, ports["lq"], Path(folder, "lq.log")) as lq,
            servers.running(theirs, ports["llama-server"], Path(folder, "llama-server.log")) as peer,
        ):
            urls = {"lq": lq.url, "llama-server": peer.url}
            for url in urls.values():
                measure(url, tokens)
            for number in range(rounds):
                order = list(urls) if number % 2 == 0 else list(reversed(urls))
                for name in order:
                    results[name].append(measure(urls[name], tokens))
    return results


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", help="GGUF (default: the embedded default model)")
    parser.add_argument("--rounds", type=int, default=41, help="measured runs of each server (default 41)")
    parser.add_argument("--tokens", type=int, default=96, help="tokens a run (default 96)")
    cores = psutil.cpu_count(logical=False)
    parser.add_argument("--threads", type=int, default=cores, help="default: physical cores")
    parser.add_argument("--json", type=Path, help="also write every measurement here")
    args = parser.parse_args()
    if args.model is None:
        from models.store import Store

        args.model = Store.default().pull("smollm2-135m-instruct").file
    results = compare(args.model, rounds=args.rounds, tokens=args.tokens, threads=args.threads)
    print(f"{args.model.name}, {args.threads} threads, {args.rounds} alternating rounds, medians")
    medians = {name: statistics.median(run["tokens_per_s"] for run in runs) for name, runs in results.items()}
    for name, runs in results.items():
        ttft_ms = 1000 * statistics.median(run["ttft_s"] for run in runs)
        rates = [run["tokens_per_s"] for run in runs]
        spread = f"{min(rates):.1f}-{max(rates):.1f}"
        print(f"{name:13} {medians[name]:7.1f} tokens/s ({spread})  first token {ttft_ms:.0f} ms")
    pairs = zip(results["lq"], results["llama-server"], strict=True)
    low, middle, high = statistics.quantiles([a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs], n=4)
    print(f"ratio         {middle:7.3f} (quartiles of the pairs {low:.3f}-{high:.3f})")
    if args.json:
        record = {"model": args.model.name, "threads": args.threads, "runs": results}
        args.json.write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
