"""Configurations in every spelling; what a GGUF cannot express is refused by the key's name."""

import gguf
import numpy as np
import pytest

from quantize.families.config import UnsupportedConfig
from quantize.families.rope import llama3_factors, read_rope
from quantize.families.supported import FAMILIES, recognise

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


def keys(architecture, **values):
    """The metadata a configuration becomes, less the architecture's prefix."""
    family, config = recognise({"architectures": [architecture], **SIZES, **values})
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[family.architecture])
    family.hyperparameters(config, writer)
    return {key.partition(".")[2]: value.value for key, value in writer.kv_data[0].items()}


def notes(architecture, **values):
    """What the user is told of a configuration."""
    family, config = recognise({"architectures": [architecture], **SIZES, **values})
    return family.notes(config)


def test_old_and_new_spelling_of_rope_are_the_same():
    old = keys("LlamaForCausalLM", rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    new = keys("LlamaForCausalLM", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    assert old == new
    assert (old["rope.freq_base"], old["rope.scaling.type"], old["rope.scaling.factor"]) == (
        5e5,
        "linear",
        2.0,
    )


def test_missing_values_are_those_of_the_transformers_class():
    import transformers

    for family in FAMILIES:
        if family.name == "gemma3":
            reference = transformers.Gemma3TextConfig()
        else:
            reference = getattr(transformers, family.classes[0].replace("ForCausalLM", "Config"))()
        for key, value in family.defaults.items():
            if key in ("rope_theta", "rope_local_base_freq", "sliding_window_pattern"):
                continue  # these live elsewhere in a transformers configuration
            assert getattr(reference, key) == value, f"{family.name}: {key}"


def test_nested_rope_of_gemma3_gives_both_bases():
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    found = keys(
        "Gemma3ForCausalLM", head_dim=16, query_pre_attn_scalar=16, sliding_window=512, rope_parameters=rope
    )
    assert (found["rope.freq_base"], found["rope.freq_base_swa"]) == (1e6, 2e4)
    assert (found["rope.scaling.factor"], found["attention.sliding_window"]) == (8.0, 512)
    assert "attention.sliding_window_pattern" not in found, "two layers slide in the usual pattern too"


def test_gemma3_text_part_needs_no_sizes_that_its_class_has():
    family, config = recognise(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": {"hidden_size": 2560, "num_hidden_layers": 34},
        }
    )
    assert (config.head_dim, config.n_head_kv, config.integer("vocab_size")) == (256, 4, 262_208)
    assert len(family.recipes(config)) == 3 + 34 * 13


@pytest.mark.parametrize(
    ("architecture", "values"),
    [
        ("MistralForCausalLM", {"sliding_window": 4096}),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}),
        ("Phi3ForCausalLM", {"sliding_window": 4096}),
    ],
)
def test_window_that_llama_cpp_lacks_is_noted_and_the_context_stays_whole(architecture, values):
    values = {"max_position_embeddings": 32_768, **values}
    assert keys(architecture, **values)["context_length"] == 32_768
    (note,) = notes(architecture, **values)
    assert "a window of 4096 tokens" in note
    assert "up to its 32768" in note


@pytest.mark.parametrize(
    ("architecture", "values"),
    [
        ("MistralForCausalLM", {"sliding_window": None}),
        ("Qwen2ForCausalLM", {"use_sliding_window": False, "sliding_window": 4096}),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "max_window_layers": 2}),
        ("LlamaForCausalLM", {"sliding_window": 4096}),
    ],
)
def test_window_that_is_not_used_is_no_matter(architecture, values):
    assert notes(architecture, max_position_embeddings=32_768, **values) == ()


#: What Phi-4-mini's config.json says.
PHI4_MINI = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 200_064,
    "max_position_embeddings": 131_072,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75,
    "rope_theta": 10_000.0,
    "rope_scaling": {"type": "longrope", "long_factor": [2.0] * 48, "short_factor": [1.0] * 48},
    "sliding_window": 262_144,
    "tie_word_embeddings": True,
}


