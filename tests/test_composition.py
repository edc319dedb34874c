"""All at once: a cached frozen part, then MobileTL blocks, sparse channels, filtered runs and shift-only norms."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edgetune as et
from edgetune import loop
from edgetune.cache import Cache
from edgetune.contract import Method, Plan
from edgetune.data import Augment, Dataset, Preprocess, load_data
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.mobiletl import MobileTL
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.methods.backward.sparse_update import SparseUpdate
from edgetune.profile import measure, profile
from edgetune.run import WEIGHTS, Interrupted, Run, read_run, read_tensors
from edgetune.sparse import place_windows
from edgetune.train import resume, train
from nets import block, scramble

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE, BATCH = (8, 3, 24, 20), 8


class Bottleneck(nn.Module):
    """An inverted residual block; where the shape stays, its input is added."""

    def __init__(self, i: int, o: int, act: type[nn.Module], stride: int = 1) -> None:
        super().__init__()
        self.expand, self.depth = block(i, 2 * i, 1, act=act), block(2 * i, 2 * i, act=act, stride=stride, groups=2 * i)
        self.project, self.adds = block(2 * i, o, 1, act=None), i == o and stride == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(self.depth(self.expand(x)))
        return x + y if self.adds else y


class Small(nn.Module):
    """Stem and a block that stay frozen, a block by each way to learn, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.frozen = block(3, 8, act=nn.Hardswish, stride=2), Bottleneck(8, 8, nn.ReLU6)
        self.bits, self.sparse = Bottleneck(8, 12, nn.Hardswish), Bottleneck(12, 12, nn.ReLU6)
        self.pooled, self.exact = Bottleneck(12, 12, nn.ReLU6, stride=2), Bottleneck(12, 12, nn.ReLU6)
        self.head = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pooled(self.sparse(self.bits(self.frozen(self.stem(x)))))
        return self.head(self.exact(x).mean((2, 3)))


WAYS: dict[str, Method] = {"bits": MobileTL(), "sparse": SparseUpdate(ratio=0.5), "pooled": PooledChain(patch_px=2),
                           "exact": Exact()}


