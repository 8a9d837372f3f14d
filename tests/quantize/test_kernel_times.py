"""Milliseconds a type: solved from differences, kept, and asked of llama.cpp once."""

import json

import gguf
import numpy as np
import pytest

from models.gguf import read_header
from models.tensor_types import TensorType
from quantize.errors import QuantizeError
from quantize.gguf_files.parts import Rows
from quantize.measure import Backend
from quantize.mixes import kernel_times as timing
from quantize.mixes.kernel_times import CannotTime, Shape, kernel_times, weights_read, write_model
from tests import tiny_models

SMALL = Shape(256, 512, 2)
ALONE = Backend(n_threads=1, n_gpu_layers=0)


def encode(rows: Rows) -> np.ndarray:
    if rows.type == "IQ1_S":
        raise QuantizeError("IQ1_S cannot be made without an importance matrix")
    return gguf.quants.quantize(rows.weights, gguf.GGMLQuantizationType[rows.type])


@pytest.fixture
def steps(monkeypatch) -> list[str]:
    """No decoding: a step takes 5 ms and 0.01 ms a thousand feed-forward bytes, Q4_1's counted twice."""
    asked: list[str] = []

    def decode_ms(path, _backend):
        tensors = [t for t in read_header(path).tensors if ".ffn_" in t.name and "norm" not in t.name]
        asked.append(f"{tensors[0].type.name} {tensors[0].shape[1]}")
        slow = {"Q4_1": 2}
        return 5 + sum(t.size_bytes * slow.get(t.type.name, 1) for t in tensors) * 1e-5

    monkeypatch.setattr(timing, "_decode_ms", decode_ms)
    return asked


def test_times_are_solved_so_that_all_but_the_feed_forward_cancels(steps, tmp_path):
    types = ("Q4_0", "Q4_1", "F16", "Q8_0")
    found = kernel_times(SMALL, types, encode, store=tmp_path / "times.json", backend=ALONE).per_million
    bits = {name: TensorType[name].bits_per_weight for name in types}
    expected = {name: bits[name] / 8 * 10 * (2 if name == "Q4_1" else 1) for name in types}
    assert found == pytest.approx(expected)
    assert steps == timing.ROUNDS * ["Q8_0 256", "Q8_0 512", "Q4_0 512", "Q4_1 512", "F16 512"]


def test_a_while_in_which_the_machine_is_slow_tells_nothing_of_a_type(monkeypatch, tmp_path):
    asked = []

    def step_ms(shape, kind, *_):
        asked.append(kind)
        slow = 4 if 6 <= len(asked) < 12 else 1  # one round and a half of five
        return slow * (5 + shape.n_weights * TensorType[kind].bits_per_weight / 8 * 1e-5)

    monkeypatch.setattr(timing, "_step_ms", step_ms)
    told = []
    found = kernel_times(
        SMALL, ("Q4_0", "Q4_1"), encode, store=tmp_path / "times.json", backend=ALONE,
        progress=lambda *each: told.append(each),
    )  # fmt: skip
    expected = {name: TensorType[name].bits_per_weight / 8 * 10 for name in ("Q4_0", "Q4_1")}
    assert found.per_million == pytest.approx(expected)
    assert told == [(done, 20) for done in range(20)]


def test_a_type_is_measured_once_on_a_machine_and_again_on_another(steps, tmp_path):
    store = tmp_path / "times.json"
    first = kernel_times(SMALL, ("Q4_0", "Q8_0"), encode, store=store, backend=ALONE)
    asked = len(steps)
    assert kernel_times(SMALL, ("Q4_0", "Q8_0"), encode, store=store, backend=ALONE) == first
    assert len(steps) == asked
    kernel_times(SMALL, ("Q4_0", "Q5_0"), encode, store=store, backend=ALONE)
    assert steps[asked:] == timing.ROUNDS * ["Q8_0 256", "Q8_0 512", "Q4_0 512", "Q5_0 512"]
    asked = len(steps)
    kernel_times(SMALL, ("Q4_0",), encode, store=store, backend=Backend(2, 0))
    assert steps[asked:] == timing.ROUNDS * ["Q8_0 256", "Q8_0 512", "Q4_0 512"]
    kept = json.loads(store.read_text())
    assert len(kept) == 2
    assert all("threads" in key and "llama-cpp-python" in key and "kernels" in key for key in kept)


def test_a_type_is_measured_again_when_the_kernels_are_others(steps, tmp_path, monkeypatch):
    store = tmp_path / "times.json"
    kernel_times(SMALL, ("Q4_0",), encode, store=store, backend=ALONE)
    asked, other = len(steps), tmp_path / "libkernels.so"
    other.write_bytes(b"others")
    monkeypatch.setattr(timing, "library_path", lambda: other)
    monkeypatch.setattr(timing, "without_kernels", lambda: None)
    kernel_times(SMALL, ("Q4_0",), encode, store=store, backend=ALONE)
    assert len(steps) == 2 * asked
    assert len(json.loads(store.read_text())) == 2


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"a": 1}', '{"a": {"Q4_0": "fast"}}'])
def test_a_damaged_store_is_measured_anew(damage, steps, tmp_path):
    store = tmp_path / "times.json"
    store.write_text(damage)
    found = kernel_times(SMALL, ("Q4_0",), encode, store=store, backend=ALONE)
    assert found.per_million["Q4_0"] > 0
    assert steps
    assert json.loads(store.read_text())


