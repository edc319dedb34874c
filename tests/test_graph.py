"""Tracing: every call is found, known numbers come out, what cannot be followed is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edgetune as et
from edgetune.errors import ModelError, Refusal
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.models import load_model
from edgetune.plan import last_layers
from nets import NETS


@pytest.mark.parametrize(("name", "macs"), [("mobilenet_v2", 300_774_272), ("resnet18", 1_814_073_344)])
def test_macs_are_the_published_ones(name: str, macs: int) -> None:
    assert et.trace(load_model(name, num_classes=1000), torch.zeros(1, 3, 224, 224)).macs == macs


@pytest.mark.parametrize("name", NETS)
def test_graph_goes_through_json_and_knows_its_readers(name: str) -> None:
    graph = et.trace(NETS[name](), torch.randn(2, 3, 16, 16))
    assert et.Graph.model_validate_json(graph.model_dump_json()) == graph
    for call in graph.calls:
        for node in call.inputs:
            assert not call.followed or call.node in graph[node].consumers


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = NETS["Residual"]().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    et.trace(model, torch.randn(2, 3, 16, 16))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_functional_adds_gates_and_activations_are_found() -> None:
    kinds = [call.kind for call in et.trace(NETS["Inverted"](), torch.randn(1, 3, 16, 16)).calls]
    assert kinds.count("add") == 1 and kinds.count("scale") == 1 and kinds.count("mean") == 2
    functions = [call.function for call in et.trace(NETS["Inverted"](), torch.randn(1, 3, 16, 16)).calls]
    assert {"hardswish", "relu6", "hardsigmoid", "relu"} <= set(functions)


class Index(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "kind", "facts"),
    [
        (lambda x: x[:, :, ::2, ::3], "subsample", {"stride_h": 2, "stride_w": 3}),
        (lambda x: x[:, :, 0::2, :], "subsample", {"stride_h": 2, "stride_w": 1}),
        (lambda x: x[:, :, 1::2, ::2], "other", {}),
        (lambda x: x[:, :, :8:2, ::2], "other", {}),
        (lambda x: x[:, ::2, :, :], "other", {}),
        (lambda x: x[:, 0], "other", {}),
        (lambda x: x[..., ::2], "other", {}),
        (lambda x: F.pad(x, (0, 0, 0, 0, 4, 1)), "pad", {"before": 4, "after": 1}),
        (lambda x: F.pad(x, (0, 0, 0, 0, 0, 3), "constant", 0), "pad", {"before": 0, "after": 3}),
        (lambda x: F.pad(x, pad=(0, 0, 0, 0, 0, 3), value=0.0), "pad", {"before": 0, "after": 3}),
        (lambda x: F.pad(x, (0, 0, 0, 0, 4, 1), value=1.0), "other", {}),
        (lambda x: F.pad(x, (0, 0, 0, 0, -1, 0)), "other", {}),
        (lambda x: F.pad(x, (1, 0, 0, 0, 4, 1)), "other", {}),
        (lambda x: F.pad(x, (1, 1)), "other", {}),
    ],
)
def test_shortcuts_without_parameters_are_found(function: Callable[..., Any], kind: str, facts: dict[str, int]) -> None:
    call = et.trace(Index(function), torch.randn(2, 3, 16, 16)).calls[1]
    assert (call.kind, call.attributes) == (kind, facts)


def test_what_cannot_be_followed_is_named_and_still_listed_inside() -> None:
    graph = et.trace(NETS["Opaque"](), torch.randn(1, 3, 16, 16))
    assert list(graph.opaque) == ["middle"] and "TraceError" in graph.opaque["middle"]
    inner = {call.name: call.followed for call in graph.calls if call.name.startswith("middle.")}
    assert inner == {"middle.conv": False, "middle.norm": False, "middle.act": False}
    whole = et.trace(NETS["Untraceable"](), torch.randn(1, 3, 16, 16))
    assert [call.name for call in whole.calls] == ["conv", "norm", "act", "head"] and "" in whole.opaque


def test_a_subclass_with_its_own_forward_is_followed_not_believed() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    graph = et.trace(nn.Sequential(Doubled(3, 4, 3)), torch.zeros(1, 3, 8, 8))
    assert not graph.layers("conv")


def test_layers_with_hooks_are_refused_because_hooks_would_be_passed_by() -> None:
    model, x = NETS["Residual"](), torch.randn(2, 3, 16, 16)
    seen: list[str] = []
    handle = model.two[0].register_forward_hook(lambda *_: seen.append("fired"))
    plan = last_layers(et.trace(model, x), None, PooledChain())
    with pytest.raises(Refusal, match=r"two\.0.*hook"):
        et.apply(model, plan)
    others = plan.model_copy(update={"layers": {k: v for k, v in plan.layers.items() if k != "two.0"}})
    et.apply(model, others)
    seen.clear()
    model(x).sum().backward()
    assert seen == ["fired"]
    handle.remove()


def test_a_sample_of_the_wrong_shape_is_refused_in_a_sentence() -> None:
    with pytest.raises(ModelError, match=r"\(1, 5, 16, 16\).*as the network expects"):
        et.trace(NETS["Residual"](), torch.zeros(1, 5, 16, 16))
