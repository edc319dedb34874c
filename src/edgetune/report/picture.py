"""The plan as a picture of the network: a block a layer, tall as its map, wide as its channels, coloured by its choice.

Blocks are plain HTML that flows into as many rows as the screen needs, so that they are as large on a phone as on a
desk.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from html import escape

from edgetune.report.choices import EXACT, FROZEN, Choice, LayerView

PATCH_COLOURS = ("r-a", "r-b", "r-c", "r-d")
"""CSS classes of patch sizes, smallest first; larger ones share the last."""


def colour_classes(views: Sequence[LayerView]) -> dict[str, str]:
    """The CSS class of every choice's key."""
    patches = sorted(
        {view.choice.key for view in views if view.choice.key not in (FROZEN, EXACT, "other")},
        key=lambda key: int(key[1:]),
    )
    coloured = {key: PATCH_COLOURS[min(rank, len(PATCH_COLOURS) - 1)] for rank, key in enumerate(patches)}
    return {FROZEN: FROZEN, EXACT: EXACT, "other": "other", **coloured}


def colour_class(choice: Choice, classes: dict[str, str]) -> str:
    """The CSS classes of one choice: its colour, and stripes where the gradient only passes."""
    return classes[choice.key] + (" passes" if choice.passes else "")


def picture(views: Sequence[LayerView]) -> str:
    """The network and the legend under it."""
    classes = colour_classes(views)
    tallest = max((max(view.map_hw) for view in views), default=1)
    widest = max((view.channels for view in views), default=1)
    scale = min(max(20 / max(len(views), 1), 1.0), 2.0)
    blocks, stage = [], None
    for view in views:
        opens = view.map_hw != stage
        stage = view.map_hw
        blocks.append(_block(view, colour_class(view.choice, classes), (tallest, widest), scale, opens))
    return f'<ol class="net">{"".join(blocks)}</ol>{legend(views)}'


def legend(views: Sequence[LayerView]) -> str:
    """What the colours mean, with the number of layers of each."""
    classes, counts = colour_classes(views), Counter(view.choice for view in views)
    order = {FROZEN: -2, EXACT: -1, "other": 99}
    shown = sorted(counts, key=lambda choice: (choice.passes, order.get(choice.key) or int(choice.key[1:])))
    items = [
        f'<li><i class="chip {colour_class(choice, classes)}"></i>{escape(choice.label)} <b>{counts[choice]}</b></li>'
        for choice in shown
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _block(view: LayerView, colour: str, largest: tuple[int, int], scale: float, opens: bool) -> str:
    height = 14 + 74 * math.sqrt(max(view.map_hw) / largest[0])
    width = scale * (12 + 22 * math.log2(1 + view.channels) / math.log2(1 + largest[1]))
    told = f"{view.number}  {view.name}: {view.kind}, {view.map_text}, {view.choice.label}"
    if view.learns:
        told += f"; learns {' and '.join(view.learns)}"
    size = f"{view.map_hw[0]}×{view.map_hw[1]}" if view.map_hw != (1, 1) else view.kind
    stage = f'<span class="stage">{size}</span>' if opens else ""
    return (
        f'<li title="{escape(told)}">{stage}<i class="{colour}" style="height:{height:.0f}px;width:{width:.0f}px"></i>'
        f"<b>{view.number}</b></li>"
    )
