"""Merged adapters equal what PEFT computes; what cannot be merged exactly is refused by name."""

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from models.lora import Adapter, AdapterMismatch, InvalidAdapter, UnsupportedAdapter  # noqa: E402
from models.tensors import TensorFile  # noqa: E402

# PEFT and transformers warn about each other and about tied embeddings; nothing of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_llama(*, tied: bool = False):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def randomised(model, seed: int = 1):
    """Every adapter parameter random, so that nothing merges to a no-op."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand(parameter.shape, generator=generator)
        elif "lora_" in name or "modules_to_save" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def saved_adapter(folder, *, tied=False, **options):
    """(adapter folder, the base model's tensors, the tensors PEFT merges)."""
    model = tiny_llama(tied=tied)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = randomised(peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options)))
    adapted.save_pretrained(folder, save_embedding_layers=False)
    merged = adapted.merge_and_unload().state_dict()
    return folder, to_numpy(base), to_numpy(merged)


def to_numpy(tensors):
    return {name: tensor.detach().float().numpy().copy() for name, tensor in tensors.items()}


VARIANTS = {
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS},
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, "use_dora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": PROJECTIONS,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 3, "down_proj": 16},
        "use_rslora": True,
    },
    "saved modules": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"],
    },
    "embedding": {"r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    "embedding dora": {"r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens"], "use_dora": True},
    "gaussian": {"r": 2, "lora_alpha": 4, "target_modules": ["v_proj"], "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_tensors_equal_what_peft_merges(tmp_path, variant):
    folder, base, merged = saved_adapter(tmp_path, **VARIANTS[variant])
    adapter = Adapter.open(folder)
    for name, weight in base.items():
        np.testing.assert_allclose(adapter.merge(name, weight), merged[name], rtol=1e-5, atol=1e-6)
        assert adapter.changes(name) == (not np.array_equal(weight, merged[name])), name
    adapter.unused(base)


def test_an_adapter_of_conv1d_layers_is_merged_transposed(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32))
    base = to_numpy(model.state_dict())
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)
    adapted = randomised(peft.get_peft_model(model, config))
    adapted.save_pretrained(tmp_path)
    merged = to_numpy(adapted.merge_and_unload().state_dict())
    adapter = Adapter.open(tmp_path)
    name = "transformer.h.0.attn.c_attn.weight"
    np.testing.assert_allclose(adapter.merge(name, base[name]), merged[name], rtol=1e-5, atol=1e-6)


def test_the_embedding_layer_that_peft_saves_along_is_used(tmp_path):
    model = randomised(
        peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    )
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    adapter = Adapter.open(tmp_path)
    merged = to_numpy(model.merge_and_unload().state_dict())["model.embed_tokens.weight"]
    base = to_numpy(tiny_llama().state_dict())["model.embed_tokens.weight"]
    np.testing.assert_allclose(adapter.merge("model.embed_tokens.weight", base), merged, rtol=1e-5, atol=1e-6)


def test_prefixes_of_multimodal_checkpoints_do_not_matter(tmp_path):
    folder, base, merged = saved_adapter(tmp_path, **VARIANTS["lora"])
    name = "model.layers.0.self_attn.q_proj.weight"
    for spelling in (f"language_model.{name}", name.replace("model.", "model.language_model.", 1)):
        found = Adapter.open(folder).merge(spelling, base[name])
        np.testing.assert_allclose(found, merged[name], rtol=1e-5, atol=1e-6)


def test_a_bfloat16_adapter_is_merged_in_float32(tmp_path):
    from safetensors.torch import load_file, save_file

    folder, base, merged = saved_adapter(tmp_path, **VARIANTS["lora"])
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    name = "model.layers.0.mlp.up_proj.weight"
    found = Adapter.open(folder).merge(name, base[name])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, merged[name], atol=0.05)


def test_only_an_adapter_of_embedding_or_head_splits_a_tied_head(tmp_path):
    saved_adapter(tmp_path / "plain", **VARIANTS["lora"])
    assert not Adapter.open(tmp_path / "plain").splits_tied_head
    folder, base, _ = saved_adapter(tmp_path / "head", tied=True, r=2, target_modules=["lm_head"])
    adapter = Adapter.open(folder)
    assert adapter.splits_tied_head
    embedding = base["model.embed_tokens.weight"]
    np.testing.assert_array_equal(adapter.merge("model.embed_tokens.weight", embedding), embedding)
    assert np.abs(adapter.merge("lm_head.weight", embedding) - embedding).max() > 0.01


