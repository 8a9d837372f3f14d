"""Write the binary documents of the example handbook; the same bytes every time.

    python examples/make_handbook.py [FOLDER]

The text formats in examples/handbook are written by hand; this file holds the words of the PDF and the two
Word files.
"""

import sys
import zipfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import docx
from docx.document import Document as WordFile
from fpdf import FPDF

HANDBOOK = Path(__file__).parent / "handbook"
WRITTEN = datetime(2025, 3, 1, tzinfo=UTC)

Blocks = tuple[tuple[str, str | Sequence[Sequence[str]]], ...]
"""(title | heading | text | table, what it says); a table's first row names its columns."""

# Each page: headings begin with "# ", all else are paragraphs.
EXPEDITION_MANUAL = (
    """# Expedition manual

This manual is for everyone who sails on the repair ship. Read it before the safety drill, because the drill
begins 2 hours after we leave harbour and the mate asks questions.

# Planning a voyage

A voyage is planned by the expedition lead, Tobias Achterberg, and approved by the master. The plan names the
moorings to be lifted, the weather windows and a port of refuge. A voyage lasts 23 days at most. The port of
refuge for all northern voyages is Torshavn.

# Weather limits

We lift a mooring only when the significant wave height is below 2.5 metres and the wind is below 14
metres per second. The master alone decides to stop, and nobody argues with the master before breakfast.

# Packing

Bring two pairs of gloves, a knife with a rounded point and a book that you are willing to lose. Drones,
bananas and perfume stay ashore. The limit for personal luggage is 20 kilograms.""",
    """# Lifting a mooring

Send the release code three times, 30 seconds apart. A mooring rises at about 1.2 metres per second, so one
from 4,000 metres needs nearly an hour. If it has not surfaced after 90 minutes, begin the drag procedure with
the grapnel named Persuasion.

Rinse every instrument with fresh water for 5 minutes before it goes below deck. Photograph the serial plate
first, since rinsing can wash off the paint.

# Data on board

Copy the memory of each instrument twice: one copy stays on the ship, the other is sent to the calibration
hall. The data officer is Leocadia Brandt. Raw data are kept for 30 years.

# Watches

There are three watches of 4 hours. The dog watch is from 16:00 to 18:00. Whoever sees a whale writes it in
the whale book on the bridge; last year the book counted 47 whales.""",
    """# Calibration

Every pressure gauge is calibrated against the reference gauge in Ponta Delgada. The reference gauge is called
Saint Elmo, and it is accurate to 0.003 percent. A calibration takes 36 hours and is valid for 2 years. A
gauge that drifts by more than 0.02 percent a year is not returned to the customer.

# When things go wrong

If an instrument is lost, file a loss report within 7 days. The report goes to Amaury Delacroix, who keeps the
list of instruments still on the sea floor. The list has 63 entries. The oldest is a hydrophone that was lost
off Cape Farewell in 1991 and is still sending a ping every 40 seconds.""",
)

QUALITY_RULES: Blocks = (
    ("title", "Repair quality rules"),
    ("text", "Every repair follows the same five gates. A gate is signed with a green pencil, never "
             "with a pen."),
    ("heading", "The five gates"),
    ("text", "The gates are Receive, Open, Mend, Press and Return. No instrument skips the Press "
             "gate: it spends 9 hours in the pressure tank at 110 percent of its rated depth."),
    ("heading", "Seals and oil"),
    ("text", "An O-ring is used once. We use the silicone oil Marlow 50, changed after 14 repairs. "
             "An oil bath that has turned amber is thrown away at once."),
    ("heading", "Torque"),
    ("table", (("Bolt", "Material", "Torque"), ("M5", "titanium", "4.2 newton metres"),
               ("M8", "titanium", "17 newton metres"), ("M8", "steel", "21 newton metres"))),
    ("heading", "Returns"),
    ("text", "The head of quality is Wilhelmina Adeyemi. She reads every complaint on Thursday "
             "afternoon. Our warranty for a mended instrument is 20 months, and a free second "
             "repair is offered for any fault in the first 100 days."),
)  # fmt: skip

SHIP_SAFETY: Blocks = (
    ("title", "선상 안전 수칙"),
    ("text", "수리선에 오르는 모든 사람은 이 수칙을 읽고 서명합니다. "
             "서명한 종이는 항해사 남궁현에게 냅니다."),
    ("heading", "구명조끼"),
    ("text", "갑판에서는 언제나 주황색 구명조끼를 입습니다. 구명조끼는 14개월마다 점검합니다."),
    ("heading", "비상 신호"),
    ("text", "짧은 기적 일곱 번과 긴 기적 한 번은 퇴선 신호입니다. "
             "신호가 울리면 3분 안에 우현 집합 장소로 모입니다."),
    ("heading", "윈치 작업"),
    ("text", "윈치가 도는 동안에는 노란 선 안으로 들어가지 않습니다. 윈치의 최대 하중은 9톤입니다."),
    ("heading", "당직 시간표"),
    ("table", (("당직", "시간", "책임자"), ("첫째 당직", "0시부터 4시까지", "배지훈"),
               ("둘째 당직", "4시부터 8시까지", "류하은"), ("셋째 당직", "8시부터 12시까지", "마동하"))),
    ("heading", "식사"),
    ("text", "저녁 식사는 오후 5시 40분에 시작합니다. 토요일에는 미역국이 나옵니다."),
)  # fmt: skip


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_pdf(folder / "expedition-manual.pdf", EXPEDITION_MANUAL, title="Expedition manual")
    write_word(folder / "repair-quality.docx", QUALITY_RULES)
    write_word(folder / "선상-안전.docx", SHIP_SAFETY)


def write_pdf(path: Path, pages: tuple[str, ...], *, title: str) -> None:
    pdf = FPDF(format=(148, 210))
    pdf.set_creation_date(WRITTEN)
    pdf.set_title(title)
    for page in pages:
        pdf.add_page()
        for block in page.split("\n\n"):
            text = " ".join(block.split())
            if text.startswith("# "):
                pdf.start_section(text[2:], level=0 if text[2:] == title else 1)
                pdf.set_font("Times", "B", 15)
                pdf.multi_cell(0, 10, text[2:], align="L", new_x="LMARGIN", new_y="NEXT")
            else:
                pdf.set_font("Times", size=11)
                pdf.multi_cell(0, 5.5, text, align="L", new_x="LMARGIN", new_y="NEXT")
                pdf.ln(3)
    pdf.output(str(path))


def write_word(path: Path, blocks: Blocks) -> None:
    word = docx.Document()
    facts = word.core_properties
    facts.author = "Brineholt Soundings"
    facts.created = facts.modified = WRITTEN
    for kind, content in blocks:
        if not isinstance(content, str):
            write_table(word, content)
        elif kind == "text":
            word.add_paragraph(content)
        else:
            word.add_heading(content, level=1 if kind == "title" else 2)
            facts.title = content if kind == "title" else facts.title
    word.save(str(path))
    settle(path)


def write_table(word: WordFile, rows: Sequence[Sequence[str]]) -> None:
    table = word.add_table(rows=0, cols=len(rows[0]))
    for row in rows:
        for cell, text in zip(table.add_row().cells, row, strict=True):
            cell.text = text


def settle(path: Path) -> None:
    """The same members under one date: a zip otherwise remembers the minute it was written."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name, (WRITTEN.year, WRITTEN.month, WRITTEN.day, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, data)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else HANDBOOK)
