"""Which family a config.json belongs to; an architecture that is none of them is refused by name."""

from collections.abc import Mapping
from typing import Any

from quantize.errors import QuantizeError
from quantize.families.config import Config
from quantize.families.gemma3 import GEMMA3
from quantize.families.llama import LLAMA, MISTRAL
from quantize.families.phi3 import PHI3
from quantize.families.qwen import QWEN2, QWEN3
from quantize.families.recipe import Family

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3, PHI3)


class UnsupportedArchitecture(QuantizeError):
    """A model class that no family converts."""

    def __init__(self, found: object) -> None:
        known = ", ".join(name for family in FAMILIES for name in family.classes)
        super().__init__(
            f"config.json: architectures = {found!r} is not supported; supported: {known}. "
            "Give a GGUF of this model instead: F32, F16 and BF16 files can be quantized too"
        )


def recognise(values: Mapping[str, Any]) -> tuple[Family, Config]:
    """The family of a config.json and its configuration, checked."""
    names = values.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    family = next((family for family in FAMILIES if name in family.classes), None)
    if family is None:
        raise UnsupportedArchitecture(names)
    text = values.get("text_config")
    merged = {**values, **text} if isinstance(text, dict) else values
    config = Config(merged, family.defaults)
    family.check(config)
    return family, config
