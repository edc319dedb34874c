"""Schemes of sparse update: how many biases, which layers, which share of their channels; and the plans they make.

The released ones stand in `schemes.json`, as published by Lin et al. (NeurIPS 2022) for their three networks;
entries without a full list of ratios are left out. Convolutions are numbered from 0 in the order of execution.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources

from pydantic import Field, TypeAdapter
from torch import nn

from edgetune.contract import Method, Plan
from edgetune.errors import PlanError
from edgetune.graph import Graph
from edgetune.methods.backward.sparse_update import SparseUpdate
from edgetune.record import Record


class Scheme(Record):
    """The last `biases` convolutions learn their bias; `ratios` maps a convolution to the share of its channels.

    `memory_kb` is what the authors' engine needs for it, quantised and at batch 1; `convolutions` those that the
    network has. `network` is a built-in network of that shape: weights and searched kernels may differ from theirs.
    """

    network: str
    memory_kb: int
    convolutions: int = Field(ge=1)
    biases: int = Field(ge=0)
    ratios: dict[int, float]

    @property
    def name(self) -> str:
        """Such as `mcunet-49KB`."""
        return f"{self.network}-{self.memory_kb}KB"


def released_schemes() -> dict[str, Scheme]:
    """The published schemes by name."""
    text = resources.files("edgetune.sparse").joinpath("schemes.json").read_text()
    return {scheme.name: scheme for scheme in TypeAdapter(list[Scheme]).validate_json(text)}


def released_plan(model: nn.Module, graph: Graph, name: str) -> Plan:
    """A published scheme as a plan, its windows where the weights' norm is largest. Raises PlanError as the others."""
    schemes = released_schemes()
    if name not in schemes:
        raise PlanError(f"scheme '{name}' is unknown: choose from {', '.join(schemes)}")
    return place_windows(model, graph, scheme_plan(graph, schemes[name]))


def scheme_plan(graph: Graph, scheme: Scheme) -> Plan:
    """The plan that a scheme makes of a network. Raises PlanError when it was made for another number of layers."""
    found = len(graph.layers("conv"))
    if found != scheme.convolutions:
        raise PlanError(f"scheme '{scheme.name}' was made for {scheme.convolutions} convolutions, but this network has "
                        f"{found}: take a scheme of its own, or let `choose_sparse` choose one under a budget")
    return sparse_plan(graph, scheme.biases, scheme.ratios)


def sparse_plan(graph: Graph, biases: int, ratios: Mapping[int, float]) -> Plan:
    """The plan in which the last `biases` convolutions learn their bias, and those of `ratios` a share of channels.

    A convolution without a bias has it in the norm behind it, whose shift learns. Linear layers learn whole. Raises
    PlanError when there are fewer convolutions, or when a weight would learn where no gradient arrives.
    """
    convs = graph.layers("conv")
    if not 0 <= biases <= len(convs):
        raise PlanError(f"the last {biases} biases are asked for, but the network has {len(convs)} convolutions: "
                        "ask for as many as it has")
    outside = sorted(index for index in ratios if not len(convs) - biases <= index < len(convs))
    if outside:
        raise PlanError(f"convolution {outside[0]} is to learn, but gradients reach only the last {biases} of "
                        f"{len(convs)}: ask for more biases, or leave its weight frozen")
    shares = {convs[index].name: ratios[index] for index in sorted(ratios)}
    start = graph.calls.index(convs[len(convs) - biases]) if biases else len(graph.calls)
    learns: dict[str, tuple[str, ...]] = {}
    for index, call in enumerate(graph.calls):
        if call.kind == "linear" or (call.kind in ("conv", "norm") and index >= start):
            wanted = ("weight", "bias") if call.kind == "linear" or call.name in shares else ("bias",)
            learns[call.name] = tuple(role for role in wanted if role in call.params)
    layers: dict[str, tuple[Method, ...]] = {name: (SparseUpdate(ratio=ratio),) for name, ratio in shares.items()}
    return Plan(input_shape=graph.input_shape, layers=layers, learns={name: r for name, r in learns.items() if r})


def place_windows(model: nn.Module, graph: Graph, plan: Plan) -> Plan:
    """The same plan, every window of it where the L2 norm of the learning weights is largest."""
    placed = dict(plan.layers)
    for call in graph.layers("conv"):
        own = plan.settings(call.name, SparseUpdate)
        if isinstance(own, SparseUpdate) and call.geometry is not None and own.model_copy(
                update={"first": 0}).refuse(call) is None:
            moved = own.placed(model.get_parameter(call.params["weight"]), call.geometry)
            placed[call.name] = tuple(moved if method is own else method for method in plan.layers[call.name])
    return plan.model_copy(update={"layers": placed})
