"""Names of models and adapters -> engines: what is shared, what is converted, what an adapter changes."""

import asyncio
import json

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

from models.errors import ModelsError
from models.store import Store
from server.app import create_app
from server.engines import plan
from server.in_process import BASE_URL, InProcess
from server.service import opened
from server.settings import Adapter, Assistant, Model, Settings, complete

SMOL = "smollm2-135m-instruct"


@pytest.fixture
def store(asset_home, tmp_path) -> Store:
    """A store of its own with the pulled models."""
    (tmp_path / "models").symlink_to(asset_home / "models")
    return Store(tmp_path)


@pytest.fixture
def adapter(tmp_path):
    """A PEFT LoRA adapter for SmolLM2 that changes much."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 16, "target_modules": ["o_proj"],
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct", "bias": "none",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    random = np.random.default_rng(1)
    name = "base_model.model.model.layers.29.self_attn.o_proj.lora_{}.weight"
    tensors = {
        name.format("A"): random.normal(size=(4, 576)).astype(np.float32),
        name.format("B"): random.normal(size=(576, 4)).astype(np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def settings(adapter, **fields) -> Settings:
    assistants = {
        "same": Assistant(model=SMOL, temperature=0.0, max_tokens=8),
        "tuned": Assistant(model=SMOL, lora=(str(adapter),), temperature=0.0, max_tokens=8),
    }
    models = {SMOL: Model(n_ctx=256, n_parallel=1, threads=1, **fields)}
    return complete(Settings(models=models, assistants=assistants), "test")


def test_assistants_share_the_engine_of_their_model_unless_they_add_adapters(store, adapter):
    plans = plan(settings(adapter), store)
    assert plans["same"].config == plans[SMOL].config
    assert plans["tuned"].config != plans[SMOL].config
    ((converted, scale),) = plans["tuned"].config.lora
    assert (converted.suffix, scale) == (".gguf", 1.0)
    assert plans[SMOL].control.search("a <|im_end|> b")
    assert not plans[SMOL].control.search("an ordinary sentence")


def test_an_adapter_is_converted_once_and_again_when_it_changes(store, adapter):
    first = plan(settings(adapter), store)["tuned"].config.lora[0][0]
    written = first.stat().st_mtime_ns
    assert plan(settings(adapter), store)["tuned"].config.lora[0][0] == first
    assert first.stat().st_mtime_ns == written
    (adapter / "README.md").write_text("changed")
    assert plan(settings(adapter), store)["tuned"].config.lora[0][0] != first


def test_adapters_of_model_and_assistant_add_up_with_their_scales(store, adapter):
    own = (Adapter(path=str(adapter), scale=0.5),)
    plans = plan(settings(adapter, lora=own), store)
    assert [scale for _, scale in plans[SMOL].config.lora] == [0.5]
    assert [scale for _, scale in plans["tuned"].config.lora] == [0.5, 1.0]


def test_what_is_no_model_or_adapter_is_refused_before_anything_starts(store, adapter, smollm2_gguf):
    for model, lora in [("nope", ()), (str(adapter), ()), (SMOL, ("nope",)), (SMOL, (str(smollm2_gguf),))]:
        with pytest.raises(ModelsError):
            plan(Settings(models={"m": Model(model=model, lora=lora)}), store)


def test_an_assistant_with_an_adapter_answers_otherwise_than_its_model(store, adapter):
    async def ask_both() -> list[str]:
        async with opened(settings(adapter), store=store) as service:
            assert list(service.roster.standings()) == [SMOL, "tuned"]
            transport = InProcess(create_app(service))
            async with httpx.AsyncClient(transport=transport, base_url=BASE_URL, timeout=120) as client:
                texts = []
                for model in (SMOL, "same", "tuned"):
                    body = {
                        "model": model,
                        "messages": [{"role": "user", "content": "What is the capital of France?"}],
                    }
                    body |= {"temperature": 0, "max_tokens": 8}
                    answer = (await client.post("/v1/chat/completions", json=body)).json()
                    texts.append(answer["choices"][0]["message"]["content"])
                return texts

    base, same, tuned = asyncio.run(ask_both())
    assert base
    assert same == base
    assert tuned != base
