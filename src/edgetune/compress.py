"""model, data, method -> a network of cheaper arithmetic, trained: which layers take part, and the training that fits.

A recipe is a plan in which layers have an arithmetic method, all parameters learn and norms take the statistics of
their batches, with the settings that the method is trained by.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgetune.contract import ArithmeticMethod, Plan
from edgetune.data import Dataset, batches
from edgetune.errors import PlanError
from edgetune.fit import estimate_norms, fit_layers
from edgetune.graph import Call, Graph, trace
from edgetune.hosts.arithmetic import arithmetic_layers
from edgetune.recognise import ARITHMETIC
from edgetune.run import Run, device_of
from edgetune.train import train

FIRST = "reads the pictures themselves"
FLOAT_BITS = 32


@dataclass(frozen=True)
class Weights:
    """The weights of one layer: how many there are, the bits of each, and why they stay as they are (None: they do
    not)."""

    layer: str
    count: int
    bits: int
    spared: str | None

    @property
    def float_bytes(self) -> int:
        """What they take in float32."""
        return 4 * self.count

    @property
    def bytes(self) -> int:
        """What they take packed, without scales."""
        return -(-self.count * self.bits // 8)


@dataclass(frozen=True)
class Recipe:
    """What becomes of a network: its plan, the reasons why convolutions stay as they are by name, and the settings of
    `edgetune.train` that differ from its own."""

    plan: Plan
    spared: dict[str, str]
    settings: dict[str, Any]

    def weights(self, graph: Graph) -> tuple[Weights, ...]:
        """Those of all convolutions and linear layers of the network."""
        return weights_of(graph, self.plan, self.spared)

    def follow(self, model: nn.Module, data: Dataset, *, out: str | Path, **settings: Any) -> Run:
        """Train `model` in place as the recipe says, and as `settings` of `edgetune.train` say otherwise."""
        return train(model, data, self.plan, out=out, **{"baseline": False, **self.settings, **settings})


def weights_of(graph: Graph, plan: Plan, spared: Mapping[str, str]) -> tuple[Weights, ...]:
    """The weights of all convolutions and linear layers, rewritten or not yet, in the order of execution."""
    methods, found = plan.arithmetic(), dict[str, Weights]()
    for call in graph.layers("conv", "linear", ARITHMETIC):
        name, count = call.name, math.prod(call.param_shapes.get("weight", (0,)))
        if name in methods:
            found[name] = Weights(name, count, methods[name].weight_bits, None)
        else:
            found[name] = Weights(name, count, FLOAT_BITS, spared.get(name, f"is a {call.kind} layer"))
    return tuple(found.values())


def recipe(graph: Graph, method: ArithmeticMethod, skip: Collection[str] = (), take: Collection[str] = ()) -> Recipe:
    """`method` in every convolution but the first one, those that the method spares and those under `skip`.

    `take` names layers that have the method all the same. Raises PlanError for names that are no convolutions of the
    network, that are both skipped and taken, and where nothing is left; Refusal (when the plan is applied) for layers
    that cannot take the method.
    """
    convs = {call.name: call for call in graph.layers("conv")}
    if not convs:
        raise PlanError(f"the network has no convolution that {method.method} could take: choose another with --model")
    _check_names(convs, skip, take)
    pictures = {call.node for call in graph.calls if call.kind == "input"}
    spared = {name: reason for name, call in convs.items() if name not in take
              and (reason := _spared(call, method, pictures, skip)) is not None}
    layers = {name: (method,) for name in convs if name not in spared}
    if not layers:
        name, reason = next(iter(spared.items()))
        raise PlanError(f"no layer is left for {method.method} ('{name}' {reason}): name some with --take")
    learns = {call.name: roles for call in graph.layers()
              if (roles := tuple(role for role in call.params if not role.startswith("running")))}
    plan = Plan(input_shape=graph.input_shape, layers=layers, learns=learns, norms="batch")
    return Recipe(plan, spared, dict(method.recipe))


def quantize_layers(model: nn.Module, method: ArithmeticMethod, batches: Sequence[torch.Tensor]) -> None:
    """Let the arithmetic layers of a trained network compute by `method` from now on, without any training.

    Settings are fitted to what each layer reads of `batches` x (n c h w), preprocessed, and norms are estimated anew.
    Raises PlanError where the network has no such layers.
    """
    layers = arithmetic_layers(model)
    if not layers:
        raise PlanError(f"the network has no layers that {method.method} could follow: compress it first")
    fit_layers(model, dict.fromkeys(layers, method), batches)
    estimate_norms(model, batches)


def _check_names(convs: Collection[str], skip: Collection[str], take: Collection[str]) -> None:
    for name in (*skip, *take):
        if name not in convs:
            raise PlanError(f"'{name}' is no convolution of this network: its convolutions are "
                            f"{', '.join(convs)}")
    if both := sorted(set(skip) & set(take)):
        raise PlanError(f"'{both[0]}' is both to be skipped and to be taken: leave out one of --skip and --take")


def _spared(call: Call, method: ArithmeticMethod, pictures: set[str], skip: Collection[str]) -> str | None:
    if call.name in skip:
        return "is skipped as asked"
    return FIRST if set(call.inputs) & pictures else method.spares(call)


def compress(model: nn.Module, data: Dataset, method: ArithmeticMethod, *, out: str | Path,
             skip: Collection[str] = (), take: Collection[str] = (), **settings: Any) -> Run:
    """Rewrite `model` by `method`, in place, train it on `data`, and leave a run folder at `out`.

    `skip` and `take` are as for `recipe`; `settings` are those of `edgetune.train`, and the method's own where they are
    silent. Raises what `recipe` and `edgetune.train` raise.
    """
    sample, _ = next(batches(data.train, 1, shuffle=False))
    made = recipe(trace(model, sample.to(device_of(model))), method, skip, take)
    return made.follow(model, data, out=out, **settings)
