"""Draw docs/flow.svg, the picture of the flow in the README.

usage: python scripts/draw_flow.py
"""

from pathlib import Path

#: (x, y, title, lines below it, colour); a box is 200 x 78
BOXES = (
    (20, 40, "Hugging Face model", ("safetensors + LoRA adapter",), "#e8eefc"),
    (20, 240, "your documents", ("md html pdf docx csv txt code",), "#e8f6ec"),
    (270, 40, "lq quantize", ("convert, calibrate on its own", "words, quantize, measure"), "#c9d8fb"),
    (270, 240, "lq index", ("parse, chunk 300-1000 tokens,", "embed, SQLite + FAISS"), "#c5e9cf"),
    (520, 40, "GGUF files + report", ("bits, divergence, tokens/s",), "#e8eefc"),
    (520, 240, "collection", ("hybrid search, exact spans",), "#e8f6ec"),
    (520, 140, "prompt file", ("persona, rules, demos",), "#fdf1d8"),
    (770, 140, "lq serve", ("llama.cpp in its own process,", "batched; answers with sources"), "#fbdcd0"),
    (1020, 140, "any OpenAI client", ("curl, openai-python,", "LangChain, lq ask"), "#f3f3f3"),
)
#: (from, to), by title
ARROWS = (
    ("Hugging Face model", "lq quantize"),
    ("your documents", "lq index"),
    ("lq quantize", "GGUF files + report"),
    ("lq index", "collection"),
    ("GGUF files + report", "lq serve"),
    ("prompt file", "lq serve"),
    ("collection", "lq serve"),
    ("lq serve", "any OpenAI client"),
)
WIDTH, HEIGHT = 200, 78


def box(x: int, y: int, title: str, lines: tuple[str, ...], colour: str) -> str:
    """One rounded rectangle with a bold title and one or two lines."""
    middle = x + WIDTH / 2
    first = y + (30 if len(lines) == 2 else 36)
    text = [f'<text x="{middle}" y="{first}" class="title">{title}</text>']
    text += [
        f'<text x="{middle}" y="{first + 20 + 16 * row}" class="line">{line}</text>'
        for row, line in enumerate(lines)
    ]
    frame = (
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="10" fill="{colour}" stroke="#8a93a6"/>'
    )
    return frame + "".join(text)


def arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    """A curve from the right edge of one box to the left edge of another."""
    x1, y1 = start[0] + WIDTH, start[1] + HEIGHT / 2
    x2, y2 = end[0] - 4, end[1] + HEIGHT / 2
    bend = (x1 + x2) / 2
    return f'<path d="M{x1} {y1} C{bend} {y1} {bend} {y2} {x2} {y2}" class="arrow" marker-end="url(#head)"/>'


def main() -> None:
    """Write the picture."""
    places = {title: (x, y) for x, y, title, _, _ in BOXES}
    style = (
        "text{font-family:system-ui,sans-serif;text-anchor:middle;fill:#1f2430}"
        ".title{font-size:15px;font-weight:600}.line{font-size:12px;fill:#4a5162}"
        ".arrow{fill:none;stroke:#5b6478;stroke-width:1.6}"
    )
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="6" refY="4"'
        ' markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#5b6478"/></marker>'
    )
    parts = [arrow(places[a], places[b]) for a, b in ARROWS] + [box(*each) for each in BOXES]
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1240 360" role="img" '
        'aria-label="Model and documents become a grounded OpenAI API">'
        f'<style>{style}</style><defs>{head}</defs><rect width="1240" height="360" fill="#fff"/>'
    )
    target = Path(__file__).parents[1] / "docs" / "flow.svg"
    target.write_text(svg + "".join(parts) + "</svg>\n", "utf-8")


if __name__ == "__main__":
    main()
