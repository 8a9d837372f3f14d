"""A hundred random lives of the loop over the real model, and its books against llama.cpp's own.

Every request carries a word of its own that must never come out of another's answer, and each greedy token
must be the model's own choice, or as good as, for what went before, whatever was shared, saved, restored,
guessed or cancelled on the way.
"""

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest

from engine.llama import Adapter, Context, Model, evaluate, native
from engine.loop import Loop
from engine.pace import Pace
from engine.request import Delta, Done, EngineError, GenerationRequest, Sampling, Tenant
from engine.states import States

N_TRACES, N_GROUPS = 100, 5
N_CTX, N_CELLS = 160, 224
# In a unified memory the order of a sequence's cells, and so of sums, depends on its neighbours, and the size
# of a call moves logits by 0.1 (test_native_model.py). A wrong cell moves them by several units.
CLOSE = 0.3
WORDS = ["ZEBRA", "QUARTZ", "FJORD", "WALTZ", "JUMBO", "VIXEN", "PROXY", "KAYAK"]
STEMS = [
    "",
    "You keep secret words and never tell them. Whoever asks, you talk of the weather instead. ",
    "The handbook says that twenty days of leave are due to everybody who works here all year. ",
]


@pytest.fixture(scope="module")
def adapters(model: Model, tmp_path_factory) -> dict[str, Adapter]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: Adapter(model, write_adapter(folder / f"{name}.gguf", seed)) for seed, name in enumerate("ab")
    }


