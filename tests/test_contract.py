"""Every registered method keeps every promise of the contract; its own test holds only what is peculiar."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import edgetune as et
from edgetune.blocks import blocks
from edgetune.contract import HEADINGS, Method, Plan, known_methods
from edgetune.errors import EdgetuneError, PlanError, Refusal
from edgetune.graph import Call
from edgetune.plan import last_layers
from nets import NETS, scramble

METHODS = known_methods()
BACKWARD = {name: kind for name, kind in METHODS.items() if kind.family == "backward"}
ARITHMETIC = {name: kind for name, kind in METHODS.items() if kind.family == "arithmetic"}
each_arithmetic = pytest.mark.parametrize("kind", ARITHMETIC.values(), ids=ARITHMETIC.keys())
each_method = pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS.keys())
each_backward = pytest.mark.parametrize("kind", BACKWARD.values(), ids=BACKWARD.keys())


def fresh(name: str = "Residual") -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(5)
    return scramble(NETS[name]()), torch.randn(3, 3, 16, 16)


def plan_for(model: nn.Module, x: torch.Tensor, kind: type[Method], count: int | None = 4) -> Plan:
    """By the method in the last `count` convolutions, or in all blocks where it rewrites blocks."""
    graph = et.trace(model, x)
    if not kind.rewrites:
        return last_layers(graph, count, kind())
    if not blocks(graph):
        pytest.skip("this network has no blocks")
    return kind().last_blocks(graph, None)


def without_added(model: nn.Module, kind: type[Method], before: dict[str, torch.Tensor]) -> list[str]:
    """The names of the state_dict; those that a rewriting has added are left out."""
    return [name for name in model.state_dict() if name in before or not kind.rewrites]


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)  # methods may round by chance
    nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 5).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@each_method
def test_page_has_the_six_headings(kind: type[Method]) -> None:
    page = kind.explain().splitlines()
    assert [line for line in page if line in HEADINGS] == list(HEADINGS)


@each_method
def test_plan_goes_through_json_and_refuses_unknown_keys(kind: type[Method]) -> None:
    plan = Plan(input_shape=(1, 3, 8, 8), layers={"a.b": (kind(),)}, learns={"a.b": ("weight",)}, micro_batch=2)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    with pytest.raises((EdgetuneError, ValueError), match="nonsense"):
        Plan.model_validate({"input_shape": (1, 3, 8, 8), "layers": {"a": [{"method": kind.method, "nonsense": 1}]}})


@each_method
def test_refuses_by_name_with_a_way_out(kind: type[Method]) -> None:
    odd = Call(name="pool", node="pool", kind="max_pool", function="max_pool2d")
    reason = kind().refuse(odd)
    assert reason is not None and ": " in reason
    model, x = fresh()
    plan = Plan(input_shape=tuple(x.shape), layers={"nowhere": (kind(),)})
    with pytest.raises(PlanError, match="nowhere"):
        et.apply(model, plan)


@each_backward
def test_apply_then_undo_gives_the_model_back(kind: type[Method]) -> None:
    model, x = fresh()
    model.train()
    types = [type(m) for m in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    names = {id(m): set(m.__dict__) for m in model.modules()}
    undo = et.apply(model, plan_for(model, x, kind))
    gradients(model, x)
    assert without_added(model, kind, before) == list(before)
    undo()
    assert list(model.state_dict()) == list(before)
    assert [type(m) for m in model.modules()] == types
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(m.training for m in model.modules())
    assert {id(m): set(m.__dict__) for m in model.modules()} == names


@each_backward
@pytest.mark.parametrize("net", NETS)
def test_forward_is_what_the_method_promises(kind: type[Method], net: str) -> None:
    model, x = fresh(net)
    model.eval()
    expected = model(x)
    undo = et.apply(model, plan_for(model, x, kind, None))
    model.train()
    found = model(x)
    undo()
    assert kind.forward_is == "identical"
    assert torch.equal(found, expected)


@each_backward
def test_gradients_are_finite_and_only_where_they_are_asked_for(kind: type[Method]) -> None:
    model, x = fresh()
    plan = plan_for(model, x, kind)
    et.apply(model, plan)
    grads = gradients(model, x)
    assert grads.keys() == plan.learned()
    for name, parameter in model.named_parameters():
        if name in grads:
            assert grads[name].shape == parameter.shape and grads[name].dtype == parameter.dtype
            assert grads[name].isfinite().all()


@each_backward
def test_same_seed_same_result(kind: type[Method]) -> None:
    results = []
    for _ in range(2):
        model, x = fresh()
        et.apply(model, plan_for(model, x, kind))
        results.append(gradients(model, x))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@each_backward
def test_survives_deepcopy_state_dict_no_grad_and_a_batch_of_one(kind: type[Method]) -> None:
    model, x = fresh()
    et.apply(model, plan_for(model, x, kind))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    other = copy.deepcopy(twin)  # a forward changes what methods remember
    twin.load_state_dict(model.state_dict())
    expected = gradients(model, x)
    found = gradients(twin, x)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(other(x), model(x))  # the copy computes with its own parameters
    with torch.no_grad():
        assert not model(x).requires_grad
    assert gradients(model, x[:1]).keys() == expected.keys()
    assert model(x[:0]).shape == (0, 5)


@each_backward
@pytest.mark.parametrize("net", ["Inverted", "Stacked"])
def test_another_map_size_than_the_traced_one(kind: type[Method], net: str) -> None:
    model, x = fresh(net)
    plan = plan_for(model, x, kind, None)
    larger = torch.randn(2, 3, 37, 21)
    model.eval()
    expected = model(larger)
    et.apply(model, plan)
    assert torch.equal(model(larger), expected)
    assert all(g.isfinite().all() for g in gradients(model, larger).values())


@each_backward
def test_double_backward_is_refused_in_words(kind: type[Method]) -> None:
    model, x = fresh()
    et.apply(model, plan_for(model, x, kind))
    with pytest.raises(Refusal, match="create_graph"):
        torch.autograd.grad(model(x).sum(), [p for p in model.parameters() if p.requires_grad], create_graph=True)


def arithmetic_plan(model: nn.Module, x: torch.Tensor, kind: type[Method]) -> Plan:
    """By the method in every convolution without groups, norms by their batches, all of it learning."""
    graph = et.trace(model, x)
    taken = {call.name: (kind(),) for call in graph.layers("conv")
             if call.geometry is not None and call.geometry.groups == 1 and kind().refuse(call) is None}
    learns = {call.name: tuple(role for role in call.params if not role.startswith("running"))
              for call in graph.layers()}
    return Plan(input_shape=tuple(x.shape), layers=taken, learns=learns, norms="batch")


@each_arithmetic
def test_arithmetic_layers_learn_and_give_their_place_back(kind: type[Method]) -> None:
    model, x = fresh()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    types = [type(m) for m in model.modules()]
    plan = arithmetic_plan(model, x, kind)
    model.train()
    undo = et.apply(model, plan)
    assert list(model.state_dict()) == list(before)
    assert gradients(model, x).keys() == plan.learned()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    undo()
    assert [type(m) for m in model.modules()] == types
    assert list(model.state_dict()) == list(before)


@each_arithmetic
@pytest.mark.parametrize("net", NETS)
def test_arithmetic_is_the_same_trained_copied_and_without_gradients(kind: type[Method], net: str) -> None:
    model, x = fresh(net)
    plan = arithmetic_plan(model, x, kind)
    if not plan.layers:
        pytest.skip("every convolution of this network has groups")
    try:
        et.apply(model, plan)
    except Refusal as refusal:
        assert refusal.way_out
        pytest.skip(str(refusal))
    twin = copy.deepcopy(model).eval()
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(x), twin(x))
        assert model(x[:1]).shape == (1, *model(x).shape[1:])
    assert torch.allclose(model(x).detach(), twin(x).detach())
