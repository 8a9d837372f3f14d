"""A converted adapter, applied by llama.cpp at load, gives PEFT's own logits."""

import ctypes
import dataclasses
import json

import gguf
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
llama_cpp = pytest.importorskip("llama_cpp")

from models.gguf import read_header  # noqa: E402
from models.lora import AdapterMismatch  # noqa: E402
from models.lora_gguf import TRANSFORMS, NotConvertible, convert_adapter  # noqa: E402

# PEFT and transformers warn about each other; nothing of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:::peft"),
]
TOKENS = [1, 5, 17, 80, 3, 42, 9, 60, 33, 2, 71, 14]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
#: Family -> (class, options of its configuration, projections to adapt).
FAMILIES = {
    "llama": ("Llama", {}, PROJECTIONS),
    "qwen2": ("Qwen2", {}, PROJECTIONS),
    "qwen3": ("Qwen3", {"head_dim": 32}, PROJECTIONS),
    "gemma3": (
        "Gemma3",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64, "tie_word_embeddings": True},
        PROJECTIONS,
    ),
    "phi3": ("Phi3", {"sliding_window": None, "original_max_position_embeddings": 64}, FUSED),
}


def tiny_model(family: str = "llama"):
    import transformers

    name, options, _ = FAMILIES[family]
    config_class = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config_class(**(SIZES | options)))
    for parameter in model.parameters():  # norms and biases are not left at their neutral values
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.eval()


def rotary_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_base(family: str, path):
    """The tiny model as an F32 GGUF without a vocabulary."""
    model = tiny_model(family)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if family == "gemma3":
        writer.add_rope_freq_base(1_000_000.0)
        writer.add_sliding_window(64)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    architecture = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[family]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = tensor.numpy()
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            weight = rotary_rows(weight, 4 if "q_proj" in name else 2)
        if family == "gemma3" and name.endswith("norm.weight"):
            weight = weight + 1
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base("llama", tmp_path_factory.mktemp("base") / "base.gguf")


def save_adapter(folder, family: str = "llama", **options):
    """The model's logits with a random adapter, by PEFT, which is saved into `folder`."""
    model = peft.get_peft_model(tiny_model(family), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder, save_embedding_layers=False)
    with torch.no_grad():
        return model.eval()(torch.tensor([TOKENS])).logits[0].numpy()


def llama_logits(model_path, adapter_path=None) -> np.ndarray:
    """(tokens, vocabulary) logits of llama.cpp, the adapter applied."""
    llama_cpp.llama_log_set(_silence, None)
    model = llama_cpp.llama_model_load_from_file(
        str(model_path).encode(), llama_cpp.llama_model_default_params()
    )
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 64, 1, 1
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32  # the cache must not add rounding of its own
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, params)
    if adapter_path:
        adapter = llama_cpp.llama_adapter_lora_init(model, str(adapter_path).encode())
        assert adapter, "llama.cpp refused the adapter"
        adapters = (type(adapter) * 1)(adapter)
        assert llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0
    batch = llama_cpp.llama_batch_init(len(TOKENS), 0, 1)
    batch.n_tokens = len(TOKENS)
    for index, token in enumerate(TOKENS):
        batch.token[index], batch.pos[index], batch.logits[index] = token, index, 1
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
    assert llama_cpp.llama_decode(context, batch) == 0
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(TOKENS), 96)).copy()
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return logits


@llama_cpp.llama_log_callback
def _silence(_level, _text, _data):
    return None


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_pefts_logits_with_the_adapter(tmp_path, family):
    base = write_base(family, tmp_path / "base.gguf")
    with torch.no_grad():
        plain = tiny_model(family)(torch.tensor([TOKENS])).logits[0].numpy()
    np.testing.assert_allclose(llama_logits(base), plain, atol=2e-4)
    expected = save_adapter(tmp_path / "peft", family, r=4, lora_alpha=8, target_modules=FAMILIES[family][2])
    adapter = convert_adapter(tmp_path / "peft", read_header(base), tmp_path / "adapter.gguf")
    assert np.abs(expected - plain).max() > 0.1, "the adapter changes nothing"
    np.testing.assert_allclose(llama_logits(base, adapter), expected, atol=5e-4)


VARIANTS = {
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS},
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": PROJECTIONS,
        "rank_pattern": {"q_proj": 2, "up_proj": 6},
        "alpha_pattern": {"v_proj": 3, "down_proj": 16},
    },
    "head and embedding": {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "lm_head", "k_proj"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_with_the_adapter_equal_pefts(tmp_path, base, variant):
    expected = save_adapter(tmp_path / "peft", **VARIANTS[variant])
    adapter = convert_adapter(tmp_path / "peft", read_header(base), tmp_path / "adapter.gguf")
    assert read_header(adapter).require("adapter").metadata["adapter.type"] == "lora"
    found = llama_logits(base, adapter)
    assert np.abs(found - llama_logits(base)).max() > 0.1, "the adapter changes nothing"
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_what_llama_cpp_cannot_apply_is_sent_to_quantize(tmp_path, base):
    save_adapter(tmp_path / "dora", r=2, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(NotConvertible, match=r"use_dora.*lq quantize CHECKPOINT --lora .* --out DIR"):
        convert_adapter(tmp_path / "dora", read_header(base), tmp_path / "x.gguf")
    save_adapter(tmp_path / "saved", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(NotConvertible, match="modules_to_save"):
        convert_adapter(tmp_path / "saved", read_header(base), tmp_path / "x.gguf")
    assert not list(tmp_path.glob("x.gguf*"))


def test_a_base_that_was_changed_before_rounding_takes_no_adapter_of_the_checkpoint(tmp_path, base):
    save_adapter(tmp_path / "plain", r=2, target_modules=["q_proj"])
    header = read_header(base)
    changed = dataclasses.replace(header, metadata={**header.metadata, TRANSFORMS: "scale-norms"})
    with pytest.raises(NotConvertible, match=r"base\.gguf were changed before rounding \(scale-norms\)"):
        convert_adapter(tmp_path / "plain", changed, tmp_path / "x.gguf")


def test_an_adapter_of_embeddings_needs_an_untied_head(tmp_path, smollm2_gguf):
    save_adapter(tmp_path, r=2, target_modules=["embed_tokens"])
    with pytest.raises(NotConvertible, match="ties embedding and head"):
        convert_adapter(tmp_path, read_header(smollm2_gguf), tmp_path / "x.gguf")


def test_an_adapter_of_another_model_is_refused_with_the_shapes(tmp_path, smollm2_gguf):
    save_adapter(tmp_path, r=2, target_modules=["v_proj"])
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "org/tiny"}))
    with pytest.raises(AdapterMismatch, match=r"trained on org/tiny.*\[192, 576\] here, \[32, 64\]"):
        convert_adapter(tmp_path, read_header(smollm2_gguf), tmp_path / "x.gguf")


def test_an_architecture_without_proof_is_refused(tmp_path):
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "falcon")
    writer.add_tensor("a", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_adapter(tmp_path / "peft", r=2, target_modules=["v_proj"])
    with pytest.raises(NotConvertible, match=r"'falcon'.*; give a GGUF adapter"):
        convert_adapter(tmp_path / "peft", read_header(path), tmp_path / "out.gguf")