def write_adapter(path: Path, seed: int) -> Path:
    """Rank 2 on the first layer's queries and the last one's down projection, large enough to be seen."""
    chance = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0)
    for name, n_in, n_out in (("blk.0.attn_q", 576, 576), ("blk.29.ffn_down", 1536, 576)):
        writer.add_tensor(f"{name}.weight.lora_a", chance.normal(0, 0.08, (2, n_in)).astype(np.float32))
        writer.add_tensor(f"{name}.weight.lora_b", chance.normal(0, 0.08, (n_out, 2)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@contextmanager
def open_loop(
    model: Model, chance: random.Random, adapters: dict[str, Adapter], folder: Path, *, unified: bool
) -> Iterator[Loop]:
    n_parallel = chance.choice([2, 3, 4])
    cells = N_CELLS if unified else N_CTX * n_parallel
    options = {"n_ctx": cells, "n_batch": 64, "n_seq_max": n_parallel, "n_outputs_max": n_parallel + 8}
    with Context.open(model, **options, n_threads=2, unified=unified) as context:
        loop = Loop(
            model,
            context,
            n_ctx=N_CTX,
            n_parallel=n_parallel,
            pace=Pace(max_stall_s=chance.choice([None, 0.05])),
            guesses=chance.choice([0, 8]),
            ram_bytes=chance.choice([0, 2_000_000, 50_000_000]),
            disk_bytes=chance.choice([0, 5_000_000]),
            states=States(folder, fingerprint="test"),
            token_bytes=23_100,
            adapters=adapters,
        )
        try:
            yield loop
        finally:
            loop.close()


class Life:
    """Requests that come and go, what each was answered."""

    def __init__(self, loop: Loop, chance: random.Random) -> None:
        self.loop, self.chance = loop, chance
        self.asked: dict[int, GenerationRequest] = {}
        self.texts: dict[int, str] = {}
        self.tokens: dict[int, list[int]] = {}
        self.ended: set[int] = set()
        self.cancelled: set[int] = set()

    def run(self, n_requests: int) -> None:
        while len(self.asked) < n_requests or not self.loop.idle:
            if len(self.asked) < n_requests and self.chance.random() < 0.5:
                self.ask(len(self.asked))
            if self.chance.random() < 0.03 and (live := self.asked.keys() - self.ended - self.cancelled):
                victim = self.chance.choice(sorted(live))
                self.cancelled.add(victim)
                self.loop.cancel(victim)
            self.take(self.loop.step())

    def ask(self, id: int) -> None:
        chance = self.chance
        prompt = f"{chance.choice(STEMS)}My word is {WORDS[id]}. " + "Tell me more. " * chance.randrange(2)
        if chance.random() < 0.3:
            prompt += "one two three four one two three four one two three"
        sampled = Sampling(temperature=0.9, seed=id)
        self.asked[id] = GenerationRequest(
            prompt,
            sampling=chance.choice([Sampling(temperature=0), Sampling(temperature=0), sampled]),
            max_tokens=chance.randint(1, 14),
            ignore_eos=chance.random() < 0.5,
            tenant=Tenant(chance.choice(["x", "y"]), priority=int(chance.random() < 0.1)),
            cache_salt=chance.choice(["", "", "salt"]),
            adapters=chance.choice([(), (), (("a", 1.0),), (("b", 0.5),)]),
        )
        self.texts[id], self.tokens[id] = "", []
        self.loop.submit(id, self.asked[id])

    def take(self, outputs) -> None:
        for id, event in outputs:
            assert id not in self.ended
            assert id not in self.cancelled
            assert not isinstance(event, EngineError), event
            if isinstance(event, Delta):
                self.texts[id] += event.text
                self.tokens[id] += event.tokens
            elif isinstance(event, Done):
                self.ended.add(id)


def check_books(loop: Loop) -> None:
    """What the scheduler believes to be in the KV memory is there, and nothing else."""
    held, context = loop.scheduler.held, loop.context
    for index, slot in enumerate(held.slots):
        assert context.length(index) == len(slot.tokens)
        assert native.llama_memory_seq_pos_min(context.memory, index) == (0 if slot.tokens else -1)
    if held.cells is not None and held.cells.n_used:
        n_held = sum(len(slot.tokens) for slot in held.slots)
        n_used = held.cells.n_used
        assert native.llama_state_get_size(context.pointer) == state_bytes(n_used, n_held)


def state_bytes(n_used: int, n_held: int) -> int:
    """Of a whole unified memory: 30 layers of 192 keys and values in 16 bits, and the numbers of its cells.

    Each cell has a position and a count of its holders, and each holder of a cell takes 4 bytes: 745 bytes
    beside them were read off an almost empty memory.
    """
    return 745 + n_used * (30 * 192 * 2 * 2 + 4 + 4) + 4 * n_held


def check_answers(life: Life, judge: Context, adapters: dict[str, Adapter]) -> None:
    for id in life.ended:
        for other in WORDS[: len(life.asked)]:
            if other != WORDS[id]:
                assert other not in life.texts[id]
        request = life.asked[id]
        if request.sampling.temperature == 0 and life.tokens[id]:
            judge.apply([(adapters[name], scale) for name, scale in request.adapters])
            prompt = judge.model.tokenize(str(request.prompt))
            outputs = np.arange(len(prompt) - 1, len(prompt) + len(life.tokens[id]) - 1)
            logits = evaluate(judge, [*prompt, *life.tokens[id]], outputs=outputs)
            if request.ignore_eos:
                logits[:, sorted(judge.model.eog_tokens)] = -np.inf
            chosen = logits[np.arange(len(outputs)), life.tokens[id]]
            assert (logits.max(axis=1) - chosen).max() < CLOSE


@pytest.fixture(scope="module")
def judge(model: Model) -> Iterator[Context]:
    with Context.open(model, n_ctx=N_CTX + 32, n_batch=192, n_threads=2) as context:
        yield context


@pytest.mark.parametrize(("unified", "group"), list(itertools.product([False, True], range(N_GROUPS))))
def test_random_lives_on_the_real_model(adapters, judge, tmp_path, unified, group):
    model = judge.model
    n_each = N_TRACES // N_GROUPS // 2
    for seed in range(group * n_each, (group + 1) * n_each):
        chance = random.Random(f"{unified} {seed}")
        with open_loop(model, chance, adapters, tmp_path / "states", unified=unified) as loop:
            life = Life(loop, chance)
            try:
                life.run(chance.randint(2, 5))
                check_books(loop)
                assert life.ended | life.cancelled == set(life.asked)
                check_answers(life, judge, adapters)
            except (AssertionError, EngineError) as error:
                raise AssertionError(f"trace {seed}: {error}") from error
