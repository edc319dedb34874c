"""One autograd function for every segment: it owns what autograd makes fiddly, the rules own the mathematics.

What is kept goes through `save_for_backward`, so that hooks and checkpointing see it; parameters are inputs, so that
gradients, DistributedDataParallel and `needs_input_grad` work; nothing is computed that no one asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from edgetune.contract import Needs, Segment
from edgetune.errors import Refusal
from edgetune.hosts.cursor import current_passes, working_on


class SegmentFunction(torch.autograd.Function):
    """apply(segment, *inputs, *params, *state) -> outputs, with the gradients of the segment's rule."""

    @staticmethod
    def forward(ctx: Any, segment: Segment, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first, behind = len(segment.inputs), len(segment.inputs) + len(segment.params)
        xs, params = tensors[:first], dict(zip(segment.params, tensors[first:behind], strict=True))
        # changed by later steps, so autograd must not watch over it; it is no part of what is kept for backward
        ctx.state = dict(zip(segment.state, tensors[behind:], strict=True))
        needs, ctx.passes = _needs(segment, ctx.needs_input_grad[1:]), current_passes()
        if ctx.passes is not None and ctx.passes.first:
            needs = Needs((False,) * first, frozenset())  # nothing is read of what the first pass keeps
        working_on(segment.calls[0])
        # what a rule differentiates on its way is its own affair
        with nullcontext() if ctx.passes is None else saved_tensors_hooks(_as_it_is, _as_it_is):
            ys, kept = segment.rule.forward(segment, xs, {**params, **ctx.state}, needs)
        ctx.segment, ctx.kept_names = segment, tuple(kept)
        # a view of an input handed out as an output would confuse autograd's bookkeeping
        ys = tuple(y.view_as(y) if any(y is x for x in xs) else y for y in ys)
        if ctx.passes is None:
            ctx.save_for_backward(*params.values(), *kept.values())
        else:
            apart = (params, {name: tensor.detach() for name, tensor in kept.items()})
            ctx.place = ctx.passes.place(None if ctx.passes.first else apart)
            ctx.save_for_backward(ys[0].new_empty(0))  # backward asks for it, and so lets the stretch run again
        # integers get no gradient, and need no zeros in its place
        ctx.set_materialize_grads(all(y.is_floating_point() for y in ys))
        return ys

    @staticmethod
    def backward(ctx: Any, *gys: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        segment: Segment = ctx.segment
        if torch.is_grad_enabled():
            raise Refusal(segment.name, "computes its own gradient, which cannot be differentiated again",
                          "call backward without create_graph=True, or undo the plan first")
        saved = ctx.saved_tensors
        if ctx.passes is None:
            params = dict(zip(segment.params, saved, strict=False))
            kept = dict(zip(ctx.kept_names, saved[len(segment.params):], strict=True))
        else:
            params, kept = ctx.passes.take(ctx.place)
        needs = _needs(segment, ctx.needs_input_grad[1:])
        working_on(segment.calls[-1])
        gxs, grads = segment.rule.backward(segment, kept, gys, {**params, **ctx.state}, needs)
        return (None, *gxs, *(grads.get(name) for name in segment.params), *(None for _ in segment.state))


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _needs(segment: Segment, flags: tuple[bool, ...]) -> Needs:
    split = len(segment.inputs)
    return Needs(flags[:split], frozenset(n for n, flag in zip(segment.params, flags[split:], strict=False) if flag))


def runner(segment: Segment, label: str) -> Callable[..., Any]:
    """A plain function (inputs, params and state -> output or tuple of outputs) for generated code to call.

    `segment_behind` tells which segment such a function runs.
    """

    def run(*tensors: torch.Tensor) -> Any:
        return _opaque(segment, *tensors)

    run.__name__ = run.__qualname__ = label
    run.__module__ = "edgetune.hosts.segment"
    run.__dict__["segment"] = segment
    return run


def segment_behind(function: Any) -> Segment | None:
    """The segment that a function of `runner` runs; None for others."""
    return getattr(function, "__dict__", {}).get("segment")


@torch.compiler.disable
def _opaque(segment: Segment, *tensors: torch.Tensor) -> Any:
    ys = SegmentFunction.apply(segment, *tensors)
    return ys[0] if len(segment.outputs) == 1 else ys
