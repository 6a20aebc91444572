"""Characters of the fonts Symbol and Wingdings, which Word stores by their code in the font, as Unicode.

Symbol's table is Adobe's (unicode.org/Public/MAPPINGS/VENDORS/ADOBE/symbol.txt), without the parts of large brackets. Of
Wingdings, here are the signs that stand in texts: arrows, marks, boxes and bullets.
"""

from __future__ import annotations

PRIVATE = 0xF000
"""Word adds it to the codes of fonts of symbols."""
SYMBOL = dict(
    zip(
        (*range(0x41, 0x5B), *range(0x61, 0x7B)),
        "ΑΒΧΔΕΦΓΗΙϑΚΛΜΝΟΠΘΡΣΤΥςΩΞΨΖαβχδεφγηιϕκλμνοπθρστυϖωξψζ",
        strict=True,
    )
) | dict(
    zip(
        (*range(0xA1, 0xBD), *range(0xBF, 0xD1), *range(0xD1, 0xE2), 0xE5, 0xF1, 0xF2),
        "ϒ′≤⁄∞ƒ♣♦♥♠↔←↑→↓°±″≥×∝∂•÷≠≡≈…↵ℵℑℜ℘⊗⊕∅∩∪⊃⊇⊄⊂⊆∈∉∠∇®©™∏√⋅¬∧∨⇔⇐⇑⇒⇓◊〈∑〉∫",
        strict=True,
    )
)
SYMBOL |= {0x22: "∀", 0x24: "∃", 0x27: "∋", 0x2A: "∗", 0x2D: "−", 0x40: "≅", 0x5C: "∴", 0x5E: "⊥", 0x7E: "∼", 0xA0: "€"}
SYMBOL |= {0xE2: "®", 0xE3: "©", 0xE4: "™"}
WINGDINGS = {
    0x4A: "☺", 0x4C: "☹", 0x6C: "●", 0x6E: "■", 0x6F: "□", 0x71: "❑", 0x72: "❒", 0x75: "◆", 0x76: "❖", 0x9F: "•",
    0xA1: "○", 0xA7: "▪", 0xA8: "◻", 0xAB: "★", 0xD8: "➢", 0xDF: "←", 0xE0: "→", 0xE1: "↑", 0xE2: "↓", 0xE8: "➔",
    0xEF: "⇦", 0xF0: "⇨", 0xF3: "⬄", 0xFB: "✗", 0xFC: "✓", 0xFD: "☒", 0xFE: "☑",
}  # fmt: skip
FONTS = {"symbol": SYMBOL, "wingdings": WINGDINGS}


def character(font: str, code: str) -> str:
    """The character of the hexadecimal `code` in `font`; of a font or code that is not known, the code's own character."""
    try:
        number = int(code, 16)
        own = chr(number)
    except (ValueError, OverflowError):
        return ""
    in_font = number - PRIVATE if PRIVATE <= number < PRIVATE + 0x100 else number
    known = FONTS.get(font.strip().lower(), {})
    if in_font in known:
        return known[in_font]
    if font.strip().lower() == "symbol" and 0x20 <= in_font < 0x7F:  # digits and punctuation are those of ASCII
        return chr(in_font)
    return "" if 0xD800 <= number < 0xE000 else own
