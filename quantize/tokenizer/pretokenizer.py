"""Name the rule by which a byte-level tokenizer splits text, as llama.cpp knows it (`tokenizer.ggml.pre`).

llama.cpp has each rule compiled in under a name. A tokenizer is recognised by the tokens it makes of one
fixed text (the hash that llama.cpp's converter publishes), else by the rule itself, written in
tokenizer.json. Anything else is refused: a wrong rule makes a model that is quietly worse.
"""

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from tokenizers import Tokenizer

from quantize.errors import QuantizeError
from quantize.tokenizer.pieces import normalizers

#: Numbers, spaces, emoji, scripts and contractions: what the rules disagree on.
CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n"
    "🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, "
    "'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)

#: sha256 of str(token ids of CHECK_TEXT, special tokens included) -> name; tokenizers that models of our
#: families use, as published with llama.cpp's converter
HASHES = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
    "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "b0a6b1c0bd5998ebd9df08611efde34a4ff03faed45ae09c43e6b31ebd4b94cf": "a.x-4.0",
    "4a2e2abae11ca2b86d570fc5b44be4d5eb5e72cc8f22dd136a94b37da83ab665": "kormo",
    "862f827721df956049dff5ca81a57f29e575280bc622e290d3bf4e35eca29015": "f2llmv2",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",
    "0e9433cbbb161f89e264eb32e8e64bfe69e834973ffca5d41d3948a604a3e2a3": "pixtral",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "0fe1cf6eda062318a1af7270f3331a85c539a01778ff948e24388e949c5282f4": "gpt-2",
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",
    "a8594e3edff7c29c003940395316294b2c623e09894deebbc65f33f1515df79e": "dbrx",
    "1431a23e583c97432bc230bff598d103ddb5a1f89960c8f1d1051aaa944d0b35": "minerva-7b",
    "d4c8f286ea6b520b3d495c4455483cfa2302c0cfcd4be05d781b6a8a0a7cdaf1": "megrez",
    "d5f1dd6f980fec569fb218a81a7658ac45fc56b38c5a0adeb1c232fbe04ef5ec": "seed-coder",
    "1994ffd01900cfb37395608534236ecd63f2bd5995d6cb1004dda1af50240f15": "trillion",
    "f6791d196f87ce6b56a7d234be618e0d58f8cda3549416635b2bebcd22cd95c4": "midm-2.0",
    "36f3066e97b7f3994b379aaacde306c1444c6ae84e81a5ae3cd2b7ed3b8c42d4": "minicpm5",
}

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    + _ENDING
    + r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    + _ENDING
    + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: (the steps that split text, whole words looked up before merging) -> name
RULES = {
    ((_WORDS + r"\p{N}{1,3}" + _REST, "bytes"), True): "llama-bpe",
    ((_WORDS + r"\p{N}" + _REST, "bytes"), False): "qwen2",
    ((_TEKKEN, "bytes"), True): "tekken",
    ((_GPT4O, "bytes"), False): "gpt-4o",
    (("digits", "words"), False): "smollm",
    (("words",), False): "gpt-2",
}
#: Names that llama.cpp accepts and `--pre` therefore too.
NAMES = sorted(
    set(HASHES.values())
    | {
        "default",
        "llama3",
        "llama-v3",
        "llama4",
        "mpt",
        "starcoder",
        "refact",
        "command-r",
        "stablelm2",
        "olmo",
    }
    | {
        "phi-2",
        "poro-chat",
        "viking",
        "jais",
        "codeshell",
        "bloom",
        "exaone",
        "exaone4",
        "superbpe",
        "deepseek-v3",
    }
    | {"falcon", "granite-docling", "bailingmoe", "hunyuan-dense", "gigachat", "mellum", "lfm2", "qwen35"}
)


class UnknownPretokenizer(QuantizeError):
    """A byte-level tokenizer whose rule has no known name, or a name llama.cpp does not know."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"{problem}; name the rule with --pre, one of: {', '.join(NAMES)}")


def check_name(pre: str) -> str:
    """The name itself where llama.cpp has a rule of that name."""
    if pre not in NAMES:
        raise UnknownPretokenizer(f"--pre {pre} is no rule that llama.cpp knows")
    return pre


def identify(tokenizer: Tokenizer, spec: Mapping[str, Any], *, pre: str | None = None) -> str:
    """The name for `tokenizer.ggml.pre`; `spec` is tokenizer.json, `pre` the user's own choice."""
    if pre is not None:
        return check_name(pre)
    digest = fingerprint(tokenizer)
    name = HASHES.get(digest) or RULES.get((_steps(spec), bool(spec["model"].get("ignore_merges"))))
    if name is None:
        raise UnknownPretokenizer(f"tokenizer.json splits text by an unknown rule (check text hash {digest})")
    return name


def fingerprint(tokenizer: Tokenizer) -> str:
    """Hash of the tokens of CHECK_TEXT, special tokens included."""
    return sha256(str(tokenizer.encode(CHECK_TEXT).ids).encode()).hexdigest()


def _steps(spec: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The splitting steps of tokenizer.json in the words of RULES, None where one is foreign.

    A normalizer is foreign too, but for NFC, which changes rare texts only and is noted.
    """
    if set(normalizers(spec)) - {"NFC"}:
        return None
    outer = spec.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    names = tuple(_step(step) for step in steps)
    return None if None in names else names  # type: ignore[return-value]


def _step(step: Mapping[str, Any]) -> str | None:
    kind = step.get("type")
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return step.get("pattern", {}).get("Regex")
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "words" if step.get("use_regex", True) else "bytes"
    return None
