"""What each entry of a sparse update gains: measured by short trainings, or estimated from one batch.

A table is made once, on a workstation, and serves every budget and, as Lin et al. (NeurIPS 2022) found, other data
too. Gains are taken to add up; `choose_sparse` then finds the best sum under a budget.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from edgetune.apply import apply
from edgetune.contract import Plan
from edgetune.errors import PlanError
from edgetune.graph import Call, Graph
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.sparse_update import SparseUpdate, window, window_axis
from edgetune.plan import last_layers
from edgetune.record import Record
from edgetune.sparse.scheme import place_windows, sparse_plan

RATIOS = (0.125, 0.25, 0.5, 1.0)
Entry = tuple[str, Plan]


class Contributions(Record):
    """`bias[k]`: gain of learning the last k biases over the head alone; `weight[layer][ratio]`: gain of learning
    that share of a layer's channels beside the biases. `origin` says in which unit: fisher or accuracy."""

    origin: str
    bias: dict[int, float]
    weight: dict[str, dict[float, float]]


class Trials(Record):
    """Accuracies of short trainings by entry (`head`, `bias 12`, `weight features.3.conv 0.25`), as far as they ran."""

    accuracy: dict[str, float] = {}


def fisher_contributions(model: nn.Module, graph: Graph, batch: tuple[torch.Tensor, torch.Tensor],
                         ratios: Sequence[float] = RATIOS, *, per_cost: bool = False) -> Contributions:
    """A table from one labelled batch x (n c h w), y (n): the Fisher information of what would learn.

    An entry's gain is the mean over samples of the squared gradient of log p(y | x), summed over its parameters.
    With `per_cost` a layer's gains are divided by its parameters and its multiply-accumulates, each relative to the
    largest layer's, as TinyTrain does (Kwon et al., ICML 2024, with the information of activations instead). Samples
    go through one by one on a copy of the model.
    """
    squares = _mean_squared_gradients(model, graph, batch)
    weight: dict[str, dict[float, float]] = {}
    convs = [call for call in graph.layers("conv") if SparseUpdate(ratio=1.0).refuse(call) is None]
    costs = {call.name: _relative_cost(call, convs) if per_cost else 1.0 for call in convs}
    for call in convs:
        assert call.geometry is not None
        axis = window_axis(call.geometry)[0]
        own = squares[call.params["weight"]].sum([a for a in range(4) if a != axis]) / costs[call.name]
        weight[call.name] = {}
        for ratio in ratios:
            count = SparseUpdate(ratio=ratio).count(call.geometry)
            first = window(model.get_parameter(call.params["weight"]), count, axis)
            weight[call.name][ratio] = float(own[first:first + count].sum())
    return Contributions(origin="fisher", bias=_bias_gains(graph, squares), weight=weight)


def _mean_squared_gradients(model: nn.Module, graph: Graph,
                            batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    twin, (x, y) = copy.deepcopy(model), batch
    apply(twin, last_layers(graph, None, Exact()), graph)
    twin.eval()
    learned = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    squares = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in learned.items()}
    for sample, label in zip(x.split(1), y.split(1), strict=True):
        grads = torch.autograd.grad(F.cross_entropy(twin(sample), label), list(learned.values()), allow_unused=True)
        for square, grad in zip(squares.values(), grads, strict=True):
            if grad is not None:
                square += grad.double().square() / len(x)
    return squares


def _bias_gains(graph: Graph, squares: dict[str, torch.Tensor]) -> dict[int, float]:
    """Convolution by convolution from the output on, what their biases and the shifts of the norms hold together."""
    gains, gathered, depth = {}, 0.0, 0
    for call in reversed(graph.calls):
        if call.kind in ("conv", "norm") and "bias" in call.params:
            gathered += float(squares[call.params["bias"]].sum())
        if call.kind == "conv":
            depth += 1
            gains[depth] = gathered
    return gains


def _relative_cost(call: Call, convs: Sequence[Call]) -> float:
    largest = max(_weights(other) for other in convs), max(other.macs for other in convs)
    return _weights(call) / largest[0] * call.macs / largest[1]


def _weights(call: Call) -> int:
    return torch.Size(call.param_shapes["weight"]).numel()


def measure_contributions(model: nn.Module, graph: Graph, evaluate: Callable[[Plan], float], file: str | Path, *,
                          depths: Sequence[int] | None = None, ratios: Sequence[float] = RATIOS,
                          progress: Callable[[str, int, int], None] | None = None) -> Contributions:
    """The table of the paper: `evaluate` trains briefly by a plan, from the same start, and gives the accuracy.

    One training for the head alone, one for the biases of each of `depths` (all by default), and one for each layer
    and ratio beside the biases of the greatest depth. Every result goes into `file` at once, and what stands there is
    not run again. `progress` hears of each entry: its name, how many are done, how many there are. Raises RunError
    when the file cannot be read or written.
    """
    depths = range(1, len(graph.layers("conv")) + 1) if depths is None else depths
    if not depths:
        raise PlanError("no depth is asked for: give at least one number of biases that learn")
    trials = Trials.load(file) if Path(file).exists() else Trials()
    entries = dict(_entries(graph, depths, ratios))
    for done, (name, plan) in enumerate(entries.items()):
        if progress is not None:
            progress(name, done, len(entries))
        if name not in trials.accuracy:
            found = evaluate(place_windows(model, graph, plan))
            trials = Trials(accuracy={**trials.accuracy, name: found})
            trials.save(file)
    return _from_trials({name: trials.accuracy[name] for name in entries}, max(depths))


def _entries(graph: Graph, depths: Sequence[int], ratios: Sequence[float]) -> Iterator[Entry]:
    yield "head", sparse_plan(graph, 0, {})
    for depth in depths:
        yield f"bias {depth}", sparse_plan(graph, depth, {})
    convs, deepest = graph.layers("conv"), max(depths)
    for index in range(len(convs) - deepest, len(convs)):
        if SparseUpdate(ratio=1.0).refuse(convs[index]) is None:
            for ratio in ratios:
                yield f"weight {convs[index].name} {ratio}", sparse_plan(graph, deepest, {index: ratio})


def _from_trials(accuracy: dict[str, float], deepest: int) -> Contributions:
    bias: dict[int, float] = {}
    weight: dict[str, dict[float, float]] = {}
    for name, found in accuracy.items():
        kind, *rest = name.split(" ")
        if kind == "bias":
            bias[int(rest[0])] = found - accuracy["head"]
        elif kind == "weight":
            weight.setdefault(rest[0], {})[float(rest[1])] = found - accuracy[f"bias {deepest}"]
    return Contributions(origin="accuracy", bias=bias, weight=weight)
