"""The methods that the accuracy benches compare, as rows: what each makes of a pretrained network before it trains.

A new method is a new `Prepare`: a function from the network and pictures of it to a `Trainee`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from edgetune.apply import apply
from edgetune.compress import recipe
from edgetune.contract import ArithmeticMethod, KeptMethod, Method, Plan
from edgetune.distil import Distil, distilled
from edgetune.draft import held_by, last_layers
from edgetune.frozen import front_of, install
from edgetune.graph import Graph, trace
from edgetune.loop import optimizer_named
from edgetune.lowrank import choose_ranks
from edgetune.methods.backward.comet import COMET
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.low_bit import LowBit
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.methods.backward.tinytl import TinyTL
from edgetune.quantize import (
    Quantized,
    QuantizedNetwork,
    Rounded,
    Stepped,
    StochasticSGD,
    quantize,
    scale_gradients,
)
from edgetune.quantize import last_layers as last_integers
from edgetune.quantize.network import Learns
from edgetune.quantize.weights import Held
from edgetune.sparse.scheme import place_windows, released_schemes, sparse_plan
from edgetune.stretches import checkpointed, sqrt_stretches

BATCH = 32


def _sgd(model: nn.Module, rate: float, momentum: float, seed: int) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate, momentum=momentum)


def _stochastic_sgd(model: nn.Module, rate: float, momentum: float, seed: int) -> torch.optim.Optimizer:
    return StochasticSGD(model, lr=rate, momentum=momentum, seed=seed)


def leave(model: Any) -> None:
    """Gradients as they are."""


WEIGHT_DECAY = 1e-4
Optimizes = Callable[[nn.Module, float, float, int], torch.optim.Optimizer]
"""From a network, the learning rate, the momentum and a seed."""


def _decayed(name: str) -> Optimizes:
    """The optimizer of that name, by which everything decays that learns."""

    def optimizer(model: nn.Module, rate: float, momentum: float, seed: int) -> torch.optim.Optimizer:
        learned = [p for p in model.parameters() if p.requires_grad]
        return optimizer_named(name, [{"params": learned, "weight_decay": WEIGHT_DECAY}], rate, momentum)

    return optimizer


@dataclass(frozen=True)
class Trainee:
    """A network that is ready to train: `rescale` comes after backward, `optimizer` takes (rate, momentum, seed).

    `plan` is what was applied, where a bench asks for it. With `live` norms take the statistics of their batches in
    training. `loss` takes (x, y) where it is more than the cross-entropy.
    """

    model: nn.Module
    rescale: Callable[[Any], None] = leave
    optimizer: Optimizes = _sgd
    plan: Plan | None = None
    live: bool = False
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None


Prepare = Callable[[nn.Module, torch.Tensor, torch.Tensor], Trainee]
"""From a pretrained network in eval mode, with pictures x (n c h w) and labels y (n) to trace and calibrate with."""


@dataclass(frozen=True)
class Arm:
    """One method as a row. Nothing learns at all unless `trains`.

    `rates` are learning rates to choose from for this arm alone; without them it takes the one chosen on `rate_of`,
    or else on plain. It goes `repeats` times through the splits of a case, each time with other seeds: another head,
    another order of the photos.
    """

    method: str
    prepare: Prepare
    patch_px: int | None = None
    taps: str | None = None
    trains: bool = True
    rates: tuple[float, ...] | None = None
    rate_of: Arm | None = None
    repeats: int = 1

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this row from the others of its case."""
        return {"method": self.method, "patch_px": self.patch_px, "taps": self.taps}


def stock(count: int | None = None, scales: bool = True) -> Prepare:
    """Stock autograd: the last `count` convolutions (None: all), the norms behind them and the head learn.

    Norms learn their scales only with `scales`.
    """

    def prepare(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Trainee:
        learned = last_layers(trace(model, x[:BATCH]), count, Exact(), scales=scales).learned()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in learned)
        for parameter in model.parameters():
            if parameter.dim() == 4:  # the layout in which stock convolutions are faster
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return Trainee(model)

    return prepare


