"""Graph -> the steps that an integer network takes: norms go into their convolutions, ReLUs into clamps.

What has no integer step is refused by name. Dropout, identity and flatten disappear.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from edgetune.errors import Refusal
from edgetune.graph import Call, Graph, tensor_of
from edgetune.recognise import INTEGERS, MASKS

_COMPUTES = ("conv", "add", "mean", "subsample", "pad", "linear")
_VANISHES = ("dropout", "identity", "flatten")


@dataclass(frozen=True)
class Step:
    """One step of the integer network: `call` computes, `norm` and `activation` have gone into it.

    `node` is the call whose float output the step's integers stand for, `sources` the steps it reads ("input" is
    the picture).
    """

    call: Call
    norm: Call | None
    activation: Call | None
    sources: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.call.name

    @property
    def node(self) -> str:
        return (self.activation or self.norm or self.call).node


def fuse(graph: Graph) -> tuple[Step, ...]:
    """The steps in order. Raises Refusal naming the first call that an integer network cannot take."""
    value_of: dict[str, str] = {}  # node -> the step whose integers it is
    steps: list[Step] = []
    taken: set[str] = set()
    for call in graph.calls:
        if call.node in taken:
            continue
        _refuse(graph, call)
        if call.kind == "input":
            value_of[call.node] = "input"
        elif call.kind in _VANISHES:
            value_of[call.node] = value_of[call.inputs[0]]
        elif call.kind in _COMPUTES:
            if any(step.name == call.name for step in steps):
                raise Refusal(call.name, "is called twice", "give each call a layer of its own")
            norm = _only_reader(graph, call, "norm") if call.kind == "conv" else None
            may_clamp = call.kind in ("conv", "add")
            activation = _only_reader(graph, norm or call, "activation") if may_clamp else None
            step = Step(call, norm, activation, tuple(value_of[node] for node in call.inputs))
            steps.append(step)
            fused = [each for each in (call, norm, activation) if each is not None]
            taken |= {each.node for each in fused}
            value_of |= {each.node: step.name for each in fused}
    _check_ends(graph, steps, value_of)
    return tuple(steps)


def _only_reader(graph: Graph, call: Call, kind: str) -> Call | None:
    """The call of `kind` that is the only one to read this one's output, or None."""
    reader = graph[call.consumers[0]] if len(call.consumers) == 1 else None
    if reader is None or reader.kind != kind or (kind == "activation" and reader.function not in MASKS):
        return None
    return reader


def refuse_unfollowed(graph: Graph, call: Call) -> None:
    """Refuse a call that does not stand in the dataflow, or changes what others read from there."""
    if not call.followed or call.kind == "opaque":
        why = graph.opaque.get(call.name) or graph.opaque.get("", "it lies inside such a module")
        raise Refusal(call.name, f"cannot be followed ({why})", "write its forward without data-dependent control flow")
    if call.in_place and any(call.inputs[0] in later.inputs for later in _after(graph, call)):
        raise Refusal(call.name, "changes in place what is read again later",
                      "write it out of place, `y = x + z` for `x += z`")


def _refuse(graph: Graph, call: Call) -> None:
    refuse_unfollowed(graph, call)
    way_out = "replace the layer, or leave the network in float"
    if call.kind == INTEGERS:
        raise Refusal(call.name, "is in integers already", "quantize a network that was trained without --frozen-bits")
    if call.kind == "norm":
        raise Refusal(call.name, "does not stand behind a convolution that it alone reads",
                      "only such norms can be folded; move it, or leave the network in float")
    if call.kind == "activation":
        reason = (f"is a {call.function}, which is no clamp" if call.function not in MASKS
                  else "does not stand behind a convolution or an add that it alone reads")
        raise Refusal(call.name, reason, "use ReLU or ReLU6 right behind one, or leave the network in float")
    if call.kind not in (*_COMPUTES, *_VANISHES, "input", "output"):
        raise Refusal(call.name, f"is a {call.function}, which has no integer step", way_out)
    if call.kind in ("subsample", "pad", "mean", "conv", "add") and any(len(s) != 4 for s in call.in_shapes):
        raise Refusal(call.name, "does not work on maps (n c h w)", way_out)


def _after(graph: Graph, call: Call) -> tuple[Call, ...]:
    """The calls that are made later."""
    return graph.calls[graph.calls.index(call) + 1:]


def _check_ends(graph: Graph, steps: list[Step], value_of: dict[str, str]) -> None:
    for step in steps:
        for source in step.sources:
            if source != "input" and next(s for s in steps if s.name == source).call.kind == "linear":
                raise Refusal(step.name, f"reads the linear layer '{source}'",
                              "only one linear layer, the last, stays in float; leave the network in float")
    inputs = [call for call in graph.calls if call.kind == "input"]
    results = [node for call in graph.calls if call.kind == "output" for node in call.inputs]
    if len(inputs) != 1 or len(results) != 1 or not steps or value_of.get(results[0]) != steps[-1].name:
        raise Refusal(steps[-1].name if steps else "", "is not the way from one picture to one result",
                      "give a network with one input, one output and nothing computed beside")


def folded(model: nn.Module, step: Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight (o i u v) and bias (o) of a convolution or linear layer with its norm folded in, and its gain, float64.

    The gain (o) is what the norm multiplies each filter by; 1 without a norm.
    """
    held = {role: tensor.detach().double() for role, tensor in _params(model, step.call).items()}
    weight = held["weight"]
    bias = held.get("bias", weight.new_zeros(weight.shape[0]))
    if step.norm is None:
        return weight, bias, torch.ones_like(bias)
    norm = {role: tensor.detach().double() for role, tensor in _params(model, step.norm).items()}
    gain = (norm["running_var"] + float(step.norm.attributes["eps"] or 0.0)).rsqrt() * norm.get("weight", 1.0)
    return weight * gain.view(-1, 1, 1, 1), (bias - norm["running_mean"]) * gain + norm.get("bias", 0.0), gain


def _params(model: nn.Module, call: Call) -> dict[str, torch.Tensor]:
    return {role: tensor_of(model, name) for role, name in call.params.items()}
