"""Tables of plans and costs, the same in every verb that shows them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from edgetune.cli.output import table
from edgetune.units import format_bytes, format_count, format_ms

if TYPE_CHECKING:
    from edgetune.contract import Plan
    from edgetune.graph import Graph
    from edgetune.profile import Cost
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
