"""Checkpointing: what backward reads is not kept but made again, stretch by stretch.

What it does
    Layers of the plan with the same number `stretch` are one stretch: all calls from the first of them up to the next
    convolution or linear layer that has another number or none. Nothing inside a stretch is kept. When the gradient
    comes to it, it runs forward once more from its inputs, keeps for that moment what its layers' methods keep, and
    goes backward. `edgetune.stretches.checkpointed` chooses the stretches.

Shapes
    Any. A stretch may read several values (the two sides of a residual add) and give several.

What is kept (bytes)
    Of a stretch its inputs alone: n c h w numbers for each value that lies in front of it and is read in it. While one
    stretch goes backward, what its layers keep is there as well. With sqrt(L) stretches of L equal layers both are
    about sqrt(L) maps, instead of L.

What changes in the gradient or the answer
    Nothing: the same operations run on the same numbers, with the same random numbers where there are any. A step
    computes the stretches forward twice; at most a third is added to it where backward costs twice as much as forward.

When not to use
    Where time counts more than bytes; low_bit keeps less in less time, if its noise is no matter. The last layers gain
    nothing, as they go backward at once. Methods that remember their inputs from step to step (asi, comet) would do so
    twice, and are refused inside. Norms use running statistics, so that nothing is counted twice.

Reference
    Chen, Xu, Zhang and Guestrin, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174, 2016. Stretches run
    by torch.utils.checkpoint, without re-entering autograd.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from edgetune.contract import KeptMethod, Plan, Stretch
from edgetune.errors import Refusal
from edgetune.graph import Call, Graph

BORDERS = ("conv", "linear")
"""What another stretch, or none, begins with."""


class Checkpoint(KeptMethod):
    """`stretch` is a number that all layers of one stretch have in common."""

    method = "checkpoint"

    stretch: int = Field(0, ge=0)

    @classmethod
    def choices(cls) -> tuple[KeptMethod, ...]:
        """None that a layer could have by itself: `edgetune.stretches` chooses."""
        return ()

    @property
    def label(self) -> str:
        return "runs again"

    def exact_on(self, graph: Graph) -> bool:
        return True

    def refuse(self, call: Call) -> str | None:
        if not call.params:
            return f"is a {call.kind}, which has no parameters: name the layers around it"
        if not call.followed:
            return "is called inside of what could not be followed, so no stretch can go through it: leave it out of " \
                   "the plan"
        return None

    @classmethod
    def stretches(cls, graph: Graph, plan: Plan) -> list[Stretch]:
        """The stretches of the plan. Raises Refusal for layers of one that do not follow one another."""
        numbers = {call.node: own.stretch for call in graph.layers()
                   if isinstance(own := plan.settings(call.name, cls), cls)}
        found: dict[int, list[Call]] = {}
        current: int | None = None
        for call in graph.calls:
            number = numbers.get(call.node)
            if number is not None and number != current and number in found:
                raise Refusal(call.name, f"has the same `stretch`, {number}, as '{found[number][0].name}', but other "
                              "layers stand between them", "give it another number, or those between them the same")
            if call.kind == "output":
                break
            if number is not None or call.kind in BORDERS:
                current = number
            if current is not None:
                found.setdefault(current, []).append(call)
        _check_overwritten(graph, found)
        return [Stretch(tuple(calls)) for calls in found.values()]


def _check_overwritten(graph: Graph, found: Mapping[int, list[Call]]) -> None:
    """Refuse stretches into which, or out of which, a value goes that one call changes and others read."""
    place = {call.node: number for number, calls in found.items() for call in calls}
    for call in graph.calls:
        if not graph.overwrites_for_others(call):
            continue
        source = graph[call.inputs[0]]
        places = {place.get(node) for node in (source.node, *source.consumers)}
        if len(places) > 1:
            number = next(each for each in places if each is not None)
            raise Refusal(call.name, f"changes a value that others read, across a border of the stretch of "
                          f"'{found[number][0].name}', which would find it changed when it runs again",
                          "let the stretch reach around it, or leave those layers out of it")
