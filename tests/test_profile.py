"""Predicted against measured: kept bytes and products equal, the peak within a tenth."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from edgetune.allocator import peak_during
from edgetune.apply import apply
from edgetune.contract import Method, Plan
from edgetune.graph import trace
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.gradient_filter import GradientFilter
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.models import load_model
from edgetune.plan import last_layers
from edgetune.profile import Cost, measure, profile

CPU = torch.device("cpu")
MODELS = ("mobilenet_v2", "resnet18", "mobilenet_v3_small")
METHODS: dict[str, Method | None] = {
    "plain": None, "exact": Exact(), "filter_2": GradientFilter(patch_px=2),
    "filter_4_grid": GradientFilter(patch_px=4, taps="grid"), "chain_2": PooledChain(patch_px=2),
    "chain_4_grid": PooledChain(patch_px=4, taps="grid")}


def plan_for(model: nn.Module, x: torch.Tensor, method: Method | None, count: int | None = None) -> Plan | None:
    return None if method is None else last_layers(trace(model, x[:1]), count, method)


def both(model: nn.Module, x: torch.Tensor, plan: Plan | None) -> tuple[Cost, Cost]:
    """Prediction and measurement of the same step."""
    predicted = profile(model, x, plan)
    undo = apply(model, plan) if plan is not None else None
    measured = measure(model, x, repeats=1, micro_batch=plan.micro_batch if plan is not None else None)
    if undo is not None:
        undo()
    return predicted, measured


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_kept_bytes_and_products_are_predicted_to_the_byte(name: str, method: str) -> None:
    model, x = load_model(name, num_classes=10), torch.randn(2, 3, 64, 64)
    predicted, measured = both(model, x, plan_for(model, x, METHODS[method]))
    assert predicted.layers == measured.layers
    assert (predicted.grad_bytes, predicted.kept_bytes) == (measured.grad_bytes, measured.kept_bytes)
    assert predicted.forward_macs == trace(model, x).macs
    assert predicted.kept_bytes > 0 < predicted.backward_macs


@pytest.mark.parametrize("name", MODELS)
def test_what_a_chain_keeps_for_scales_is_predicted_to_the_byte(name: str) -> None:
    model, x = load_model(name, num_classes=10), torch.randn(2, 3, 64, 64)
    graph = trace(model, x[:1])
    shifts, scales = (profile(model, x, last_layers(graph, None, PooledChain(), scales=own)) for own in (False, True))
    predicted, measured = both(model, x, last_layers(graph, None, PooledChain(), scales=True))
    assert predicted.layers == measured.layers == scales.layers
    assert shifts.kept_bytes < predicted.kept_bytes == measured.kept_bytes


@pytest.mark.parametrize("batch, px", [(1, 224), (8, 128), (32, 128)], ids=lambda v: str(v))
@pytest.mark.parametrize("method", ["plain", "chain_4_grid"])
@pytest.mark.parametrize("name", MODELS)
def test_the_peak_is_predicted_within_a_tenth(name: str, method: str, batch: int, px: int) -> None:
    model, x = load_model(name, num_classes=10), torch.randn(batch, 3, px, px)
    predicted, measured = both(model, x, plan_for(model, x, METHODS[method]))
    # optimizer state is arithmetic: without it the comparison is harder
    own = predicted.peak_bytes - predicted.optimizer_bytes
    assert own == pytest.approx(measured.peak_bytes - measured.optimizer_bytes, rel=0.1)


def test_plans_of_the_last_layers_keep_nothing_before() -> None:
    model, x = load_model("mobilenet_v2", num_classes=10), torch.randn(2, 3, 64, 64)
    predicted, measured = both(model, x, plan_for(model, x, PooledChain(patch_px=2), count=4))
    assert predicted.layers == measured.layers
    first = next(i for i, layer in enumerate(predicted.layers) if layer.kept_bytes)
    assert sum(layer.kind == "conv" for layer in predicted.layers[first:]) == 4
    assert all(layer.backward_macs == 0 for layer in predicted.layers[:first])


def test_micro_batches_shrink_what_is_kept_and_hold_the_gradients() -> None:
    model, x = load_model("resnet20"), torch.randn(8, 3, 32, 32)
    whole = plan_for(model, x, Exact())
    assert whole is not None
    predicted, measured = both(model, x, whole.model_copy(update={"micro_batch": 2}))
    at_once = profile(model, x, whole)
    assert predicted.layers == measured.layers
    assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.1)
    assert (predicted.forward_macs, predicted.backward_macs) == (at_once.forward_macs, at_once.backward_macs)
    assert 4 * predicted.kept_bytes == pytest.approx(at_once.kept_bytes, rel=0.001)
    assert predicted.optimizer_bytes + predicted.grad_bytes < predicted.peak_bytes < at_once.peak_bytes


def test_optimizer_state_is_part_of_the_peak() -> None:
    model, x = load_model("resnet20"), torch.randn(2, 3, 32, 32)
    none, adam = (profile(model, x, optimizer_copies=copies) for copies in (0, 2))
    assert (none.optimizer_bytes, adam.optimizer_bytes) == (0, 2 * adam.grad_bytes)
    assert adam.peak_bytes - none.peak_bytes == 2 * adam.grad_bytes
    assert none.param_bytes == sum(p.numel() * 4 for p in model.parameters())


def test_a_prediction_allocates_nothing_of_the_networks_size_and_changes_nothing() -> None:
    model, x = load_model("mobilenet_v2"), torch.zeros(1).expand(64, 3, 224, 224)
    before, plan = copy.deepcopy(model.state_dict()), plan_for(model, x, PooledChain(patch_px=2))
    profile(model, x, plan)
    assert peak_during(CPU, lambda: profile(model, x, plan)) < 1 << 20
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model.training and "forward" not in vars(model)
    assert all(p.grad is None and p.requires_grad and p.device == CPU for p in model.parameters())


def test_a_measurement_leaves_the_model_as_found() -> None:
    model, x = load_model("mobilenet_v3_small", num_classes=3), torch.randn(2, 3, 32, 32)
    model.classifier.train()
    modes = [module.training for module in model.modules()]
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    cost = measure(model, x, torch.tensor([0, 2]), repeats=2)
    assert cost.step_ms is not None and cost.step_ms > 0 and cost.origin == "measured"
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(first.grad, torch.ones_like(first)) and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_costs_are_files() -> None:
    cost = profile(load_model("resnet20"), torch.zeros(1, 3, 32, 32))
    assert Cost.model_validate_json(cost.model_dump_json()) == cost
    assert (cost.origin, cost.step_ms) == ("predicted", None)


def test_double_precision_keeps_twice_the_bytes() -> None:
    model, x = load_model("resnet20"), torch.randn(1, 3, 32, 32)
    single = profile(model, x)
    predicted, measured = both(model.double(), x.double(), None)
    assert predicted.layers == measured.layers
    for one, two in zip(single.layers, predicted.layers, strict=True):
        assert two.kept_bytes == 2 * one.kept_bytes or one.kind == "loss"


class Twice(nn.Module):
    """A layer that is called twice, a constant that is no buffer, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop, self.offset = nn.Conv2d(3, 3, 3, padding=1), nn.Dropout(0.5), torch.ones(3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.conv(self.conv(x * self.offset).relu())).flatten(1)


class Unfollowed(nn.Module):
    """Branches on a size, which cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.conv(x))
        if int(x.shape[0]) > 0:
            x = x.mean((2, 3))
        return self.head(x)


@pytest.mark.parametrize("build", [Twice, Unfollowed, lambda: nn.Sequential(nn.BatchNorm2d(3), Unfollowed())])
def test_any_module_has_a_cost(build) -> None:  # type: ignore[no-untyped-def]
    model, x = build(), torch.randn(3, 3, 6, 6)
    predicted, measured = both(model, x, None)
    assert predicted.layers == measured.layers
    assert sum(layer.param_bytes for layer in predicted.layers) == predicted.param_bytes
    assert sum(layer.kept_bytes for layer in predicted.layers) == predicted.kept_bytes > 0
    convs = {layer.name: layer for layer in predicted.layers if layer.kind == "conv"}
    assert len(convs) == 1 and all(layer.forward_macs and layer.backward_macs for layer in convs.values())
