"""The texts of a run: written by the model itself, or read from a file, kept as token sequences on disk.

Opens the model for as long as texts are made. What a good conversation is, `calibrate` and `filters` know.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.llama import Context, Model
from engine.loop import Loop
from engine.sampling import NotANumber
from models.gguf import read_header
from quantize.calibration.calibrate import Plan, avoiding, converse
from quantize.calibration.conversation import Conversation, Journal, read, windows
from quantize.errors import QuantizeError
from quantize.frame import CannotConverse, Frame
from quantize.measure import Backend
from quantize.source import digest

WINDOW = 512  # tokens of one sequence cut from a text file
MIN_TEXT = 512  # tokens
MIN_ANSWER = 32  # tokens
MAX_TEXT_BYTES = 64 * 10**6
N_WORDS = 20_000  # that plain text may begin with
MIN_WORDS = 100
Progress = Callable[[int, int], None]


class NotFinite(CannotConverse):
    """A generator that overflows."""

    def __init__(self) -> None:
        super().__init__("run as Q8_0 the model computes NaN instead of predictions")


class UnusableText(QuantizeError):
    """A text file that cannot be read as one, or is too short."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}; give a plain UTF-8 text of at least {MIN_TEXT} tokens")


@dataclass(frozen=True, slots=True)
class Written:
    """What a text step recorded."""

    origin: str
    n_sequences: int
    n_tokens: int
    dropped: dict[str, int]
    sha256: str


def write_conversations(
    generator: Path,
    out: Path,
    plan: Plan,
    *,
    key: str,
    backend: Backend,
    avoid: Sequence[Conversation] = (),
    progress: Progress | None = None,
) -> Written:
    """Let `generator` write into `out`; goes on with a file of the same `key`. Questions in `avoid` are not
    asked again, nor are its texts without one written again."""
    journal = Journal.open(out, key=key)
    with Model.open(generator, n_gpu_layers=backend.n_gpu_layers) as model:
        frame = frame_of(model)
        around = sum(map(len, (frame.before, frame.between, frame.after))) if frame else 1
        plan = fitted(plan, around, n_ctx_train=model.n_ctx_train, has_turns=frame is not None)
        openings = openings_of(model) if plan.with_plain and frame is not None else []
        n_ctx = around + plan.max_question + plan.max_answer + 8
        with open_loop(model, n_ctx, plan.n_parallel, backend) as loop:
            try:
                converse(
                    loop,
                    frame,
                    plan,
                    journal,
                    bos=model.bos_id,
                    openings=openings,
                    seen=avoiding(avoid),
                    progress=progress,
                )
            except NotANumber:
                raise NotFinite from None
    how = "written by the model itself (run as Q8_0)"
    if frame is None:
        how += ", from BOS on: it has no chat template"
    elif openings:
        how += ", every other one plain text from a word on"
    elif plan.with_plain:
        how += ", chats alone: its vocabulary has too few words to begin plain text with"
    n_tokens = sum(len(conversation.tokens) for conversation in journal.accepted)
    return Written(how, len(journal.accepted), n_tokens, journal.reasons(), digest(out))


def cut_text(source: Path, text: Path, out: Path, *, n_tokens: int, key: str, backend: Backend) -> Written:
    """Tokenise a text file into windows at `out`; at most `n_tokens`, spread over the file."""
    content = read_text(text)
    with Model.open(source, n_gpu_layers=backend.n_gpu_layers, vocab_only=True) as model:
        tokens = model.tokenize(content, add_special=False)
        bos = model.bos_id if model.adds_bos else None
    size = min(WINDOW, read_header(source).n_ctx_train or WINDOW)
    if len(tokens) < MIN_TEXT:
        raise UnusableText(text, f"it has only {len(tokens)} tokens")
    out.unlink(missing_ok=True)
    journal = Journal.open(out, key=key)
    for window in windows(tokens, size=size, limit=n_tokens, bos=bos):
        journal.add(window)
    used = sum(len(window.tokens) for window in journal.accepted)
    return Written(f"windows of {size} tokens of {text.name}", len(journal.accepted), used, {}, digest(out))


