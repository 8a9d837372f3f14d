"""Text becomes the same token ids in llama.cpp, from our GGUF, as in Hugging Face's tokenizers."""

import pytest
from tokenizers import Tokenizer

from engine.llama import Model
from quantize.convert import convert

WORDS = [
    "Hello world",
    "안녕하세요, 세계!",
    "한국어 문장을 토큰으로 나눕니다.",
    "가나다라마바사아자차카타파하",
    "ㅋㅋㅋㅋㅎㅎ",
    "대한민국 서울특별시 강남구 123-45번지",
    "你好，世界",
    "今日は良い天気ですね。",
    "繁體中文測試",
    "カタカナとひらがな",
    "ภาษาไทยไม่มีช่องว่าง",
    "नमस्ते दुनिया",
    "مرحبا بالعالم",
    "שלום עולם",
    "Привет, мир!",
    "Γειά σου Κόσμε",
    "Xin chào thế giới",
    "Đường phố Hà Nội",
    "Größe straße ÄÖÜ",
    "naïve café résumé",
    "İstanbul ığüşöç",
    "🙂",
    "🚀🚀🚀",
    "👩‍👩‍👧‍👦 family",
    "🇰🇷🇺🇸",
    "👍🏽 ok",
    "❤️‍🔥",
    "text🙂text",
    "½ ¼ ² ³ ① Ⅷ",
    "١٢٣٤٥",
    "१२३",
    "e\u0301 combining",
    "n\u0303o\u0308",
    "a\u0300\u0316\u0323",
    "\u1112\u1161\u11ab",
    "Z\u0351\u036b\u0343a\u0334lgo",
]
SPACES = [
    "",
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n",
    "\r\n",
    " \n ",
    "\n\n\n\n",
    "a  b",
    "a   b    c",
    " leading",
    "trailing ",
    "  two leading",
    "trailing two  ",
    "tab\tseparated\tvalues",
    "line\nline\n\nline",
    "mixed \t \n \r\n end",
    "\u00a0nbsp\u00a0",
    "\u3000ideographic space",
    "\u2003em\u2009thin",
    "zero\u200bwidth\u200djoiner",
    "\ufeffbom",
    "soft\u00adhyphen",
    "\x00nul",
    "bell\x07esc\x1b[0m",
    "\x7fdel\x80c1\x9f",
    "word \n",
    "\n word",
    "          ten",
    "\t\ttabs",
    " \t \t ",
    "x\u2028y\u2029z",
]
CODE = [
    'def f(x: int) -> str:\n    return f"{x!r}"\n',
    "for (int i = 0; i < n; ++i) { a[i] += b[i]; }",
    "#include <stdio.h>\nint main(void) { return 0; }",
    "SELECT * FROM t WHERE a='b' AND c<>1;",
    '<div class="x">&nbsp;</div>',
    '{"key": [1, 2.5, null, true]}',
    "```python\nprint('hi')\n```",
    "a->b::c()",
    "x = y if z else w  # comment",
    "C:\\Users\\name\\file.txt",
    "/usr/local/bin/env",
    "https://example.com/path?q=1&r=a%20b#frag",
    "user@example.com",
    "$PATH ${HOME} $(pwd)",
    "\\n\\t\\\\",
    "lambda x: x**2",
    "0xDEADBEEF 0b1010 1e-9",
    "i++ && --j || !k",
    "\tif (x) {\n\t\treturn;\n\t}",
    "| a | b |\n|---|---|\n",
    "### Heading\n\n- item\n- item",
    "camelCaseAndPascalCase snake_case SCREAMING_CASE",
    "HTTPServer2XMLParser",
    "===>>>",
    "......",
    "?!?!",
    "---",
    "***bold***",
    "«quoted» “curly” ‘single’",
    "—em– dash",
]
ENGLISH = [
    "I'm you're he's we've they'd I'll don't",
    "I'M YOU'RE HE'S WE'VE",
    "it's 'quoted' text",
    "O'Neil's rock 'n' roll",
    "1",
    "12",
    "123",
    "1234",
    "12345678901234567890",
    "3.14159",
    "1,234,567.89",
    "-42",
    "2024-12-31T23:59:59Z",
    "50%",
    "$9.99 €10 £5 ¥100 ₩1000",
    "A",
    "a",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "The quick brown fox jumps over the lazy dog.",
    "supercalifragilisticexpialidocious",
    "e.g. i.e. etc.",
    "U.S.A.",
    "x² + y² = z²",
    "H₂O CO₂",
    "α β γ ∑ ∫ √ ∞ ≠ ≤",
    "← ↑ → ↓ ⇒",
    "█▓▒░ ┌─┐│└┘",
    "♠♣♥♦ ♪♫",
    "™®©",
    "ﬁ ﬂ ligature",
    "ＦＵＬＬＷＩＤＴＨ１２３",
    "ₐᵇᶜ",
    "𝕳𝖊𝖑𝖑𝖔 𝓦𝓸𝓻𝓵𝓭",
    "🅰🅱",
    "𠮷野家",
    "\ud7a3\uac00",
    "\ue000 private",
    "\ufffd replacement",
    "\U0010ffff last",
    "~`!@#$%^&*()_+-={}[]|:;<>?,./",
]
SPECIAL = [
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<|endoftext|>",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
    "[INST] hi [/INST]",
    "[INST]hi[/INST]</s>",
    "<start_of_turn>user\nhi<end_of_turn>\n",
    "<bos>text<eos>",
    "text</s>text",
    "text </s> text",
    " <s> ",
    "<s>  two",
    "<think>\nhm\n</think>\n\nyes",
    '<tool_call>{"a":1}</tool_call>',
    "<|not_special|>",
    "<|im_start",
    "<0x0A>",
    "<0x41>B",
    "▁",
    "▁▁",
    "a▁b",
    "Ġ",
    "Ċ",
    "[PAD0]",
    "<unused0>",
    "<|fim_prefix|>x<|fim_suffix|>y<|fim_middle|>",
    "<|user|>\nhi<|end|>\n<|assistant|>\n",
]

