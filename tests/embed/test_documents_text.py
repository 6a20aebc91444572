"""The text of documents: nothing visible is lost, joined or repeated."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest

from qembed.embed import documents, front_matter

CASES = Path(__file__).parents[1] / "cases"
W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'


def case(name: str) -> str:
    path = CASES / name
    return documents.read(path.read_bytes(), path.suffix).text


def docx_text(document: Any) -> str:
    out = io.BytesIO()
    document.save(out)
    return documents.read(out.getvalue(), ".docx").text


def test_text_in_content_controls_and_tracked_insertions_is_kept() -> None:
    controls = case("09-docx-lost-text/controls.docx").split("\n\n")
    assert controls == [
        "An ordinary paragraph at the start.", "The warranty lasts five years.", "Customer: Northern Printing House",
    ]  # fmt: skip
    assert case("09-docx-lost-text/tracked.docx") == "The payment is due within ninety days."


def test_tables_keep_their_position_with_merged_cells_once_and_nested_tables() -> None:
    import docx

    document = docx.Document()
    document.add_paragraph("Before.")
    table = document.add_table(3, 3)
    for number, cell in enumerate(cell for row in table.rows for cell in row.cells):
        cell.text = f"c{number}"
    wide, tall = table.cell(0, 0).merge(table.cell(0, 1)), table.cell(1, 2).merge(table.cell(2, 2))
    wide.text, tall.text = "wide", "tall"
    nested = table.cell(2, 0).add_table(1, 2)
    nested.rows[0].cells[0].text, nested.rows[0].cells[1].text = "inner left", "inner right"
    document.add_paragraph("After.")
    text = docx_text(document)
    words = ["Before.", "wide", "c2", "c3", "c4", "tall", "c6", "inner left", "inner right", "c7", "After."]
    assert text.split() == [part for word in words for part in word.split()]
    assert "inner left\tinner right" in text
    assert text.startswith("Before.\n\nwide\tc2\nc3\tc4\ttall\n")


def test_headers_footers_links_breaks_text_boxes_and_notes_are_kept_once() -> None:
    import docx
    from docx.oxml import parse_xml

    document = docx.Document()
    document.sections[0].header.paragraphs[0].text = "The header."
    document.sections[0].footer.paragraphs[0].text = "The footer."
    document.add_section()
    paragraph = document.add_paragraph("Anchor")
    paragraph.add_run("\tone\ntwo")
    box = f"<w:r {W}><w:pict><w:txbxContent><w:p><w:r><w:t>In the box.</w:t></w:r></w:p></w:txbxContent></w:pict></w:r>"
    paragraph._p.append(parse_xml(box))
    both = (
        f'<w:r {W} xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"><mc:AlternateContent>'
        "<mc:Choice><w:t> new</w:t></mc:Choice><mc:Fallback><w:t> old</w:t></mc:Fallback></mc:AlternateContent></w:r>"
    )
    paragraph._p.append(parse_xml(both))
    link = parse_xml(f"<w:hyperlink {W}><w:r><w:t> and a link</w:t></w:r></w:hyperlink>")
    paragraph._p.append(link)
    moved = parse_xml(f"<w:moveFrom {W}><w:r><w:t>gone</w:t></w:r></w:moveFrom>")
    paragraph._p.append(moved)
    target = copy.deepcopy(moved)
    target.tag = target.tag.replace("moveFrom", "moveTo")
    target[0][0].text = " arrived"
    paragraph._p.append(target)
    assert docx_text(document).split("\n\n") == [
        "The header.", "Anchor\tone\ntwo new and a link arrived", "In the box.", "The footer.",
    ]  # fmt: skip


def docx_with(*blocks: str) -> str:
    """The text of a document with these elements as its body."""
    import docx
    from docx.oxml import parse_xml

    document = docx.Document()
    compatibility = 'xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"'
    for block in blocks:
        document.element.body.append(parse_xml(block.replace(">", f" {W} {compatibility}>", 1)))
    return docx_text(document)


def test_readings_stand_behind_their_base() -> None:
    ruby = "<w:rubyPr/><w:rt><w:r><w:t>とうきょう</w:t></w:r></w:rt><w:rubyBase><w:r><w:t>東京</w:t></w:r></w:rubyBase>"
    assert docx_with(f"<w:p><w:r><w:ruby>{ruby}</w:ruby></w:r><w:r><w:t>へ</w:t></w:r></w:p>") == "東京(とうきょう)へ"


@pytest.mark.parametrize(
    ("font", "code", "character"),
    [
        ("Wingdings", "F0FC", "✓"),
        ("wingdings", "00FC", "✓"),
        ("Symbol", "F06D", "μ"),
        ("Symbol", "F0B3", "≥"),
        ("Symbol", "F0CE", "∈"),
        ("Symbol", "F0DE", "⇒"),
        ("Symbol", "F0E5", "∑"),
        ("Symbol", "F031", "1"),
        ("Segoe UI Symbol", "2714", "✔"),
        ("Other", "F041", "\uf041"),
        ("Other", "D800", ""),
        ("Other", "zz", ""),
    ],
)
def test_symbols_are_read(font: str, code: str, character: str) -> None:
    symbol = f'<w:r><w:sym w:font="{font}" w:char="{code}"/></w:r>'
    assert docx_with(f"<w:p><w:r><w:t>a</w:t></w:r>{symbol}<w:r><w:t>b</w:t></w:r></w:p>") == f"a{character}b"


def test_a_tab_to_a_position_separates_as_other_tabs_do() -> None:
    assert docx_with('<w:p><w:r><w:t>left</w:t><w:ptab w:alignment="right"/><w:t>right</w:t></w:r></w:p>') == "left\tright"


def test_a_block_for_newer_and_for_older_readers_stands_once() -> None:
    paragraph = "<w:p><w:r><w:t>{}</w:t></w:r></w:p>"
    choice, fallback = paragraph.format("new"), paragraph.format("old")
    block = f"<mc:AlternateContent><mc:Choice>{choice}</mc:Choice><mc:Fallback>{fallback}</mc:Fallback></mc:AlternateContent>"
    cell = f"<w:tc>{block}</w:tc>"
    assert docx_with(block, f"<w:tbl><w:tr>{cell}</w:tr></w:tbl>") == "new\n\nnew"


def test_cells_merged_by_hmerge_stand_once_and_deleted_cells_not_at_all() -> None:
    cells = [
        f"<w:tc><w:tcPr>{mark}</w:tcPr><w:p><w:r><w:t>{text}</w:t></w:r></w:p></w:tc>"
        for mark, text in (
            ('<w:hMerge w:val="restart"/>', "a"),
            ("<w:hMerge/>", "a"),
            ('<w:cellDel w:id="1"/>', "gone"),
            ("", "b"),
        )
    ]
    assert docx_with(f"<w:tbl><w:tr>{''.join(cells)}</w:tr></w:tbl>") == "a\tb"


def test_older_html_elements_separate_blocks_too() -> None:
    page = "a<center>b</center>c<dir><li>d</dir>e<xmp>f  g</xmp>h<listing>i</listing>j<marquee>k</marquee>l<plaintext>m"
    text = documents.read(page.encode(), ".html").text
    assert text.split() == list("abcdefghijklm")
    assert "f  g" in text


def test_html_keeps_ruby_readings_in_their_line() -> None:
    page = "<p>\u6f22<rp>(</rp><rt>kan</rt><rp>)</rp>\u5b57".replace("<p>", "<p><ruby>") + "</ruby> end"
    assert documents.read(page.encode(), ".html").text == "\u6f22(kan)\u5b57 end"


def test_html_keeps_its_title_and_separates_blocks_like_a_browser() -> None:
    page = (
        "<html><head><title>The title</title><style>no{}</style></head><body><template>no</template>"
        "<select><option>red<option>green</select><textarea>typed</textarea><ul><li>a<li>b</ul>"
        "<table><tr><td>1<td>2</table><div>c</div><div>d</div>bo<b>ld</b><script>no()</script></body></html>"
    )
    text = documents.read(page.encode(), ".html").text
    assert text.split() == ["The", "title", "red", "green", "typed", "a", "b", "1", "2", "c", "d", "bold"]


@pytest.mark.parametrize(
    "text",
    [
        "---\ntitle: x\n---\n# Head\n",
        "---\r\ntitle: x\r\n---\r\n# Head\r\n",
        "---\rtitle: x\r---\r# Head\r",
        "\ufeff---\r\ntitle: x\r\n---\r\n# Head\r\n",
        "--- \ntitle: x\n---\t\n# Head\n",
        "---\ntitle: x\n...\n# Head\n",
        "---\n---\n# Head\n",
        '---\n# a comment\n"quoted key": 1\ntags:\n- a\n- b\nnested:\n  deep: 1\nlines: |\n  more\n\n  text\n---\n# Head\n',
        '+++\ntitle = "x"\n[params]\nn = 1\n+++\n# Head\n',
    ],
)
def test_front_matter_is_left_out(text: str) -> None:
    assert documents.read(text.encode(), ".md").text == "Head"


@pytest.mark.parametrize(
    "text",
    [
        "---\nThe first section.\n\n---\nThe second.\n",
        "---\n\n# The first\n\nIt says: this.\nAnd more.\n\n---\nThe second.\n",
        "---\n\nNote: mind this.\n\n---\nThe second.\n",
        "---\n \nNote: mind this.\n---\nThe second.\n",
        "---\n- a list\n- of two\n---\nThe second.\n",
        "---\nThe first has no end.\n",
        "+++\nThe first.\n+++\nThe second.\n",
        "The first.\n---\nkey: value\n---\n",
    ],
)
def test_a_rule_at_the_beginning_is_no_front_matter(text: str) -> None:
    assert front_matter.without(text) == text


def test_the_case_of_front_matter_with_crlf() -> None:
    assert case("10-markdown-front-matter/crlf.md") == "Head\n\nBody text."
