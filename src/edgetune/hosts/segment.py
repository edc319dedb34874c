"""One autograd function for every segment: it owns what autograd makes fiddly, the rules own the mathematics.

What is kept goes through `save_for_backward`, so that hooks and checkpointing see it; parameters are inputs, so that
gradients, DistributedDataParallel and `needs_input_grad` work; nothing is computed that no one asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from edgetune.contract import Needs, Segment, Tensors
from edgetune.errors import Refusal
from edgetune.hosts.cursor import current_passes, working_on


class SegmentFunction(torch.autograd.Function):
    """apply(segment, *inputs, *params, *state) -> outputs, with the gradients of the segment's rule."""

    @staticmethod
    def forward(ctx: Any, segment: Segment, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first, behind = len(segment.inputs), len(segment.inputs) + len(segment.params)
        xs, params = tensors[:first], tensors[first:behind]
        # state is changed by later steps, so autograd must not watch over it; it is no part of what is kept
        ctx.segment, ctx.state, ctx.passes = segment, tensors[behind:], current_passes()
        needs = ctx.needs = _needs(first, segment.params, ctx.needs_input_grad[1 : behind + 1])
        working_on(segment.calls[0])
        given = dict(zip((*segment.params, *segment.state), tensors[first:], strict=True))
        if ctx.passes is None:
            ys, kept = segment.rule.forward(segment, xs, given, needs)
            ctx.save_for_backward(*params, *kept.values())
            ctx.kept_names = tuple(kept)
        else:
            ys = _one_pass(ctx, xs, params, given)
        inputs = {id(x) for x in xs}
        # a view of an input handed out as an output would confuse autograd's bookkeeping
        ys = tuple([y.view_as(y) if id(y) in inputs else y for y in ys])
        if not all([y.is_floating_point() for y in ys]):
            ctx.set_materialize_grads(False)  # integers get no gradient, and need no zeros in its place
        return ys

    @staticmethod
    def backward(ctx: Any, *gys: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        segment: Segment = ctx.segment
        if torch.is_grad_enabled():
            raise Refusal(segment.name, "computes its own gradient, which cannot be differentiated again",
                          "call backward without create_graph=True, or undo the plan first")
        saved, count = ctx.saved_tensors, len(segment.params)
        if ctx.passes is None:
            params, kept = saved[:count], dict(zip(ctx.kept_names, saved[count:], strict=True))
        else:
            params, kept = ctx.passes.take(ctx.place)
        working_on(segment.calls[-1])
        given = dict(zip((*segment.params, *segment.state), (*params, *ctx.state), strict=True))
        gxs, grads = segment.rule.backward(segment, kept, gys, given, ctx.needs)
        return (None, *gxs, *[grads.get(name) for name in segment.params], *[None] * len(segment.state))


def _one_pass(ctx: Any, xs: tuple[torch.Tensor, ...], params: tuple[torch.Tensor, ...],
              given: Tensors) -> tuple[torch.Tensor, ...]:
    """The outputs, where all is run twice: nothing is kept of the first pass, and nothing by autograd of the second."""
    needs = Needs((False,) * len(xs), frozenset()) if ctx.passes.first else ctx.needs
    with saved_tensors_hooks(_as_it_is, _as_it_is):  # what a rule differentiates on its way is its own affair
        ys, kept = ctx.segment.rule.forward(ctx.segment, xs, given, needs)
    apart = None if ctx.passes.first else (params, {name: tensor.detach() for name, tensor in kept.items()})
    ctx.place = ctx.passes.place(apart)
    ctx.save_for_backward(ys[0].new_empty(0))  # backward asks for it, and so lets the stretch run again
    return ys


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@lru_cache(maxsize=4096)
def _needs(inputs: int, params: tuple[str, ...], flags: tuple[bool, ...]) -> Needs:
    return Needs(flags[:inputs], frozenset(name for name, flag in zip(params, flags[inputs:], strict=True) if flag))


def runner(segment: Segment, label: str) -> Callable[..., Any]:
    """A plain function (inputs, params and state -> output or tuple of outputs) for generated code to call.

    `segment_behind` tells which segment such a function runs.
    """

    @torch.compiler.disable
    def run(*tensors: torch.Tensor) -> Any:
        ys = SegmentFunction.apply(segment, *tensors)
        return ys[0] if len(segment.outputs) == 1 else ys

    run.__name__ = run.__qualname__ = label
    run.__module__ = "edgetune.hosts.segment"
    run.__dict__["segment"] = segment
    return run


def segment_behind(function: Any) -> Segment | None:
    """The segment that a function of `runner` runs; None for others."""
    return getattr(function, "__dict__", {}).get("segment")
