"""What the generated SVG pictures share: colours, and text."""

from __future__ import annotations

INK, FAINT, RULE = "#1d1c1a", "#6b6862", "#e4e1da"


def text(x: float, y: float, words: str, colour: str, anchor: str, size: int = 13) -> str:
    """Words at (x, y) px, `anchor` start, middle or end."""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}" font-size="{size}">{words}</text>'
