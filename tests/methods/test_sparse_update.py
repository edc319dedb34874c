"""Sparse update: the window's gradient is that part of autograd's, its memory the weight's, its bytes its inputs'."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import edgetune as et
from edgetune.contract import Plan
from edgetune.errors import PlanError, Refusal
from edgetune.hosts.conv import convolve
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.sparse_update import SLICE, SparseUpdate, window, window_axis
from edgetune.models import load_model
from edgetune.overlap import ConvGeometry
from edgetune.plan import last_layers
from edgetune.profile import measure, profile
from geometries import geometries, operands
from nets import NETS, scramble


def windows(geometry: ConvGeometry) -> st.SearchStrategy[SparseUpdate]:
    total = window_axis(geometry)[1]
    return st.integers(1, total).flatmap(lambda count: st.builds(
        SparseUpdate, channels=st.just(count), first=st.integers(0, total - count)))


@settings(max_examples=80)
@given(st.data(), geometries(), st.integers(1, 4), st.integers(1, 2), st.integers(0, 2))
def test_the_windows_gradient_is_that_part_of_autograds(data: st.DataObject, geometry: ConvGeometry, i: int, o: int,
                                                        batch: int) -> None:
    # full convolutions of some width; depthwise ones with a multiplier stay as they are drawn
    if not geometry.depthwise:
        geometry = geometry.model_copy(update={"groups": 1, "in_channels": i, "out_channels": o})
    method = data.draw(windows(geometry))
    x, w, gy = operands(geometry, batch)
    x.requires_grad_()
    w.requires_grad_()
    gx, gw = torch.autograd.grad(convolve(x, w, None, geometry), (x, w), gy)
    found = method.grad_weight(method.save(x.detach(), geometry), gy, geometry)
    expected = method.part(gw, geometry)
    assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-10)
    assert torch.allclose(method.grad_input(gy, w.detach(), geometry), gx, atol=1e-10)


@pytest.mark.parametrize(("size", "kernel", "multiplier", "method", "kept"), [
    ((3, 8, 5, 7), 3, 0, SparseUpdate(channels=3, first=2), 3), ((1, 8, 5, 7), 1, 0, SparseUpdate(ratio=0.5), 4),
    ((2, 8, 4, 4), 3, 0, SparseUpdate(ratio=0.01), 1), ((1, 6, 5, 5), 3, 1, SparseUpdate(channels=2, first=4), 2),
    ((2, 6, 5, 5), 3, 2, SparseUpdate(channels=4, first=3), 3)])
def test_only_the_windows_input_is_kept(size: tuple[int, ...], kernel: int, multiplier: int, method: SparseUpdate,
                                        kept: int) -> None:
    n, c, h, w = size
    conv = nn.Conv2d(c, multiplier * c or 5, kernel, groups=c if multiplier else 1)
    model = nn.Sequential(nn.Tanh(), conv, nn.Flatten())
    plan = Plan(input_shape=size, layers={"1": (method,)}, learns={"1": ("weight", "bias")})
    predicted = profile(model, torch.randn(size), plan)
    et.apply(model, plan)
    measured = measure(model, torch.randn(size), repeats=1)
    conv_row = next(row for row in measured.layers if row.name == "1")
    assert conv_row.kept_bytes == 4 * n * kept * h * w
    assert predicted.layers == measured.layers and predicted.param_bytes == measured.param_bytes
    assert predicted.grad_bytes == measured.grad_bytes == 4 * (model[1].weight_slice.numel() + conv.out_channels)


@pytest.mark.parametrize("name", ["mobilenet_v2_0.35", "resnet18", "mobilenet_v3_small"])
def test_kept_bytes_and_products_of_whole_networks_are_predicted_to_the_byte(name: str) -> None:
    model, x = load_model(name, num_classes=10), torch.randn(2, 3, 64, 64)
    plan = last_layers(et.trace(model, x), None, SparseUpdate(ratio=0.125))
    whole = profile(model, x, last_layers(et.trace(model, x), None, Exact()))
    predicted = profile(model, x, plan)
    et.apply(model, plan)
    measured = measure(model, x, repeats=1)
    assert predicted.layers == measured.layers
    assert (predicted.grad_bytes, predicted.param_bytes) == (measured.grad_bytes, measured.param_bytes)
    assert sum(row.param_bytes for row in measured.layers) == whole.param_bytes == measured.param_bytes
    assert predicted.backward_macs < whole.backward_macs and predicted.grad_bytes < whole.grad_bytes


def test_where_only_biases_learn_only_masks_are_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(),
                          nn.Conv2d(4, 8, 1), nn.Flatten()).eval()
    x = torch.randn(2, 3, 9, 7)
    learns = {"0": ("bias",), "2": ("bias",), "3": ("bias",), "5": ("bias",)}
    plan = Plan(input_shape=tuple(x.shape), learns=learns)
    predicted = profile(model, x, plan)
    et.apply(model, plan)
    measured = measure(model, x, repeats=1)
    kept = {row.name: row.kept_bytes for row in measured.layers if row.kept_bytes and row.kind != "loss"}
    assert kept == {"1": 2 * 8 * 7 * 5 // 8, "4": 2 * 4 * 5 * 3 // 8}
    assert predicted.layers == measured.layers


def applied(ratio: float = 0.5, **settings: int) -> tuple[nn.Module, torch.Tensor, et.Undo]:
    torch.manual_seed(3)
    model, x = scramble(NETS["Inverted"]()), torch.randn(4, 3, 19, 17)
    undo = et.apply(model, last_layers(et.trace(model, x), None, SparseUpdate(ratio=ratio, **settings)))
    return model, x, undo


def step(model: nn.Module, x: torch.Tensor, rounds: int = 3) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05, 0.9, weight_decay=0.1)
    for _ in range(rounds):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
        optimizer.step()


def outside_and_inside(before: torch.Tensor, after: torch.Tensor, channels: int) -> tuple[bool, bool]:
    moved = (before != after).flatten(2).any(2).any(0)
    return bool(moved[channels:].any()), bool(moved[:channels].all())


@pytest.mark.parametrize("way", ["as applied", "copied", "moved", "assigned"])
def test_momentum_and_decay_move_the_window_of_the_weight_and_nothing_else(way: str) -> None:
    model, x, _ = applied()
    before = copy.deepcopy(model.state_dict())
    if way == "copied":
        model = copy.deepcopy(model)
    if way == "moved":
        model, x = model.double(), x.double()
    if way == "assigned":
        model.load_state_dict(copy.deepcopy(before), assign=True)
    step(model, x)
    after = model.state_dict()
    assert outside_and_inside(before["expand.0.weight"], after["expand.0.weight"], 3) == (False, True)
    assert torch.equal(after["expand.0.weight"][:, :3], model.expand[0].weight_slice)
    rows = (before["depth.0.weight"] != after["depth.0.weight"]).flatten(1).any(1)
    assert rows.tolist() == [True] * 6 + [False] * 6
    assert bool((before["even.weight"] != after["even.weight"]).any())  # grouped: left exact by the planner


def test_a_step_is_plain_trainings_step_where_all_channels_learn() -> None:
    found, x, _ = applied(ratio=1.0)
    torch.manual_seed(3)
    plain = scramble(NETS["Inverted"]())
    et.apply(plain, last_layers(et.trace(plain, x), None, Exact()))
    step(plain, x)
    step(found, x)
    expected = plain.state_dict()
    assert all(torch.allclose(value, expected[key], atol=1e-5) for key, value in found.state_dict().items())


def test_a_state_dict_is_the_networks_own_both_ways() -> None:
    model, x, undo = applied()
    keys = set(NETS["Inverted"]().state_dict())
    assert set(model.state_dict()) == keys
    other = {key: value + 1 if value.is_floating_point() else value for key, value in model.state_dict().items()}
    told = model.load_state_dict(other)
    assert not told.missing_keys and not told.unexpected_keys
    assert torch.equal(model.expand[0].weight_slice, other["expand.0.weight"][:, :3])
    assert torch.equal(model.expand[0].weight, other["expand.0.weight"])
    with pytest.raises(RuntimeError, match=r"size mismatch for expand\.0\.weight"):
        model.load_state_dict({**other, "expand.0.weight": torch.zeros(2, 2, 1, 1)})
    step(model, x)
    learned = copy.deepcopy(model.state_dict())
    undo()
    assert not any(name.endswith(SLICE) for name, _ in model.named_parameters())
    assert all(torch.equal(value, learned[key]) for key, value in model.state_dict().items())
    model.load_state_dict(other)


def test_layers_that_it_cannot_take_are_refused_by_name() -> None:
    model, x = NETS["Inverted"](), torch.zeros(1, 3, 16, 16)
    for layer, method, told in (("even", SparseUpdate(), "groups=2"), ("head.2", SparseUpdate(), "not a convolution"),
                                ("fc1", SparseUpdate(channels=5, first=8), "fewer than the 13")):
        with pytest.raises(Refusal, match=f"'{layer}' .*{told}.*: ") as refused:
            et.apply(model, Plan(input_shape=(1, 3, 16, 16), layers={layer: (method,)}, learns={layer: ("weight",)}))
        assert refused.value.way_out
    with pytest.raises(PlanError, match="gone"):
        et.apply(model, Plan(input_shape=tuple(x.shape), layers={"gone": (SparseUpdate(),)}))
    with pytest.raises(PlanError, match=r"fc1\.scale"):
        et.apply(model, Plan(input_shape=tuple(x.shape), layers={"fc1": (SparseUpdate(),)}, learns={"fc1": ("scale",)}))
    assert all(p.requires_grad for p in model.parameters()) and not hasattr(model.fc1, SLICE)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_window_has_the_largest_norm_of_all(axis: int) -> None:
    torch.manual_seed(0)
    for channels in (1, 3, 7):
        weight = torch.randn(7, 7, 3, 2)
        norms = [float(weight.narrow(axis, f, channels).norm()) for f in range(8 - channels)]
        assert norms[window(weight, channels, axis)] == pytest.approx(max(norms))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("net", NETS)
def test_inside_a_network_all_gradients_are_autograds(net: str, batch: int) -> None:
    torch.manual_seed(6)
    model, x = scramble(NETS[net]()).double().eval(), torch.randn(batch, 3, 21, 18, dtype=torch.float64)
    nn.functional.cross_entropy(model(x), torch.arange(batch)).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    graph = et.trace(model, x)
    plan = last_layers(graph, None, SparseUpdate(ratio=0.4), scales=True)
    et.apply(model, plan, graph)
    nn.functional.cross_entropy(model(x), torch.arange(batch)).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == plan.learned() and sum(name.endswith(SLICE) for name in found) >= 1
    geometry = {f"{call.name}.{SLICE}": call for call in graph.layers("conv")}
    for name, grad in found.items():
        whole = expected[name.replace(SLICE, "weight")]
        assert whole is not None
        if name.endswith(SLICE):
            call = geometry[name]
            (method,) = plan.layers[call.name]
            assert isinstance(method, SparseUpdate) and call.geometry is not None
            whole = method.part(whole, call.geometry)
        assert torch.allclose(grad, whole, rtol=1e-9, atol=1e-12), name