REFUSED = {
    "peft_type": "IA3",
    "bias": "all",
    "lora_bias": True,
    "use_qalora": True,
    "layer_replication": [[0, 2]],
    "megatron_config": {"a": 1},
    "trainable_token_indices": [1, 2],
    "alora_invocation_tokens": [5],
    "target_parameters": ["mlp.experts"],
    "use_bdlora": {"nblocks": 2},
    "kasa_config": {"beta": 1.0},
    "arrow_config": {"top_k": 2},
    "monteclora_config": {"num_samples": 2},
    "init_lora_weights": "pissa_niter_4",
    "an_option_of_next_year": "yes",
}


@pytest.fixture(scope="module")
def plain_adapter(tmp_path_factory):
    folder, _, _ = saved_adapter(tmp_path_factory.mktemp("plain"), **VARIANTS["lora"])
    return folder


def changed(plain_adapter, tmp_path, **options):
    """A copy of the plain adapter with other options in its configuration."""
    folder = shutil.copytree(plain_adapter, tmp_path / "changed")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    return folder


@pytest.mark.parametrize("option", REFUSED)
def test_an_option_that_alters_the_weights_is_refused_by_name(plain_adapter, tmp_path, option):
    with pytest.raises(UnsupportedAdapter, match=option):
        Adapter.open(changed(plain_adapter, tmp_path, **{option: REFUSED[option]}))


@pytest.mark.parametrize("start", ["olora", "corda", "loftq", "lora_ga", "pissa", "mica"])
def test_an_initialisation_that_moved_the_base_weights_is_refused(plain_adapter, tmp_path, start):
    with pytest.raises(UnsupportedAdapter, match="path_initial_model_for_weight_conversion"):
        Adapter.open(changed(plain_adapter, tmp_path, init_lora_weights=start))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"r": 0}, "r = 0"),
        ({"r": 8}, "rank should be 8"),
        ({"lora_alpha": "x"}, "lora_alpha"),
        ({"rank_pattern": {"(": 4}}, "no regular expression"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"use_dora": True}, "use_dora"),
    ],
)
def test_a_configuration_that_contradicts_the_tensors_is_refused(plain_adapter, tmp_path, options, problem):
    with pytest.raises(InvalidAdapter, match=problem):
        Adapter.open(changed(plain_adapter, tmp_path, **options))


def test_missing_and_broken_files_are_named(plain_adapter, tmp_path):
    with pytest.raises(InvalidAdapter, match=r"adapter_config\.json is missing"):
        Adapter.open(tmp_path)
    folder = shutil.copytree(plain_adapter, tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InvalidAdapter, match=r"pickle \(adapter_model\.bin\)"):
        Adapter.open(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(InvalidAdapter, match="not valid JSON"):
        Adapter.open(folder)


def test_an_adapter_of_another_model_names_modules_and_shapes(plain_adapter):
    adapter = Adapter.open(plain_adapter)
    with pytest.raises(AdapterMismatch, match=r"14 of its 14 tensors match nothing here: layers\.0"):
        adapter.unused(["transformer.h.0.attn.c_attn.weight"])
    with pytest.raises(AdapterMismatch, match=r"\[64, 32\] here and \[32, 32\]"):
        adapter.merge("model.layers.0.self_attn.q_proj.weight", np.zeros((64, 32), np.float32))


def test_values_that_are_not_finite_are_refused(plain_adapter, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(plain_adapter, tmp_path / "nan")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name][:] = np.nan
    save_file(tensors, file)
    adapter = Adapter.open(folder)
    module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
    shape = (adapter.factors(module.removeprefix("model.")).b.shape[0], tensors[name].shape[1])
    if ".lora_A" in name:
        with pytest.raises(InvalidAdapter, match="not finite"):
            adapter.merge(f"{module}.weight", np.zeros(shape, np.float32))


def test_tensor_file_reads_every_float_type_as_float32(tmp_path):
    from safetensors.torch import save_file

    values = torch.tensor([[1.5, -2.0], [0.25, 3.0]])
    kinds = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    save_file({name: values.to(kind) for name, kind in kinds.items()}, tmp_path / "x.safetensors")
    file = TensorFile.open(tmp_path / "x.safetensors")
    for name in kinds:
        assert file.read(name).dtype == np.float32
        np.testing.assert_array_equal(file.read(name), values.numpy())
