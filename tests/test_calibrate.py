"""What methods gain, against gradients of autograd in float64; and the choices that follow from it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edgetune as et
from edgetune import calibrate as calibration
from edgetune.alone import Reference
from edgetune.calibrate import calibrate
from edgetune.contract import Method
from edgetune.draft import draft
from edgetune.errors import PlanError
from edgetune.graph import Graph
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.gradient_filter import GradientFilter
from edgetune.methods.backward.mobiletl import MobileTL
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.methods.backward.sparse_update import SparseUpdate, window_axis
from edgetune.plan import DEFAULT_METHODS, Budget, Planner
from edgetune.profile import measure, profile
from edgetune.reasons import explain
from nets import NETS, scramble

BATCH = torch.arange(5) % 5


class Tried(SparseUpdate):
    """Sparse update that does not say that it is exact, and is therefore run."""

    def exact_on(self, graph: Graph) -> bool:
        return False


def small(name: str = "Inverted") -> tuple[nn.Module, et.Graph, torch.Tensor]:
    torch.manual_seed(7)
    model, x = scramble(NETS[name]()).double().eval(), torch.randn(5, 3, 17, 14, dtype=torch.float64)
    return model, et.trace(model, x), x


def by_autograd(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(x), BATCH).backward()
    return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}


def energies(model: nn.Module, x: torch.Tensor, chunk: int) -> dict[str, torch.Tensor]:
    """Squared gradients, summed over parts of the batch."""
    sums: dict[str, torch.Tensor] = {}
    for part in torch.arange(len(x)).split(chunk):
        twin = copy.deepcopy(model)
        (F.cross_entropy(twin(x[part]), BATCH[part], reduction="sum") / len(x)).backward()
        for name, p in twin.named_parameters():
            if p.grad is not None:
                sums[name] = sums.get(name, torch.zeros_like(p.grad)) + p.grad.square()
    return sums


@pytest.mark.parametrize("name", ["Inverted", "Residual", "Branching"])
@pytest.mark.parametrize("method", [PooledChain(patch_px=2), GradientFilter(patch_px=3), MobileTL(hardswish_bits=1)],
                         ids=lambda own: own.method)
def test_alone_is_what_a_plan_of_that_layer_gives(name: str, method: Method) -> None:
    model, graph, x = small(name)
    convs = [call for call in graph.layers("conv") if method.refuse(call) is None]
    reference = Reference(model, graph)
    alone = reference.alone({call.name: (method,) for call in convs})
    exact, tape = reference.run(x, BATCH, len(x), [alone])
    for layer, weight in reference.weights.items():
        torch.testing.assert_close(exact[layer], by_autograd(model, x)[weight], rtol=1e-9, atol=1e-12)
    found = reference.gradients(alone, tape)
    assert found.keys() == {call.name for call in convs}
    for call in convs:
        settings = {other.node: method if other.name == call.name else Exact() for other in graph.layers("conv")}
        undo = et.apply(model, draft(graph, settings, frozenset(settings)))
        model.zero_grad()
        F.cross_entropy(model(x), BATCH).backward()
        gradient = model.get_parameter(call.params["weight"]).grad
        undo()
        assert gradient is not None
        if all(other.kind != "activation" or other.function != "hardswish" for other in graph.calls):
            torch.testing.assert_close(found[call.name], gradient, rtol=1e-8, atol=1e-12)


def test_every_pattern_of_taps_counts_alike() -> None:
    torch.manual_seed(0)
    g = torch.randn(8, 6, 3, 3, dtype=torch.float64) + 5 * torch.randn(8, 6, 1, 1, dtype=torch.float64)
    even = calibration._by_taps(g) @ calibration._evening(calibration._by_taps(g).T @ calibration._by_taps(g))
    energy = even.square().sum(0)
    assert 0.3 < energy.min() <= energy.max() < 1.05
    cosines = calibration._Cosines()
    mean = g.mean((2, 3), keepdim=True).expand_as(g)
    patterns = {"layer": calibration._evening(calibration._by_taps(g).T @ calibration._by_taps(g))}
    cosines.see({"layer": g}, {"layer": mean}, lambda layer, gradient: gradient, patterns)
    assert 1 / 9 < cosines.all()["layer"] ** 2 < 0.35 < float(F.cosine_similarity(g.flatten(), mean.flatten(), 0)) ** 2


@pytest.mark.parametrize("ratio", [0.25, 0.5])
@pytest.mark.parametrize("name", ["Inverted", "Residual"])
def test_a_window_gains_its_share_of_the_squared_gradient(name: str, ratio: float) -> None:
    model, graph, x = small(name)
    methods = Exact(), SparseUpdate(ratio=ratio), Tried(ratio=ratio)
    found, energy = calibrate(model, graph, (x, BATCH), methods, chunk=2), energies(model, x, 2)
    gauge = found.gauges[methods[1]]
    for call in graph.layers("conv"):
        assert call.geometry is not None
        squares = energy[call.params["weight"]]
        assert found.importance[call.name] == pytest.approx(float(squares.sum()))
        if methods[1].refuse(call) is not None:
            assert call.name == "even" and call.name not in gauge.own
            continue
        axis, channels = window_axis(call.geometry)
        count = max(1, round(ratio * channels))
        windows = [float(squares.narrow(axis, first, count).sum()) for first in range(channels - count + 1)]
        own = gauge.own[call.name]
        assert isinstance(own, SparseUpdate) and windows[own.first] == pytest.approx(max(windows))
        assert gauge.share[call.name] == pytest.approx(max(windows) / float(squares.sum()))
        # the inner product with the exact gradient over its squared norm, by a gradient that was really computed
        tried = found.gauges[methods[2]]
        assert tried.share[call.name] * tried.fidelity[call.name] == pytest.approx(gauge.share[call.name])
        assert gauge.fidelity[call.name] == 1


@pytest.mark.parametrize("method", [Exact(), SparseUpdate(), MobileTL()], ids=lambda own: own.method)
def test_who_says_to_be_exact_is(method: Method) -> None:
    model, graph, x = small("Residual")
    assert method.exact_on(graph)
    undo = et.apply(model, et.last_layers(graph, None, method))
    F.cross_entropy(model(x), BATCH).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    undo()
    exact = by_autograd(model, x)
    for call in graph.layers("conv"):
        assert call.geometry is not None
        found = next(g for name, g in grads.items() if name.startswith(f"{call.name}.weight"))
        assert torch.allclose(found, method.part(exact[call.params["weight"]], call.geometry), rtol=1e-9, atol=1e-12)


def test_mobiletl_is_exact_only_without_hard_swish() -> None:
    _, graph, _ = small("Inverted")
    assert not MobileTL().exact_on(graph) and not PooledChain(patch_px=2).exact_on(graph)


def planner(name: str, methods: tuple[Method, ...] = DEFAULT_METHODS) -> Planner:
    torch.manual_seed(7)
    x = torch.randn(8, 3, 32, 32)
    return Planner(scramble(NETS[name]()), x, (x, torch.arange(8) % 5), methods=methods)


def test_what_equals_a_simpler_method_falls_away_and_refused_layers_lack_the_choice() -> None:
    with_hardswish, without = planner("Inverted").prospect, planner("Residual").prospect
    assert with_hardswish.methods == DEFAULT_METHODS
    assert without.methods == tuple(method for method in DEFAULT_METHODS if not isinstance(method, MobileTL))
    for call, options in zip(with_hardswish.convs, with_hardswish.options, strict=True):
        ways = [with_hardswish.methods[option.way] for option in options if option.learns]
        assert any(isinstance(way, SparseUpdate) for way in ways) == (call.name != "even")
        assert all(option.method.refuse(call) is None for option in options)
        assert not any(isinstance(option.method, SparseUpdate) for option in options if not option.learns)


def test_a_slice_costs_what_it_keeps_and_its_own_state() -> None:
    prospect = planner("Inverted").prospect
    choices, at = prospect.choices(8, timed=False), [call.name for call in prospect.convs].index("expand.0")
    cost = {type(option.method).__name__ + str(getattr(option.method, "ratio", "")): choice for option, choice in zip(
        prospect.options[at], choices[at], strict=True) if option.learns}
    # 6 channels of 16x16 pixels in, 12 out; gradient and momentum; the bias learns with either
    kept, weight = 8 * 6 * 16 * 16 * 4, 12 * 6 * 4 * 2
    half = cost["Exact"].weight_bytes - cost["SparseUpdate0.5"].weight_bytes
    assert half == kept // 2 + weight // 2
    assert cost["SparseUpdate0.5"].gain < cost["Exact"].gain and cost["SparseUpdate0.5"].passes == 1


@pytest.mark.parametrize("name", ["Inverted", "Residual", "Branching"])
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_mixed_plans_are_predicted_to_the_byte(name: str, share: float) -> None:
    methods = Exact(), MobileTL(hardswish_bits=1), SparseUpdate(ratio=0.5), PooledChain(patch_px=2)
    made = planner(name, methods)
    prospect = made.prospect
    turns = [prospect.pick_of(index, index % len(prospect.methods), True) for index in range(len(prospect.convs))]
    plans = [prospect.found(prospect.choices(4, timed=False), turns, 4).made,
             made.plan(Budget(memory_bytes=int(share * profile(prospect.model, prospect.sample).peak_bytes)))]
    for plan in plans:
        model, x = copy.deepcopy(prospect.model), prospect.sample
        told = profile(model, x, plan)
        et.apply(model, plan)
        took = measure(model, x, micro_batch=plan.micro_batch, repeats=1)
        for field in ("kept_bytes", "grad_bytes", "optimizer_bytes"):
            assert getattr(took, field) == getattr(told, field)
    kinds = {type(stack[0]) for stack in plans[0].layers.values()}
    assert len(kinds) == len(prospect.methods)


def test_more_choices_never_gain_less_and_are_told() -> None:
    """Solved with as many bytes, without trying a step."""
    few, all_of = planner("Inverted", (Exact(), PooledChain(patch_px=2))), planner("Inverted")
    room = 0.1 * few.prospect.solve(None, None, 8).total.weight_bytes
    found = all_of.prospect.solve(room, None, 8)
    assert found.total.gain >= few.prospect.solve(room, None, 8).total.gain - 1e-12
    told = explain(all_of, found, bytes_limited=True, ms_limited=False)
    even = next(reason for reason in told.layers if reason.layer == "even")
    assert [way is None for way in even.ways] == [isinstance(own, SparseUpdate) for own in DEFAULT_METHODS]
    for index, (reason, pick) in enumerate(zip(told.layers, found.picked, strict=True)):
        chosen = None if pick is None else all_of.prospect.options[index][pick]
        assert (reason.way, reason.learns) == ((None, False) if chosen is None else (chosen.way, chosen.learns))
        shares = [way.fidelity for way in reason.ways if way is not None and way.method == "sparse_update"]
        assert shares == sorted(shares, reverse=True) and all(0 < share <= 1 for share in shares)


def test_without_exact_there_is_nothing_to_weigh_against() -> None:
    with pytest.raises(PlanError, match=r"give Exact\(\)"):
        planner("Residual", (PooledChain(patch_px=2), SparseUpdate()))
