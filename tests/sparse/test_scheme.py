"""Released schemes on the built-in networks, and the plans that schemes make."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import edgetune as et
from edgetune.contract import Plan
from edgetune.errors import PlanError
from edgetune.methods.backward.sparse_update import SparseUpdate
from edgetune.models import load_model
from edgetune.profile import measure, profile
from edgetune.quantize import QuantizedNetwork, quantize
from edgetune.sparse import (
    place_windows,
    released_plan,
    released_schemes,
    scheme_learns,
    scheme_plan,
    sparse_learns,
    sparse_plan,
)
from nets import NETS

SCHEMES = released_schemes()


@pytest.mark.parametrize("name", SCHEMES)
def test_a_released_scheme_fits_its_network(name: str, tmp_path: Path) -> None:
    scheme = SCHEMES[name]
    model, x = load_model(scheme.network, num_classes=3), torch.randn(1, 3, 64, 64)
    graph = et.trace(model, x)
    plan = released_plan(model, graph, name)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    convs = [call.name for call in graph.layers("conv")]
    assert {convs.index(layer): own.ratio for layer, (own,) in plan.layers.items()} == scheme.ratios
    shifts = [name for name in plan.learns if name in {call.name for call in graph.layers("norm")}]
    assert len(shifts) == scheme.biases and plan.learns["classifier" if "classifier" in plan.learns else
                                                        "classifier.1"] == ("weight", "bias")
    predicted = profile(model, x, plan, graph=graph)
    et.apply(model, plan)
    assert predicted.layers == measure(model, x, repeats=1).layers


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.memory_kb < 50])
def test_a_released_scheme_fits_the_integer_network(name: str) -> None:
    """The same layers and shares as in float; windows lie where the folded weights are largest."""
    scheme = SCHEMES[name]
    model, x = load_model(scheme.network, num_classes=3).eval(), torch.randn(1, 3, 64, 64)
    quantized = quantize(model, [x])
    learns, plan = scheme_learns(quantized, scheme), scheme_plan(et.trace(model, x), scheme)
    windows = {layer: [role for role in roles if not isinstance(role, str)] for layer, roles in learns.items()}
    assert {layer: own[0].ratio for layer, own in windows.items() if own} == {
        layer: own.ratio for layer, (own,) in plan.layers.items()
    }
    assert sum("bias" in learns.get(conv.name, ()) for conv in quantized.graph.convs) == scheme.biases
    F.cross_entropy(QuantizedNetwork(quantized, learns)(x), torch.tensor([1])).backward()
    with pytest.raises(PlanError, match="last 99 biases"):
        sparse_learns(quantized, 99, {})
    with pytest.raises(PlanError, match="was made for 7 convolutions"):
        scheme_learns(quantized, scheme.model_copy(update={"convolutions": 7}))


def test_a_larger_scheme_of_the_same_network_takes_more() -> None:
    for network in {scheme.network for scheme in SCHEMES.values()}:
        model, x = load_model(network, num_classes=10), torch.zeros(1, 3, 128, 128)
        graph = et.trace(model, x)
        costs = [profile(model, x, scheme_plan(graph, scheme), optimizer_copies=0, graph=graph)
                 for scheme in SCHEMES.values() if scheme.network == network]
        took = [cost.kept_bytes + cost.grad_bytes for cost in costs]
        assert took == sorted(took)


def test_what_does_not_fit_is_refused_with_the_reason() -> None:
    model = load_model("resnet20")
    graph = et.trace(model, torch.zeros(1, 3, 32, 32))
    with pytest.raises(PlanError, match=r"made for 42 convolutions, but this network has 1\d|2\d"):
        released_plan(model, graph, "mcunet-49KB")
    with pytest.raises(PlanError, match=r"'mcunet-50KB' is unknown: choose from mcunet-49KB, "):
        released_plan(model, graph, "mcunet-50KB")
    with pytest.raises(PlanError, match="last 99 biases"):
        sparse_plan(graph, 99, {})
    with pytest.raises(PlanError, match="convolution 3 is to learn, but gradients reach only the last 2"):
        sparse_plan(graph, 2, {3: 0.5})


def test_biases_stand_in_the_norms_behind_and_windows_where_norms_are_largest() -> None:
    torch.manual_seed(0)
    model, x = NETS["Inverted"](), torch.zeros(1, 3, 16, 16)
    graph = et.trace(model, x)
    plan = sparse_plan(graph, 5, {2: 0.25, 5: 0.5})
    assert plan.learns == {"depth.0": ("weight", "bias"), "depth.1": ("bias",), "fc1": ("bias",), "fc2": ("bias",),
                           "project.0": ("weight", "bias"), "project.1": ("bias",), "head.2": ("weight", "bias")}
    with torch.no_grad():
        model.depth[0].weight[7] += 9
        model.project[0].weight[:, 2:5] -= 9
    placed = place_windows(model, graph, plan)
    (depth,), (project,) = placed.layers["depth.0"], placed.layers["project.0"]
    assert isinstance(depth, SparseUpdate) and isinstance(project, SparseUpdate)
    assert 5 <= depth.first <= 7 and project.first <= 2
    assert (depth.ratio, project.ratio, placed.learns) == (0.25, 0.5, plan.learns)