def joined(own: Written, chats: Path, cut: Written, windows: Path, out: Path) -> Written:
    """Both files as one at `out`, spread evenly over each other, so that what is held back of it has both."""
    parts = [read(path) for path in (chats, windows)]
    ranked = [((i + 0.5) / len(part), piece) for part in parts for i, piece in enumerate(part)]
    pieces = [piece for _, piece in sorted(ranked, key=lambda each: each[0])]
    out.unlink(missing_ok=True)
    journal = Journal.open(out, key=out.stem)
    for number, piece in enumerate(pieces):
        journal.add(replace(piece, number=number))
    n_tokens = sum(len(piece.tokens) for piece in pieces)
    return Written(f"{own.origin}, and {cut.origin}", len(pieces), n_tokens, own.dropped, digest(out))


def fitted(plan: Plan, around: int, *, n_ctx_train: int, has_turns: bool) -> Plan:
    """The plan with turns short enough for the context the model was trained for."""
    room = n_ctx_train - around
    question = min(plan.max_question, room // 3) if has_turns else 0
    answer = min(plan.max_answer, room - question)
    if answer < MIN_ANSWER:
        raise CannotConverse(
            f"the model reads {n_ctx_train} tokens and its template takes {around}, too few for conversations"
        )
    return replace(plan, max_question=question, max_answer=answer)


def read_text(path: Path) -> str:
    """The content of a text file; refuses an empty, binary or huge one."""
    if path.is_dir():
        raise UnusableText(path, "this is a folder")
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UnusableText(path, f"it cannot be read ({error.strerror})") from None
    if size > MAX_TEXT_BYTES:
        raise UnusableText(path, f"{size / 1e6:.0f} MB are more than the {MAX_TEXT_BYTES / 1e6:.0f} MB read")
    data = path.read_bytes()
    if not data.strip():
        raise UnusableText(path, "the file is empty")
    if len(data) < MIN_TEXT:
        raise UnusableText(path, f"it has only {len(data)} bytes, and a token takes one at least")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnusableText(path, f"byte {error.start} is not UTF-8, this looks like a binary file") from None
    if "\0" in text:
        raise UnusableText(path, "it holds NUL bytes, this looks like a binary file")
    return text


def frame_of(model: Model) -> Frame | None:
    """How the model's chat template frames a conversation; None for a base model without one."""
    if not model.chat_template:
        return None
    return Frame.of(
        model.chat_template,
        lambda text: model.tokenize(text, add_special=False, parse_special=True),
        bos_token=model.token_text(model.bos_id),
        eos_token=model.token_text(model.eos_id),
        add_bos=model.bos_id if model.adds_bos else None,
    )


def openings_of(model: Model) -> list[tuple[int, ...]]:
    """What a model that writes chats can begin plain text with: words with a capital, or of a script without,
    tokenised as a text's first. None where the vocabulary has too few of them; of a large one the first,
    which are the most frequent.

    BOS alone does not do: tuned models have made it the beginning of a chat.
    """
    words: dict[str, None] = {}
    for token in range(model.n_vocab):
        try:
            word = model.piece(token).decode("utf-8").removeprefix(" ")
        except UnicodeDecodeError:
            continue
        if len(word) > 1 and word.isalpha() and not word[0].islower() and not word[1:].isupper():
            words[word] = None
            if len(words) == N_WORDS:
                break
    if len(words) < MIN_WORDS:
        return []
    before = (model.bos_id,) if model.adds_bos and model.bos_id is not None else ()
    return [(*before, *model.tokenize(word, add_special=False)) for word in words]


@contextmanager
def open_loop(model: Model, n_ctx: int, n_parallel: int, backend: Backend) -> Any:
    """A loop for so many sequences of so many tokens each."""
    with Context.open(
        model, n_ctx=n_ctx * n_parallel, n_seq_max=n_parallel, n_threads=backend.n_threads
    ) as context:
        loop = Loop(model, context, n_ctx=n_ctx, n_parallel=n_parallel)
        try:
            yield loop
        finally:
            loop.close()
