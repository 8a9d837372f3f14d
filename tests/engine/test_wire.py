"""Every error and event crosses the process boundary whole, and brings no llama.cpp along."""

import subprocess
import sys
from pathlib import Path

import pytest

from engine import wire
from engine.llama import DecodeFailed
from engine.request import (
    ContextOverflow,
    Delta,
    Done,
    EngineConfig,
    EngineError,
    EngineRestarted,
    EngineUnavailable,
    GenerationRequest,
    InvalidRequest,
    ModelLoadFailed,
    QueueFull,
    Sampling,
    TokenLogprob,
)
from engine.sampling import NotANumber, NoTokenAllowed

ERRORS = [
    EngineError("plain"),
    InvalidRequest("top_p is 7", field="top_p"),
    ContextOverflow(5000, 4096),
    ContextOverflow(5000, 4096, at_least=True),
    QueueFull(256, retry_after_s=2.5),
    EngineRestarted("it died"),
    EngineUnavailable("closed"),
    ModelLoadFailed("truncated"),
]


def crossed(message):
    (back,) = wire.messages(bytearray(wire.frame(message)))
    return back


def test_frames_are_taken_off_whole_in_whatever_pieces_they_come():
    sent = [wire.Cancel(1), wire.Outputs([(2, Delta("text", (5,)))]), wire.Cancel(3)]
    buffer, got = bytearray(), []
    for byte in b"".join(map(wire.frame, sent)):
        buffer.append(byte)
        got += wire.messages(buffer)
    assert got == sent
    assert not buffer


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_keeps_its_class_message_and_attributes(error):
    back = crossed(wire.Failure.of(error)).error()
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)


@pytest.mark.parametrize("error", [DecodeFailed(-3), NoTokenAllowed(), NotANumber()])
def test_errors_of_inner_files_arrive_as_engine_errors(error):
    back = crossed(wire.Failure.of(error)).error()
    assert type(back) is EngineError
    assert str(back) == str(error)


def test_requests_events_and_configurations_arrive_equal():
    request = GenerationRequest("é", Sampling(logit_bias=((1, -100.0),), seed=-5), stop=("a", "b"))
    assert crossed(wire.Submit(1, request)) == wire.Submit(1, request)
    start = wire.Start(EngineConfig(Path("model.gguf"), lora=((Path("tone.gguf"), 0.5),)))
    assert crossed(start) == start
    delta = Delta("x", (5,), (TokenLogprob(5, b"x", -0.1, ((5, b"x", -0.1),)),))
    outputs = wire.Outputs([(1, delta), (1, Done("stop", 3, 1))])
    assert crossed(outputs) == outputs


def test_the_server_side_never_imports_llama_cpp():
    code = "import engine.client, engine.chat, sys; sys.exit('llama_cpp' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
