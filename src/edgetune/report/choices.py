"""What a plan says of each layer, in words and as a key for its colour: the same in tables, pictures and legends."""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgetune.contract import KeptMethod, Method, Plan
from edgetune.graph import Call, Graph
from edgetune.profile import Cost
from edgetune.recognise import ARITHMETIC

FROZEN, EXACT, OTHER = "frozen", "exact", "other"


@dataclass(frozen=True)
class Choice:
    """How one layer trains. `key` names its colour: frozen, exact, other, or r2, r4 ... for a patch size.

    A layer that `passes` learns nothing, but hands a filtered gradient on to those before it.
    """

    key: str
    label: str
    passes: bool = False


@dataclass(frozen=True)
class LayerView:
    """A layer as it is shown: its number from 1, its map (h w) and channels, its choice, and what of it learns."""

    number: int
    name: str
    kind: str
    map_hw: tuple[int, int]
    channels: int
    choice: Choice
    learns: tuple[str, ...]

    @property
    def map_text(self) -> str:
        """Channels and map size, such as `64 · 56×56`."""
        height, width = self.map_hw
        return f"{self.channels}" if (height, width) == (1, 1) else f"{self.channels} · {height}×{width}"


def describe(method: Method | None, learns: tuple[str, ...]) -> Choice:
    """A layer's method and what learns of it, as a choice."""
    if method is None or method.method == EXACT:
        return Choice(EXACT, "exact") if learns else Choice(FROZEN, "frozen")
    patch_px = getattr(method, "patch_px", None)
    if patch_px is None:
        return Choice(OTHER, method.label if learns else f"passes on only, {method.label}", passes=not learns)
    label = f"filtered, r = {patch_px}"
    if getattr(method, "taps", "mean") != "mean":
        label += f", {method.taps} taps"  # type: ignore[attr-defined]
    if getattr(method, "bases", 1) not in (1, None):
        label += f", {method.bases} bases"  # type: ignore[attr-defined]
    return Choice(f"r{patch_px}", label if learns else f"passes on only, r = {patch_px}", passes=not learns)


def layer_views(graph: Graph, plan: Plan) -> tuple[LayerView, ...]:
    """Convolutions and linear layers in the order of execution, with what the plan says of them."""
    shown = [call for call in graph.calls if call.kind in ("conv", "linear", ARITHMETIC)]
    return tuple(_view(number, call, plan) for number, call in enumerate(shown, 1))


def _view(number: int, call: Call, plan: Plan) -> LayerView:
    size = call.out_shape[2:] if len(call.out_shape) == 4 else (1, 1)
    learns = plan.learns.get(call.name, ())
    stack = plan.layers.get(call.name, ())
    method = next((own for own in stack if not isinstance(own, KeptMethod)), None)
    choice = describe(method, learns)
    for hold in stack:
        if isinstance(hold, KeptMethod) and choice.key != FROZEN:
            choice = replace(choice, label=f"{choice.label}, {hold.label}")
    return LayerView(
        number=number,
        name=call.name or call.node,
        kind=call.kind,
        map_hw=(size[0], size[1]),
        channels=call.out_shape[1] if len(call.out_shape) > 1 else 0,
        choice=choice,
        learns=learns,
    )


def kept_by_layer(cost: Cost | None, views: tuple[LayerView, ...]) -> dict[str, int]:
    """Bytes kept by each shown layer and the norms, activations and adds up to the next one; they add up to the total.

    A tensor that two layers read belongs to the first that keeps it, so only such groups can be compared.
    """
    if cost is None or not views:
        return {}
    kept = dict.fromkeys((view.name for view in views), 0)
    current = views[0].name
    for layer in cost.layers:
        current = layer.name if layer.name in kept else current
        kept[current] += layer.kept_bytes
    return kept
