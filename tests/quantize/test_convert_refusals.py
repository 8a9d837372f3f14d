"""A checkpoint that cannot be converted is refused by name, with a remedy, and leaves nothing behind."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.tensors import InvalidSafetensors
from quantize.checkpoint import InvalidCheckpoint
from quantize.convert import convert
from quantize.describe import describe_checkpoint
from quantize.families.config import UnsupportedConfig
from quantize.families.supported import UnsupportedArchitecture
from quantize.plan import TensorMismatch, ValueOutOfRange
from quantize.tokenizer.files import MissingTokenizer
from quantize.tokenizer.pieces import UnsupportedTokenizer

WEIGHTS = "model.safetensors"


@pytest.fixture
def refused(checkpoint, tmp_path):
    """A function: (error, pattern) asserts that converting and describing the checkpoint raise it."""

    def check(error, pattern, **options):
        out = tmp_path / "out" / "model.gguf"
        out.parent.mkdir()
        with pytest.raises(error, match=pattern):
            convert(checkpoint, out, **options)
        assert list(out.parent.iterdir()) == [], "a refused conversion left a file"

    return check


def edit(checkpoint, **values):
    """Change config.json; a value of None removes the key."""
    path = checkpoint / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def shard(checkpoint):
    """Split the weights in two files with an index; returns the index's path."""
    weights = load_file(checkpoint / WEIGHTS)
    (checkpoint / WEIGHTS).unlink()
    names = sorted(weights)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: weights[name] for name in held}, checkpoint / file)
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {name: file for file, held in files.items() for name in held}})
    )
    return index


def test_sharded_checkpoint_converts_to_the_same_bytes(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "single.gguf")
    shard(checkpoint)
    convert(checkpoint, tmp_path / "sharded.gguf")
    assert (tmp_path / "sharded.gguf").read_bytes() == (tmp_path / "single.gguf").read_bytes()


def test_unknown_architecture_lists_those_supported(checkpoint, refused):
    edit(checkpoint, architectures=["MixtralForCausalLM"])
    refused(UnsupportedArchitecture, r"MixtralForCausalLM.*LlamaForCausalLM.*Phi3ForCausalLM")


def test_folder_without_config_is_refused(checkpoint, refused):
    (checkpoint / "config.json").unlink()
    refused(InvalidCheckpoint, r"config\.json")


def test_broken_config_is_refused(checkpoint, refused):
    (checkpoint / "config.json").write_text("{")
    refused(InvalidCheckpoint, r"config\.json: is not JSON")


def test_missing_tokenizer_is_refused_with_the_call_that_saves_one(checkpoint, refused):
    (checkpoint / "tokenizer.json").unlink()
    refused(MissingTokenizer, r"tokenizer\.json nor tokenizer\.model.*AutoTokenizer")