TRICKY = WORDS + SPACES + CODE + ENGLISH + SPECIAL + [f"{a} {b}" for a, b in zip(WORDS, CODE, strict=False)]

# What llama.cpp itself does otherwise than Hugging Face. A GGUF has no key to change any of it: the files
# that llama.cpp's own converter writes of these tokenizers have the same tokens, types, merges and rule.
DECOMPOSED = "Qwen's tokenizer composes characters first (NFC); llama.cpp does not normalize"
NORMAL_END = "llama.cpp takes any token spelt </s> for an end of text; to Qwen it is a piece of markup"
MARKS = "llama.cpp's form of the tekken rule breaks words at combining marks"
ESCAPED = "a user-defined token of two escaped spaces is matched as two spaces"
NO_DIGITS = "the rebuilt tokenizer.json lost the rule that splits digits; ½ and ² count as such"
SWALLOWED = "turn tokens swallow what follows them; llama.cpp does that for Phi-3 alone (noted in the report)"
QWEN = {
    "e\u0301 combining": DECOMPOSED,
    "n\u0303o\u0308": DECOMPOSED,
    "a\u0300\u0316\u0323": DECOMPOSED,
    "\u1112\u1161\u11ab": DECOMPOSED,
    "Z\u0351\u036b\u0343a\u0334lgo": DECOMPOSED,
    "</s>": NORMAL_END,
    "[INST]hi[/INST]</s>": NORMAL_END,
    "text</s>text": NORMAL_END,
    "text </s> text": NORMAL_END,
}
THAI, HINDI = "ภาษาไทยไม่มีช่องว่าง", "नमस्ते दुनिया"
FRACTIONS = "½ ¼ ² ³ ① Ⅷ"
EXCEPTIONS = {
    "llama2": {},
    "llama3_2": {},
    "llama3": {},
    "mistral_nemo": {text: MARKS for text in TRICKY if text.startswith((THAI, HINDI))},
    "qwen2_5": QWEN,
    "qwen3": QWEN,
    "gemma3": {"▁▁": ESCAPED},
    "phi3": {},
    "phi4": {"<|user|>\nhi<|end|>\n<|assistant|>\n": SWALLOWED},
    "smollm2": {text: NO_DIGITS for text in TRICKY if text.startswith(FRACTIONS)},
}
CONFIGS = {
    "qwen2_5": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "gemma3": "Gemma3TextConfig",
    "phi3": "Phi3Config",
    "phi4": "Phi3Config",
}


@pytest.fixture(scope="session")
def checkpoint_of(make_tiny, phi3_tokenizer, phi4_tokenizer, smollm2_checkpoint):
    built = {"phi3": phi3_tokenizer, "phi4": phi4_tokenizer}

    def folder(name):
        if name == "smollm2":
            return smollm2_checkpoint
        narrow = {"hidden_size": 32, "num_hidden_layers": 1, "head_dim": 8, "query_pre_attn_scalar": 8}
        return make_tiny(
            CONFIGS.get(name, "LlamaConfig"), built.get(name, name), **narrow, eos_token_id=2, pad_token_id=0
        ).path

    return folder


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_token_ids_equal_those_of_hugging_face(name, checkpoint_of, tmp_path):
    assert len(TRICKY) == 200
    folder = checkpoint_of(name)
    convert(folder, tmp_path / "tiny.gguf")
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    differing = []
    with Model.open(tmp_path / "tiny.gguf", vocab_only=True) as model:
        for text in TRICKY:
            pairs = [
                (
                    model.tokenize(text, add_special=special, parse_special=True),
                    reference.encode(text, add_special_tokens=special).ids,
                )
                for special in (True, False)
            ]
            if any(ours != theirs for ours, theirs in pairs):
                differing.append(text)
    assert differing == [text for text in TRICKY if text in EXCEPTIONS[name]]