def unfrozen(optimizer: str) -> Prepare:
    """The float network, all of it learning, norms by their batches: what arithmetic methods are compared with."""

    def prepare(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Trainee:
        return Trainee(model.requires_grad_(True), optimizer=_decayed(optimizer), live=True)

    return prepare


def arithmetic(method: ArithmeticMethod, distil: Distil | None = None) -> Prepare:
    """Every convolution that the method does not spare by its numbers; `distil` from the network that it was."""

    def prepare(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Trainee:
        made, teacher = recipe(trace(model, x[:1]), method), copy.deepcopy(model)
        apply(model, made.plan)
        optimizer = _decayed(made.settings.get("optimizer", "sgd"))
        model.train()
        loss = None if distil is None else distilled(model, teacher, distil, x)
        model.eval()
        return Trainee(model, optimizer=optimizer, plan=made.plan, live=True, loss=loss)

    return prepare


def planned(plan: Callable[[Graph], Plan]) -> Prepare:
    """By the plan that `plan` makes of the graph."""

    def prepare(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Trainee:
        graph = trace(model, x[:BATCH])
        apply(model, plan(graph), graph)
        return Trainee(model)

    return prepare


def last(count: int | None, method: Method, scales: bool = False) -> Callable[[Graph], Plan]:
    """The last `count` convolutions (None: all) by `method`; weights, shifts and the head learn.

    With `scales` the norms' scales do too.
    """
    return lambda graph: last_layers(graph, count, method, scales=scales)


KEPT: dict[str, KeptMethod] = {
    "COMET": COMET(),
    "COMET, published": COMET.published(),
    **{f"{bits}-bit kept": LowBit(bits=bits) for bits in (2, 4, 8)},
}
"""How what is kept may be held, in fewer bytes."""


def held(count: int | None, method: KeptMethod) -> Prepare:
    """Exact gradients in the last `count` convolutions (None: all), norms' scales too; what is kept by `method`."""

    return planned(lambda graph: held_by(last_layers(graph, count, Exact(), scales=True), graph, method))


def recomputed(count: int | None, textbook: bool = False) -> Prepare:
    """Exact gradients likewise, with stretches that run again in backward: those for the lowest peak, or `textbook`."""

    def prepare(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Trainee:
        graph = trace(model, x[:BATCH])
        plan = last_layers(graph, count, Exact(), scales=True)
        made = sqrt_stretches(graph, plan) if textbook else checkpointed(model, x[:BATCH], plan, graph=graph)
        apply(model, made, graph)
        return Trainee(model, plan=made)

    return prepare


def low_rank(count: int, times: float, scales: bool = True) -> Prepare:
    """ASI in the last `count` convolutions: their inputs kept in `times` fewer bytes, the ranks chosen by a batch."""

    def prepare(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Trainee:
        x, y = x[:BATCH], y[:BATCH]
        graph = trace(model, x)
        inputs = sum(math.prod(call.in_shapes[0]) * x.element_size() for call in graph.layers("conv")[-count:])
        apply(model, choose_ranks(model, (x, y), int(inputs / times), last=count, scales=scales, graph=graph), graph)
        return Trainee(model)

    return prepare


def chain(patch_px: int, taps: str = "mean", scales: bool = False, count: int | None = None) -> Arm:
    """The pooled chain in the last `count` convolutions (None: in all)."""
    method = PooledChain.model_validate({"patch_px": patch_px, "taps": taps})
    name = "pooled chain" + (", with scales" if scales else "")
    return Arm(name, planned(last(count, method, scales)), patch_px, taps)


def frozen_int8(prepare: Prepare) -> Prepare:
    """What `prepare` makes, with the part of it that is frozen in front of all that learns in integers.

    `prepare` is asked twice: of a copy, which tells what is frozen, and of the network that has its integers. The
    case has to train on photos, not on maps behind frozen blocks.
    """

    def prepared(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Trainee:
        install(model, front_of(prepare(copy.deepcopy(model), x, y).model, x.split(BATCH)))
        return prepare(model, x, y)

    return prepared


def tinytl(count: int | None = None, residuals: bool = True, biases: bool = True) -> Arm:
    """TinyTL in the last `count` blocks (None: in all): lite residuals, biases, or both; and the head."""
    method = TinyTL(residuals=residuals, biases=biases)
    parts = [part for part, learns in (("residuals", residuals), ("biases", biases)) if learns]
    return Arm(f"tinytl, {' and '.join(parts)}", planned(lambda graph: method.last_blocks(graph, count)))


def integers(
    count: int | None, rescale: Callable[[Any], None] = scale_gradients, state: type[Held] = Rounded
) -> Prepare:
    """The int8 network; weights and biases of its last `count` convolutions (None: all) and the head learn.

    `rescale` is what quantization-aware scaling does, `state` how weights are held between steps.
    """

    def prepare(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Trainee:
        record = quantize(model, x.split(BATCH))
        learns = last_integers(record.graph, len(record.graph.convs) if count is None else count)
        return replace(qas(record, learns, state), rescale=rescale)

    return prepare


def scheme(name: str) -> Prepare:
    """A published sparse update (see `edgetune.sparse`), counted from the end: what it learns may be all there is."""

    def prepare(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Trainee:
        graph, published = trace(model, x[:BATCH]), released_schemes()[name]
        skipped = published.convolutions - len(graph.layers("conv"))
        ratios = {index - skipped: ratio for index, ratio in published.ratios.items()}
        apply(model, place_windows(model, graph, sparse_plan(graph, published.biases, ratios)), graph)
        return Trainee(model)

    return prepare


def qas(record: Quantized, learns: Learns, state: type[Held]) -> Trainee:
    """An integer network that learns `learns`, with quantization-aware scaling."""
    return Trainee(
        QuantizedNetwork(record, learns, state), scale_gradients, _stochastic_sgd if state is Stepped else _sgd
    )
