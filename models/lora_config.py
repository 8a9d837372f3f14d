"""adapter_config.json of a PEFT LoRA: what each option means for the merged weights.

An option that changes the weights in a way not implemented here is refused by name, an unknown one too;
nothing is ignored in the hope that it does not matter. Knows no tensors.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import ModelsError

#: Read below, or without effect on inference: training, initialisation of A and B, bookkeeping.
_NEUTRAL = frozenset(
    {
        "alora_version", "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias",
        "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
        "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
        "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save",
        "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
        "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora", "velora_config",
    }
)  # fmt: skip
#: Initialisations that leave the base model's own weights as they are.
_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "true", "false"})
_REMEDIES = {
    "lora_bias": "merge it with PEFT's merge_and_unload and give the merged checkpoint",
    "trainable_token_indices": "merge it with PEFT's merge_and_unload and give the merged checkpoint",
    "alora_invocation_tokens": "an activated LoRA has no merged form; serve the base model without it",
    "arrow_config": "a router over adapters has no merged form; give one of its adapters",
    "monteclora_config": "a sampled adapter has no merged form",
}


class UnsupportedAdapter(ModelsError):
    """An adapter that cannot be merged exactly; names the option, its value and the remedy."""

    def __init__(self, path: Path, option: str, value: object, remedy: str | None = None) -> None:
        remedy = remedy or _REMEDIES.get(option, "merge it with PEFT's merge_and_unload where it was trained")
        shown = json.dumps(value, default=str)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        super().__init__(f"{path}: the adapter uses {option} = {shown}, which is not supported; {remedy}")
        self.option = option


class InvalidAdapter(ModelsError):
    """An adapter whose files are missing, broken or contradict each other."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: not a usable PEFT adapter: {problem}")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The options that decide the merged weights."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    ensure_weight_tying: bool
    base_model: str | None

    def rank_of(self, module: str) -> int:
        return int(self.rank_pattern.get(_matching(self.rank_pattern, module), self.rank))

    def scale_of(self, module: str) -> float:
        """The factor s of W + s B A: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        rank = self.rank_of(module)
        alpha = float(self.alpha_pattern.get(_matching(self.alpha_pattern, module), self.alpha))
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _matching(patterns: Mapping[str, object], module: str) -> str:
    """The first pattern that matches the module's path, as PEFT matches; else the path itself."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), module)


def read_config(folder: Path) -> LoraConfig:
    """The checked configuration; raises UnsupportedAdapter or InvalidAdapter."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise InvalidAdapter(folder, "adapter_config.json is missing; give the folder that PEFT saved")
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(folder, f"adapter_config.json is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise InvalidAdapter(folder, "adapter_config.json is not a JSON object")
    _refuse_unsupported(folder, config)
    return LoraConfig(
        rank=_field(folder, config, "r", _is_rank),
        alpha=_field(folder, config, "lora_alpha", _is_number),
        rank_pattern=_pattern(folder, config, "rank_pattern", _is_rank),
        alpha_pattern=_pattern(folder, config, "alpha_pattern", _is_number),
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        ensure_weight_tying=bool(config.get("ensure_weight_tying")),
        base_model=config.get("base_model_name_or_path"),
    )


def _refuse_unsupported(folder: Path, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedAdapter(
            folder, "peft_type", kind, "only LORA is; train a LoRA, rsLoRA or DoRA adapter"
        )
    if config.get("bias", "none") != "none":
        raise UnsupportedAdapter(folder, "bias", config["bias"])
    start = str(config.get("init_lora_weights", True)).lower()
    if start not in _PLAIN_INITS:
        raise UnsupportedAdapter(
            folder,
            "init_lora_weights",
            config["init_lora_weights"],
            "it changed the base weights before training; save the adapter as a plain LoRA with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    for option, value in config.items():
        if option not in _NEUTRAL and value:
            raise UnsupportedAdapter(folder, option, value)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _field(folder: Path, config: dict[str, Any], name: str, accept: Callable[[object], bool]) -> Any:
    if not accept(config.get(name)):
        raise InvalidAdapter(
            folder, f"{name} = {config.get(name)!r} in adapter_config.json, expected a number"
        )
    return config[name]


def _pattern(
    folder: Path, config: dict[str, Any], name: str, accept: Callable[[object], bool]
) -> dict[str, Any]:
    pattern = config.get(name) or {}
    if not isinstance(pattern, dict) or not all(accept(value) for value in pattern.values()):
        raise InvalidAdapter(folder, f"{name} in adapter_config.json is not a table of numbers")
    for key in pattern:
        try:
            re.compile(key)
        except re.error as error:
            raise InvalidAdapter(folder, f"{name}: {key!r} is no regular expression ({error})") from None
    return pattern
