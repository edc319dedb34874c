"""Tables of plans and costs, the same in every verb that shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from edgetune.cli.output import table
from edgetune.units import KIB, MIB, format_bytes, format_count, format_ms

if TYPE_CHECKING:
    from edgetune.contract import Plan
    from edgetune.front import Front, Point
    from edgetune.graph import Graph
    from edgetune.profile import Cost
    from edgetune.reasons import Reason, Reasons, Way
    from edgetune.run import Run


def cost_table(title: str, cost: Cost) -> Table:
    """A cost layer by layer, with the total last; layers that neither keep nor multiply anything are left out."""
    rows = [
        (
            layer.name,
            layer.kind,
            format_bytes(layer.param_bytes),
            format_count(layer.forward_macs),
            format_count(layer.backward_macs),
            format_bytes(layer.kept_bytes),
        )
        for layer in cost.layers
        if layer.kept_bytes or layer.forward_macs or layer.param_bytes
    ]
    total = (
        "total",
        "",
        format_bytes(cost.param_bytes),
        format_count(cost.forward_macs),
        format_count(cost.backward_macs),
        format_bytes(cost.kept_bytes),
    )
    return table(title, ("layer", "kind", "parameters", "MACs forward", "MACs backward", "kept"), rows, last=total)


def cost_facts(cost: Cost) -> list[tuple[str, str]]:
    """What makes up the training memory."""
    facts = [
        ("kept for backward", format_bytes(cost.kept_bytes)),
        ("gradients", format_bytes(cost.grad_bytes)),
        ("optimizer state", format_bytes(cost.optimizer_bytes)),
        ("peak training memory", f"{format_bytes(cost.peak_bytes)} ({cost.peak_bytes} bytes), {cost.origin}"),
        ("parameters beside it", format_bytes(cost.param_bytes)),
    ]
    return facts if cost.step_ms is None else [*facts, ("step time", format_ms(cost.step_ms))]


def plan_table(title: str, plan: Plan, graph: Graph, cost: Cost, plain: Cost) -> Table:
    """A plan layer by layer: map, choice, what learns, and the kept bytes beside those of plain back-propagation.

    Bytes are those of a layer and the norms, activations and adds behind it.
    """
    from edgetune.report.choices import kept_by_layer, layer_views

    views = layer_views(graph, plan)
    ours, theirs = kept_by_layer(cost, views), kept_by_layer(plain, views)
    rows = [
        (
            view.name,
            view.map_text,
            view.choice.label,
            ", ".join(view.learns) or "-",
            format_bytes(ours[view.name]),
            format_bytes(theirs[view.name]),
        )
        for view in views
    ]
    total = ("total", "", "", "", format_bytes(cost.kept_bytes), format_bytes(plain.kept_bytes))
    return table(title, ("layer", "channels · map", "gradient", "learns", "kept", "plain keeps"), rows, last=total)


def result_table(run: Run) -> Table:
    """The result of a run beside plain back-propagation."""
    from edgetune.report.result import COLUMNS, result_lines

    return table("", COLUMNS, [line.cells for line in result_lines(run)])


def reasons_table(reasons: Reasons) -> Table:
    """Why each layer got what it got: a number a method in the cells that tell several, in the order of the title."""
    taken = [[way for way in column if way is not None] for column in zip(*(r.ways for r in reasons.layers))]
    timed = any(way.ms is not None for ways in taken for way in ways)
    rows = [
        (
            reason.layer,
            f"{100 * reason.importance:.1f} %",
            _by_way(reason, lambda way: f"{way.fidelity:.2f}".removeprefix("0")),
            _by_way(reason, lambda way: f"{way.memory_bytes / KIB:.0f}"),
            *([_by_way(reason, lambda way: f"{way.ms or 0:.1f}")] if timed else []),
            _chosen(reason.ways, reason.way, reason.learns),
            _otherwise(reason),
        )
        for reason in reasons.layers
    ]
    columns = ("layer", "importance", "fidelity", "KiB", *(["ms"] if timed else []), "chosen", "otherwise, points")
    order = " · ".join(_chosen((ways[0],), 0, True) if ways else "-" for ways in taken)
    return table(f"why, by method: {order}", columns, rows)


def reasons_facts(reasons: Reasons) -> list[tuple[str, str]]:
    """What the plan gains of all there is, and what a little more of each limit would add to that."""
    facts = [("benefit", f"{100 * reasons.benefit:.1f} % of what learning everything exactly would gain")]
    if reasons.benefit_per_byte is not None:
        unit = next((unit for unit in (MIB, KIB) if unit * reasons.benefit_per_byte < 0.1), 1)
        facts.append((f"{format_bytes(unit)} more", f"{100 * unit * reasons.benefit_per_byte:+.3f} points"))
    if reasons.benefit_per_ms is not None:
        facts.append(("1 ms more", f"{100 * reasons.benefit_per_ms:+.3f} points"))
    return facts


def _by_way(reason: Reason, tell: Callable[[Way], str]) -> str:
    """A number a method; a dash where a layer does not have that choice."""
    return " ".join("-" if way is None else tell(way) for way in reason.ways)


def _chosen(ways: Sequence[Way | None], number: int | None, learns: bool) -> str:
    from edgetune.contract import known_methods
    from edgetune.report.choices import FROZEN, describe

    way = None if number is None else ways[number]
    if way is None:
        return FROZEN
    label = describe(known_methods()[way.method](**way.settings), ("weight",) if learns else ()).label
    label = "passes on only, exact" if label == FROZEN else label.removeprefix("filtered, ")
    return label.replace("passes on only, ", "passes, ")


def _otherwise(reason: Reason) -> str:
    other = reason.otherwise
    if other is None:
        return "-"
    sign = "+" if other.memory_bytes >= 0 else "-"
    told = f"{_chosen(reason.ways, other.way, other.learns)}: {100 * other.benefit:+.1f}, "
    told += f"{sign}{format_bytes(abs(other.memory_bytes))}"
    return told if other.ms is None else f"{told}, {other.ms:+.1f} ms"


def front_tables(front: Front) -> list[Table]:
    """What a range of budgets would bring; the plan that was made stands last."""
    columns = ("peak training memory", "step time", "benefit", "convolutions that learn", "at a time")
    last = None if front.chosen is None else _point(front.chosen, "the plan: ")
    return [
        table(title, columns, [_point(point) for point in points], last=last)
        for title, points in (("by memory", front.by_memory), ("by time", front.by_time))
    ]


def _point(point: Point, lead: str = "") -> tuple[str, ...]:
    return (
        lead + format_bytes(point.memory_bytes),
        format_ms(point.step_ms),
        f"{100 * point.benefit:.1f} %",
        str(point.learning),
        str(point.micro_batch),
    )