def network(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return scramble(Small()).eval()


def mixed(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> Plan:
    """Each block its own way; norms behind the frozen part learn their shift."""
    graph = et.trace(model, torch.zeros(shape).to(next(model.parameters())))
    layers: dict[str, tuple[Method, ...]] = {}
    learns: dict[str, tuple[str, ...]] = {"head": ("weight", "bias")}
    for call in graph.layers("conv", "norm"):
        own = WAYS.get(call.name.split(".")[0])
        if own is not None:
            learns[call.name] = ("weight", "bias") if call.kind == "conv" else ("bias",)
            layers |= {call.name: (own,)} if call.kind == "conv" else {}
    return place_windows(model, graph, Plan(input_shape=graph.input_shape, layers=layers, learns=learns, micro_batch=4))


def test_kept_bytes_are_predicted_to_the_byte_and_add_up() -> None:
    model, x = network(), torch.randn(SHAPE)
    plan = mixed(model)
    told = profile(model, x, plan)
    undo = et.apply(model, plan)
    took = measure(model, x, micro_batch=4, repeats=1)
    assert {"HardswishRule", "ChainRule", "WindowRule", "ConvRule"} <= {type(s.rule).__name__ for s in undo.segments}
    for field in ("kept_bytes", "grad_bytes", "optimizer_bytes", "layers"):
        assert getattr(took, field) == getattr(told, field)
    kept = {layer.name: layer.kept_bytes for layer in told.layers if layer.kept_bytes}
    assert not any(name.startswith(("stem", "frozen")) for name in kept)
    assert not any(name.rpartition(".")[2] == "1" for name in kept)  # shifts keep nothing
    # 4 samples of 12x10 pixels, of which half of the channels learn, beside the 24 of the layer behind
    assert kept["sparse.expand.0"] == 4 * 6 * 12 * 10 * 4 and kept["sparse.project.0"] == 4 * 12 * 12 * 10 * 4
    everything = profile(model.requires_grad_(True), x[:4])
    assert told.kept_bytes < everything.kept_bytes / 3


def test_exact_parts_agree_with_autograd() -> None:
    """Behind the filtered block all is exact; in front of it so is what the rules say, given the gradient they get."""
    model, x = network().double(), torch.randn(SHAPE, dtype=torch.float64)
    y, twin = torch.arange(8) % 10, copy.deepcopy(network().double())
    F.cross_entropy(twin(x), y).backward()
    plan = mixed(model)
    et.apply(model, plan)
    F.cross_entropy(model(x), y).backward()
    exact = {name: p.grad for name, p in twin.named_parameters()}
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == plan.learned()
    compared = [name for name in found if name.startswith(("exact", "head"))]
    assert len(compared) == 3 * 3 + 2
    for name in compared:
        assert exact[name] is not None and torch.allclose(found[name], exact[name], rtol=1e-9, atol=1e-12), name


def test_without_the_filter_the_windows_too_are_autograds() -> None:
    model, x = network().double(), torch.randn(SHAPE, dtype=torch.float64)
    y, twin = torch.arange(8) % 10, copy.deepcopy(network().double())
    F.cross_entropy(twin(x), y).backward()
    plan = mixed(model)
    layers = {name: stack for name, stack in plan.layers.items() if not isinstance(stack[0], PooledChain)}
    et.apply(model, plan.model_copy(update={"layers": layers}))
    F.cross_entropy(model(x), y).backward()
    convs = {call.name: call for call in et.trace(twin, x).layers("conv")}
    windows = 0
    for name, parameter in model.named_parameters():
        layer, _, role = name.rpartition(".")
        if parameter.grad is None or layer.startswith("bits"):
            continue
        grad = twin.get_parameter(f"{layer}.{role.removesuffix('_slice')}").grad
        geometry = convs[layer].geometry if layer in convs else None
        if role == "weight_slice" and geometry is not None and grad is not None:
            grad, windows = layers[layer][0].part(grad, geometry), windows + 1
        assert grad is not None and torch.allclose(parameter.grad, grad, rtol=1e-9, atol=1e-12), name
    assert windows == 3


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data("digits", Preprocess(size=SHAPE[2:]), limit=24)


class Stop(loop.Silent):
    """Ctrl-C at the n-th step."""

    def __init__(self, step: int) -> None:
        self.left = step

    def advance(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def run(digits: Dataset, out: Path, augment: Augment | None = None, **options: Any) -> Run:
    model = network()
    return train(model, digits, mixed(model), out=out, epochs=2, batch_size=BATCH, learning_rate=0.05, seed=5,
                 augment=augment, **options)


def same(a: Path, b: Path) -> bool:
    states, runs = [read_tensors(path / WEIGHTS)[0] for path in (a, b)], [read_run(path) for path in (a, b)]
    losses = [[(row.train_loss, row.val_loss) for row in each.epochs] for each in runs]
    return losses[0] == losses[1] and all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_two_epochs_with_the_frozen_part_cached(digits: Dataset, tmp_path: Path) -> None:
    """An interruption changes nothing, and only what the plan lists has learned."""
    views = {"cache": Cache(keep="disk", views=1), "augment": Augment(flip=True)}
    whole = run(digits, tmp_path / "whole", **views)
    assert whole.status == "finished" and len(whole.epochs) == 2
    assert whole.cached is not None and whole.cached.found > 0
    assert whole.cached.layers and all(layer.startswith(("frozen", "add")) for layer in whole.cached.layers)
    costs = whole.costs
    assert costs is not None and costs.planned_measured is not None
    took, told = (  # the labels, which the loss keeps, belong to the batch of the real step
        [layer for layer in cost.layers if layer.kind != "loss"]
        for cost in (costs.planned_measured, costs.planned_predicted))
    assert took == told
    with pytest.raises(Interrupted):
        run(digits, tmp_path / "cut", **views, progress=Stop(4))
    resume(tmp_path / "cut", model=network(seed=9), data=digits)
    assert same(tmp_path / "cut", tmp_path / "whole")
    before, after = network().state_dict(), read_tensors(tmp_path / "whole" / WEIGHTS)[0]
    plan = mixed(network())
    learned = {name.removesuffix("_slice") for name in plan.learned()}
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == learned
    window = plan.layers["sparse.expand.0"][0]
    assert isinstance(window, SparseUpdate)
    moved = (after["sparse.expand.0.weight"] != before["sparse.expand.0.weight"]).flatten(2).any(2).any(0)
    assert moved.nonzero().flatten().tolist() == list(range(window.first, window.first + 6))


def test_the_cache_changes_nothing(digits: Dataset, tmp_path: Path) -> None:
    for name, cache in (("kept", Cache()), ("all", None)):
        run(digits, tmp_path / name, cache=cache)
    assert same(tmp_path / "kept", tmp_path / "all")