def test_phi4_mini_rotates_a_part_of_each_head_and_stretches_it_by_two_sets_of_factors():
    found = keys("Phi3ForCausalLM", **PHI4_MINI)
    assert (found["rope.dimension_count"], found["context_length"]) == (96, 131_072)
    assert found["rope.scaling.original_context_length"] == 4096
    assert found["rope.scaling.attn_factor"] == pytest.approx(1.1902380714238083)  # sqrt(1 + ln 32 / ln 4096)
    family, config = recognise({"architectures": ["Phi3ForCausalLM"], **PHI4_MINI})
    shapes = {recipe.target: recipe.shape for recipe in family.recipes(config)}
    assert shapes["blk.31.attn_qkv.weight"] == ((24 + 2 * 8) * 128, 3072)
    factors = family.generated(config)
    assert {name: len(values) for name, values in factors.items()} == {
        "rope_factors_long.weight": 48,
        "rope_factors_short.weight": 48,
    }
    (note,) = family.notes(config)
    assert "more than 4096 tokens" in note


def test_factors_for_the_whole_head_do_not_fit_a_part_that_rotates():
    scaling = {"type": "longrope", "long_factor": [2.0] * 64, "short_factor": [1.0] * 64}
    with pytest.raises(UnsupportedConfig, match="must hold 48 numbers"):
        use("Phi3ForCausalLM", {**PHI4_MINI, "rope_scaling": scaling})


REFUSALS = {
    "hidden_act": ("LlamaForCausalLM", {"hidden_act": "gelu"}),
    "rope_scaling.rope_type": ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "rope_scaling.factor": ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "linear"}}),
    "rope_scaling.beta_fast": (
        "LlamaForCausalLM",
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}},
    ),
    "rope_scaling.long_factor": (
        "Phi3ForCausalLM",
        {"rope_scaling": {"type": "longrope", "long_factor": [1.0]}},
    ),
    "partial_rotary_factor": ("Qwen2ForCausalLM", {"partial_rotary_factor": 0.5}),
    "head_dim": ("Qwen2ForCausalLM", {"head_dim": 32}),
    "num_key_value_heads": ("LlamaForCausalLM", {"num_key_value_heads": 3}),
    "hidden_size": ("LlamaForCausalLM", {"hidden_size": 0}),
    "attention_bias": ("Qwen3ForCausalLM", {"attention_bias": True}),
    "query_pre_attn_scalar": ("Gemma3ForCausalLM", {"head_dim": 16}),
    "use_bidirectional_attention": ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}),
    "attn_logit_softcapping": ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}),
    "layer_types": (
        "Gemma3ForCausalLM",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "layer_types": ["chunked_attention"] * 2},
    ),
    "tie_word_embeddings": ("LlamaForCausalLM", {"tie_word_embeddings": "yes"}),
}


def use(architecture, values):
    """All that a conversion asks of a configuration."""
    keys(architecture, **values)
    family, config = recognise({"architectures": [architecture], **SIZES, **values})
    family.recipes(config)
    family.generated(config)
    config.flag("tie_word_embeddings")


@pytest.mark.parametrize("key", REFUSALS)
def test_what_a_gguf_cannot_express_is_refused_by_name(key):
    with pytest.raises(UnsupportedConfig, match=rf"config\.json: {key.replace('.', '[.]')} = "):
        use(*REFUSALS[key])


def test_llama3_factors_leave_short_waves_alone_and_stretch_long_ones():
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    values = {"hidden_size": 4096, "num_attention_heads": 32, "rope_theta": 5e5, "rope_scaling": scaling}
    _, config = recognise({"architectures": ["LlamaForCausalLM"], **SIZES, **values})
    factors = llama3_factors(read_rope(config, accepts=("llama3",)), config)
    waves = 2 * np.pi * 5e5 ** (np.arange(64) / 64)
    assert (factors[waves < 8192 / 4] == 1).all()
    assert (factors[waves > 8192] == 8).all()
    assert np.diff(factors).min() >= 0