def test_types_that_cannot_be_timed_are_refused_by_name_and_what_was_measured_is_kept(steps, tmp_path):
    store = tmp_path / "times.json"
    found = kernel_times(SMALL, ("Q4_0",), encode, store=store, backend=ALONE)
    with pytest.raises(CannotTime, match=r"Q4_K_M cannot be timed on this machine: it is no tensor type"):
        kernel_times(SMALL, ("Q4_0", "Q4_K_M"), encode, store=store, backend=ALONE)
    with pytest.raises(QuantizeError, match="IQ1_S cannot be made without an importance matrix"):
        kernel_times(SMALL, ("IQ1_S",), encode, store=store, backend=ALONE)
    asked = len(steps)
    assert kernel_times(SMALL, ("Q4_0",), encode, store=store, backend=ALONE) == found
    assert len(steps) == asked
    header = read_header(write(tmp_path, "Q4_0"))
    with pytest.raises(CannotTime, match=r"Q5_0 cannot be timed .* not among the types"):
        found.milliseconds(header, header.tensors[0], "Q5_0")


def write(folder, kind: str):
    path = folder / f"{kind}.gguf"
    write_model(path, SMALL, kind, encode)
    return path


def test_the_model_that_is_timed_has_the_type_in_its_feed_forward_alone(tmp_path):
    header = read_header(write(tmp_path, "Q4_1"))
    assert header.size_bytes == (tmp_path / "Q4_1.gguf").stat().st_size
    of_type = [tensor for tensor in header.tensors if tensor.type.name == "Q4_1"]
    assert sum(tensor.n_elements for tensor in of_type) == SMALL.n_weights == 3 * 256 * 512 * 2
    assert all(".ffn_" in tensor.name for tensor in of_type)


def test_llama_cpp_runs_it_and_a_step_takes_time(tmp_path):
    found = kernel_times(SMALL, ("Q4_0", "F16"), encode, store=tmp_path / "times.json", backend=ALONE)
    kept = next(iter(json.loads((tmp_path / "times.json").read_text()).values()))
    assert kept.keys() == {"Q8_0", "Q4_0", "F16"}
    assert all(0 <= value < float("inf") for value in (*kept.values(), *found.per_million.values()))
    assert timing._step_ms(SMALL, "Q4_0", encode, ALONE) > 0


def test_a_model_that_llama_cpp_does_not_load_is_told_as_the_types_fault(tmp_path, monkeypatch):
    def broken(path, *_):
        path.write_bytes(b"GGUF" + bytes(60))

    monkeypatch.setattr(timing, "write_model", broken)
    with pytest.raises(CannotTime, match=r"Q8_0 cannot be timed on this machine: .*; give --objective size"):
        kernel_times(SMALL, ("Q4_0",), encode, store=tmp_path / "times.json", backend=ALONE)


@pytest.mark.parametrize(
    ("width", "inner", "parameters", "expected"),
    [
        (576, 1536, 134_515_008, Shape(512, 1536, 57)),  # SmolLM2-135M: as many weights
        (1536, 8960, 1_543_714_304, Shape(1536, 8960, 3)),  # Qwen2.5-1.5B: a tenth
        (4096, 14336, 8_030_261_312, Shape(4096, 12032, 1)),  # Llama-3-8B: a part of a layer
        (64, 96, 100_000, Shape(256, 256, 1)),
    ],
)
def test_the_timed_model_is_as_wide_as_the_one_it_stands_for_and_never_large(
    width, inner, parameters, expected
):
    class Header:
        n_parameters = parameters

        def hyperparameter(self, name):
            return {"embedding_length": width, "feed_forward_length": inner}.get(name)

    found = Shape.like(Header())  # type: ignore[arg-type]
    assert found == expected
    assert found.n_weights <= timing.WEIGHTS


def test_weights_that_a_token_reads(tmp_path):
    encoder = read_header(tiny_models.bert(tmp_path / "bert.gguf"))
    untied = read_header(tiny_models.qwen3(tmp_path / "qwen3.gguf"))
    for header in (encoder, untied):
        assert weights_read(header, header.tensors[0]) == 0, "a table is looked up in"
    positions = next(tensor for tensor in encoder.tensors if tensor.name == "position_embd.weight")
    assert weights_read(encoder, positions) == 0
    for name in ("blk.0.ffn_up.weight", "output.weight"):
        matrix = next(tensor for tensor in untied.tensors if tensor.name == name)
        assert weights_read(untied, matrix) == matrix.n_elements


def test_of_experts_only_the_chosen_are_read_and_of_a_tied_head_all(tmp_path):
    path = tmp_path / "moe.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_expert_count(8)
    writer.add_expert_used_count(2)
    writer.add_tensor("token_embd.weight", np.zeros((40, 32), np.float32))
    writer.add_tensor("blk.0.ffn_up_exps.weight", np.zeros((8, 32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(path)
    assert [weights_read(header, tensor) for tensor in header.tensors] == [40 * 32, 8 * 32 * 32 / 4]
