"""Combinations that make no sense: refused with the layer, the reason and the way out, and the model left as it was."""

from __future__ import annotations

import pytest
import torch

import edgetune as et
from edgetune.contract import Method, Plan
from edgetune.errors import Refusal
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.mobiletl import MobileTL
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.methods.backward.sparse_update import SparseUpdate
from nets import NETS

CASES: list[tuple[dict[str, tuple[Method, ...]], dict[str, tuple[str, ...]], str, str, str]] = [
    ({"expand.0": (MobileTL(), SparseUpdate())}, {"expand.0": ("weight",)}, "expand.0",
     "two backward methods, mobiletl and sparse_update, which nothing composes", "keep one of them"),
    ({"expand.0": (Exact(), Exact())}, {"expand.0": ("weight",)}, "expand.0", "two backward methods, exact and exact",
     "keep one of them"),
    ({"fc1": (SparseUpdate(),)}, {"fc1": ("bias",)}, "fc1", "given sparse_update, but its weight does not learn",
     "list it under `learns`, or take sparse_update out of the plan"),
    ({"fc1": (SparseUpdate(),)}, {"expand.0": ("weight",)}, "fc1", "its weight does not learn", "list it"),
    ({"expand.0": (PooledChain(patch_px=2),)}, {"project.0": ("weight",)}, "expand.0",
     "given pooled_chain, but no gradient comes to it, as nothing in it or in front of it learns",
     "let something learn there, or take it out of the plan"),
    ({"stem.0": (MobileTL(),)}, {"head.2": ("weight",)}, "stem.0", "given mobiletl, but no gradient", "take it out"),
]


@pytest.mark.parametrize(("layers", "learns", "layer", "reason", "way_out"), CASES, ids=lambda value: str(value)[:24])
def test_refused_with_reason_and_way_out(layers: dict[str, tuple[Method, ...]], learns: dict[str, tuple[str, ...]],
                                         layer: str, reason: str, way_out: str) -> None:
    model = NETS["Inverted"]()
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(Refusal) as refused:
        et.apply(model, Plan(input_shape=(1, 3, 16, 16), layers=layers, learns=learns))
    assert str(refused.value).startswith(f"layer '{layer}' ")
    assert reason in refused.value.reason and way_out in refused.value.way_out
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before
    assert "_edgetune" not in model.__dict__


def test_what_only_passes_a_gradient_on_is_taken() -> None:
    model = NETS["Inverted"]()
    layers = {"expand.0": (PooledChain(patch_px=2),), "stem.0": (Exact(),)}
    undo = et.apply(model, Plan(input_shape=(1, 3, 16, 16), layers=layers, learns={"stem.1": ("bias",)}))
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert model.stem[1].bias.grad is not None
    undo()


def test_mobiletl_says_where_it_would_do_nothing() -> None:
    for name, idle in (("Residual", True), ("Inverted", False)):
        reason = MobileTL().idle_on(et.trace(NETS[name](), torch.zeros(1, 3, 16, 16)))
        assert (reason is not None) == idle and (reason is None or "use --method exact" in reason)
        assert PooledChain(patch_px=2).idle_on(et.trace(NETS[name](), torch.zeros(1, 3, 16, 16))) is None