def test_missing_tokenizer_is_told_before_anything_is_written(checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(MissingTokenizer):
        describe_checkpoint(checkpoint)


def test_missing_shard_is_named(checkpoint, refused):
    shard(checkpoint)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    refused(InvalidCheckpoint, r"1 of 2 weight files are missing: model-00002-of-00002\.safetensors")


def test_shards_without_index_are_refused(checkpoint, refused):
    shard(checkpoint).unlink()
    refused(InvalidCheckpoint, r"no model\.safetensors\.index\.json")


def test_index_that_names_a_file_elsewhere_is_refused(checkpoint, refused):
    index = shard(checkpoint)
    index.write_text(index.read_text().replace("model-00001-of", "../model-00001-of"))
    refused(InvalidCheckpoint, r"index\.json: names")


def test_index_that_disagrees_with_its_shards_names_the_tensor(checkpoint, refused):
    index = shard(checkpoint)
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map["model.extra.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map}))
    refused(InvalidCheckpoint, r"lacks tensor 'model\.extra\.weight'")


def test_truncated_weights_are_refused(checkpoint, refused):
    data = (checkpoint / WEIGHTS).read_bytes()
    (checkpoint / WEIGHTS).write_bytes(data[: len(data) // 2])
    refused(InvalidSafetensors, "truncated")


def test_header_that_lies_about_its_length_is_refused(checkpoint, refused):
    data = (checkpoint / WEIGHTS).read_bytes()
    (checkpoint / WEIGHTS).write_bytes((1 << 40).to_bytes(8, "little") + data[8:])
    refused(InvalidSafetensors, "header")


def test_pickled_weights_are_refused_with_the_call_that_saves_safetensors(checkpoint, refused):
    (checkpoint / WEIGHTS).rename(checkpoint / "pytorch_model.bin")
    refused(InvalidCheckpoint, r"pickled weights \(pytorch_model\.bin\).*save_pretrained")


def test_folder_without_weights_is_refused(checkpoint, refused):
    (checkpoint / WEIGHTS).unlink()
    refused(InvalidCheckpoint, r"no \*\.safetensors")


def change_weights(checkpoint, change):
    weights = load_file(checkpoint / WEIGHTS)
    change(weights)
    save_file(weights, checkpoint / WEIGHTS)


def test_missing_tensor_is_named(checkpoint, refused):
    change_weights(checkpoint, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    refused(TensorMismatch, r"1 tensors are missing: model\.layers\.1\.mlp\.up_proj\.weight")


def test_unexpected_tensor_is_named(checkpoint, refused):
    extra = {"model.layers.0.self_attn.q_norm.weight": np.ones(16, np.float32)}
    change_weights(checkpoint, lambda weights: weights.update(extra))
    refused(TensorMismatch, r"no place in this architecture: model\.layers\.0\.self_attn\.q_norm\.weight")


def test_rotary_table_of_older_checkpoints_is_left_out(checkpoint, tmp_path):
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    change_weights(checkpoint, lambda weights: weights.update(table))
    header = convert(checkpoint, tmp_path / "out.gguf")
    assert not [tensor.name for tensor in header.tensors if "rot" in tensor.name]


def test_shape_that_disagrees_with_config_gives_both(checkpoint, refused):
    edit(checkpoint, intermediate_size=128)
    refused(TensorMismatch, r"mlp\.(gate|up|down)_proj.*96.*128")


def test_integer_weights_are_refused(checkpoint, refused):
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(checkpoint, lambda weights: weights.update({name: np.ones((96, 64), np.int8)}))
    refused(TensorMismatch, rf"{re.escape(name)} is stored as I8")


def test_weight_beyond_float16_is_refused_for_f16(checkpoint, refused):
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(checkpoint, lambda weights: weights[name].fill(1e6))
    refused(ValueOutOfRange, rf"{re.escape(name)} holds 1e\+06", dtype="F16")


def test_weight_beyond_float16_in_a_float16_checkpoint_keeps_its_own_type(checkpoint, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"

    def halve(weights):
        for key in weights:
            weights[key] = weights[key].astype(np.float32 if key == name else np.float16)
        weights[name].fill(1e6)

    change_weights(checkpoint, halve)
    header = convert(checkpoint, tmp_path / "out.gguf")
    types = {tensor.name: tensor.type.name for tensor in header.tensors if len(tensor.shape) > 1}
    assert types.pop("blk.0.ffn_up.weight") == "F32"
    assert set(types.values()) == {"F16"}
    assert header.metadata["general.file_type"] == 1


@pytest.mark.parametrize(
    ("card", "problem"),
    [
        (b"---\nlicense: [mit\n---\n", "while parsing a flow sequence"),
        ("---\nname: Modèle\n---\n".encode("latin-1"), "can't decode byte 0xe8"),
        (b"---\n\x00: 1\n---\n", "special characters are not allowed"),
    ],
)
def test_model_card_that_cannot_be_read_is_named_with_the_remedy(card, problem, checkpoint, refused):
    (checkpoint / "README.md").write_bytes(card)
    refused(InvalidCheckpoint, rf"README\.md: its front matter cannot be read .*{problem}.*remove the file")


def test_model_card_with_numbers_for_texts_is_read(checkpoint, tmp_path):
    (checkpoint / "README.md").write_text("---\nname: 5\nlicense: 1.0\ntags: [2]\nbase_model: 3\n---\n")
    metadata = convert(checkpoint, tmp_path / "out.gguf").metadata
    assert (metadata["general.name"], metadata["general.license"]) == ("5", "1.0")


def test_quantized_checkpoint_is_refused(checkpoint, refused):
    edit(checkpoint, quantization_config={"quant_method": "gptq"})
    refused(UnsupportedConfig, r"quant_method = 'gptq'.*full-precision")


def test_added_token_without_text_is_refused(checkpoint, refused):
    (checkpoint / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"5": {"special": true}}}')
    refused(InvalidCheckpoint, r"tokenizer_config\.json: has an added token without text or number: '5'")


def test_unigram_tokenizer_is_refused(checkpoint, refused):
    unigram = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]},
    }
    (checkpoint / "tokenizer.json").write_text(json.dumps(unigram))
    refused(UnsupportedTokenizer, "Unigram")


def test_existing_file_survives_a_refused_conversion(checkpoint, tmp_path):
    out = tmp_path / "model.gguf"
    out.write_text("precious")
    edit(checkpoint, hidden_act="gelu")
    with pytest.raises(UnsupportedConfig, match=r"hidden_act = 'gelu'"):
        convert(checkpoint, out)
    assert out.read_text() == "precious"
