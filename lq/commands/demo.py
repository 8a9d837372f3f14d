"""`lq demo`: the whole way once, on what the repository carries, to an answer with its source."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from models.store import Store
    from rag.ingest import IndexReport
    from server.settings import Model

COLLECTION = "demo-handbook"
MODEL = "smollm2-135m-instruct"
EMBEDDER = "all-minilm-l6-v2"
#: The documents lie beside the packages in a checkout, and below the environment where an image put them.
EXAMPLES = (Path(__file__).parents[2] / "examples", Path(sys.prefix) / "share" / "lq" / "examples")
#: Seconds that the one answer may take.
ANSWER_S = 300


class DemoFailed(Exception):
    """The demonstration cannot run or did not answer."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, the text that a correct answer holds, and the file that says so."""

    question: str
    answer: str
    file: str


def register(app: typer.Typer) -> None:
    """Add `lq demo`."""
    app.command()(demo)


def demo(
    once: Annotated[bool, typer.Option("--once", help="Exit after the answer; else keep serving.")] = False,
    port: Annotated[
        int, typer.Option(metavar="P", min=0, max=65535, help="Port on 127.0.0.1; 0: any.")
    ] = 8000,
) -> None:
    """Pull the default model, index the example handbook, serve both and answer one question."""
    from models.store import Store
    from server.run import serve
    from server.settings import HTTP, Settings, with_models

    examples = example_folder()
    question = demo_question(examples)
    store = Store.default()
    model = prepared_model(store)
    report = indexed(store, examples / "handbook")
    print(f"indexed {report.chunks} passages of {len(list((examples / 'handbook').iterdir()))} documents")
    settings = with_models(Settings(server=HTTP(port=port)), {MODEL: model})
    outcome: list[Exception] = []

    def ready(url: str, _service: Any) -> None:
        threading.Thread(target=answer_and_go_on, args=(url, question, once, outcome), daemon=True).start()

    serve(settings, store=store, ready=ready)
    if outcome:
        raise outcome[0]


def example_folder() -> Path:
    """Where the example documents are."""
    for folder in EXAMPLES:
        if (folder / "handbook").is_dir():
            return folder
    looked = " nor ".join(map(str, EXAMPLES))
    raise DemoFailed(f"the example documents are neither at {looked}; run the demo from a checkout of lq")


def prepared_model(store: Store) -> Model:
    """The embedded default, quantized anew to a type with faster kernels; made once.

    It ships as Q4_1, whose prompts llama.cpp reads at less than half of Q8_0's speed; Q8_0 holds the same
    values to within a few thousandths. A model of your own starts from full precision: `lq quantize`.
    """
    from lq.progress import transfer_progress
    from quantize.gguf_files.child import quantize
    from quantize.gguf_files.types import Order
    from server.settings import Model

    with transfer_progress() as progress:
        source = store.resolve_or_pull(MODEL, progress=progress)
    target = store.root / "runs" / "demo" / f"{MODEL}-Q8_0.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        print(f"quantizing {MODEL} to Q8_0", flush=True)
        quantize(Order(source, target, "Q8_0", allow_requantize=True))
    return Model(model=str(target))


def indexed(store: Store, documents: Path) -> IndexReport:
    """The collection of the example documents; a rerun embeds nothing."""
    from lq.commands.index import load_embedder
    from rag.ingest import index
    from rag.settings import OtherEmbedder

    embedder, target = load_embedder(store, EMBEDDER), store.root / "collections" / COLLECTION
    try:
        return index(target, [documents], embedder=embedder)
    except OtherEmbedder:  # made by an earlier version of the demonstration, whose collection this is
        return index(target, [documents], embedder=embedder, rebuild=True)


def demo_question(examples: Path) -> Question:
    """The one question of examples/questions.json that is marked for the demonstration."""
    entries = json.loads((examples / "questions.json").read_text("utf-8"))
    (entry,) = (entry for entry in entries if entry.get("demo"))
    return Question(entry["question"], entry["answer"], entry["file"])


def answer_and_go_on(url: str, question: Question, once: bool, outcome: list[Exception]) -> None:
    """Ask, print and check; then say how to go on, or end the process's serving."""
    try:
        print(f"\nquestion  {question.question}", flush=True)
        print("          reading the passages that were found; a CPU takes up to half a minute", flush=True)
        completion = ask(url, question.question)
        show(completion)
        if once:
            check(completion, question)
        else:
            print(how_to_go_on(url, question.question), flush=True)
    except Exception as error:  # the main thread raises it: here it would end this thread and nothing else
        outcome.append(error)
    if once or outcome:
        os.kill(os.getpid(), signal.SIGTERM)


def ask(url: str, question: str) -> dict[str, Any]:
    """The chat completion, asked as any OpenAI client would."""
    import httpx

    key = os.environ.get("LQ_API_KEY")
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": question}],
        "collection": COLLECTION,
        "prompt": "grounded",
        "temperature": 0,
        "max_tokens": 80,
    }
    started = time.perf_counter()
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        # Not through a proxy of the environment, which does not reach this machine.
        with httpx.Client(headers=headers, timeout=ANSWER_S, trust_env=False) as client:
            response = client.post(f"{url}/v1/chat/completions", json=body)
    except httpx.TransportError as error:
        raise DemoFailed(f"no answer came: {error or type(error).__name__}") from None
    if response.status_code != 200:
        raise DemoFailed(f"the server answered {response.status_code}: {response.text[:500]}")
    return response.json() | {"seconds": time.perf_counter() - started}


def check(completion: dict[str, Any], question: Question) -> None:
    """Raise DemoFailed unless the answer is right and rests on the file that says so."""
    message = completion["choices"][0]["message"]
    if question.answer.casefold() not in message["content"].casefold():
        raise DemoFailed(f"the answer does not hold {question.answer!r}, which {question.file} says")
    files = [source["file"] for source in message["sources"]]
    if not any(Path(file).name == question.file for file in files):
        raise DemoFailed(f"{question.file} is not among the sources: {', '.join(files) or 'there are none'}")


def show(completion: dict[str, Any]) -> None:
    """The answer, then the sources it was given, best first."""
    message = completion["choices"][0]["message"]
    print(f"answer    {' '.join(message['content'].split())}")
    for source in message["sources"]:
        page = f", page {source['page']}" if source.get("page") else ""
        heading = f", {source['heading']}" if source.get("heading") else ""
        span = f"characters {source['start']}-{source['end']}"
        print(f"source    [{source['index']}] {source['file']}{page}{heading} ({span})")
    usage = completion["usage"]
    print(
        f"          {usage['prompt_tokens']} prompt tokens, {usage['completion_tokens']} written, "
        f"{completion['seconds']:.1f} s",
        flush=True,
    )


def how_to_go_on(url: str, question: str) -> str:
    """Ready-to-paste calls."""
    body = json.dumps(
        {"model": MODEL, "collection": COLLECTION, "messages": [{"role": "user", "content": question}]}
    )
    header, key = "", '"none"'
    if os.environ.get("LQ_API_KEY"):
        header, key = ' -H "Authorization: Bearer $LQ_API_KEY"', 'os.environ["LQ_API_KEY"]'
    return f"""
The server keeps running at {url}/v1 (API: {url}/docs). Ask it yourself:

  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{header} -d '{body}'

  from openai import OpenAI  # pip install openai
  client = OpenAI(base_url="{url}/v1", api_key={key})
  answer = client.chat.completions.create(
      model="{MODEL}", messages=[{{"role": "user", "content": "{question}"}}],
      extra_body={{"collection": "{COLLECTION}"}})
  print(answer.choices[0].message.content)

Ctrl-C stops it."""
