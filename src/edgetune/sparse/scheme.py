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
from edgetune.quantize import Quantized
from edgetune.quantize import last_layers as last_integers
from edgetune.quantize.network import Learns
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
    _check_made_for(scheme, len(graph.layers("conv")))
    return sparse_plan(graph, scheme.biases, scheme.ratios)


def scheme_learns(quantized: Quantized, scheme: Scheme) -> Learns:
    """What of an integer network learns by a scheme. Raises PlanError as `scheme_plan` does."""
    _check_made_for(scheme, len(quantized.graph.convs))
    return sparse_learns(quantized, scheme.biases, scheme.ratios)


def sparse_learns(quantized: Quantized, biases: int, ratios: Mapping[int, float]) -> Learns:
    """`sparse_plan` for an integer network, its windows where the L2 norm of the real weights is largest.

    The head learns whole. Raises PlanError as `sparse_plan` does, Refusal for a convolution that has no windows.
    """
    convs = quantized.graph.convs
    _check_reached(len(convs), biases, ratios)
    learns = dict[str, tuple[str | SparseUpdate, ...]](last_integers(quantized.graph, 0, biases))
    for index, ratio in sorted(ratios.items()):
        name, geometry = convs[index].name, convs[index].geometry
        scale = quantized.tensors[f"{name}.weight_scale"].view(-1, 1, 1, 1)
        own = SparseUpdate(ratio=ratio).placed(quantized.tensors[f"{name}.weight"] * scale, geometry)
        learns[name] = (own, *learns[name])
    return learns


def _check_made_for(scheme: Scheme, found: int) -> None:
    if found != scheme.convolutions:
        raise PlanError(f"scheme '{scheme.name}' was made for {scheme.convolutions} convolutions, but this network has "
                        f"{found}: take a scheme of its own, or let `choose_sparse` choose one under a budget")


def sparse_plan(graph: Graph, biases: int, ratios: Mapping[int, float]) -> Plan:
    """The plan in which the last `biases` convolutions learn their bias, and those of `ratios` a share of channels.

    A convolution without a bias has it in the norm behind it, whose shift learns. Linear layers learn whole. Raises
    PlanError when there are fewer convolutions, or when a weight would learn where no gradient arrives.
    """
    convs = graph.layers("conv")
    _check_reached(len(convs), biases, ratios)
    shares = {convs[index].name: ratios[index] for index in sorted(ratios)}
    start = graph.calls.index(convs[len(convs) - biases]) if biases else len(graph.calls)
    learns: dict[str, tuple[str, ...]] = {}
    for index, call in enumerate(graph.calls):
        if call.kind == "linear" or (call.kind in ("conv", "norm") and index >= start):
            wanted = ("weight", "bias") if call.kind == "linear" or call.name in shares else ("bias",)
            learns[call.name] = tuple(role for role in wanted if role in call.params)
    layers: dict[str, tuple[Method, ...]] = {name: (SparseUpdate(ratio=ratio),) for name, ratio in shares.items()}
    return Plan(input_shape=graph.input_shape, layers=layers, learns={name: r for name, r in learns.items() if r})


def _check_reached(convs: int, biases: int, ratios: Mapping[int, float]) -> None:
    if not 0 <= biases <= convs:
        raise PlanError(f"the last {biases} biases are asked for, but the network has {convs} convolutions: "
                        "ask for as many as it has")
    outside = sorted(index for index in ratios if not convs - biases <= index < convs)
    if outside:
        raise PlanError(f"convolution {outside[0]} is to learn, but gradients reach only the last {biases} of "
                        f"{convs}: ask for more biases, or leave its weight frozen")


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
