"""The frozen part in integers: the very integers of the reference, the float numbers gone, the rest as it was."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import integer_reference
from edgetune.apply import apply
from edgetune.cache.cut import find_cut
from edgetune.contract import Method, Plan
from edgetune.errors import ModelError, Refusal, RunError
from edgetune.frozen import NAME, Front, front_of, has_front, install, integer_front, remove, restore
from edgetune.graph import trace
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.gradient_filter import GradientFilter
from edgetune.methods.backward.mobiletl import MobileTL
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.methods.backward.sparse_update import SparseUpdate
from edgetune.plan import last_layers
from edgetune.profile import measure, profile
from edgetune.quantize import QuantizedNetwork
from integer_nets import Odd, with_statistics
from nets import Branching, Inverted, Residual, block, scramble

SHAPE = (3, 12, 12)
METHODS: list[Method] = [Exact(), MobileTL(), PooledChain(patch_px=2), GradientFilter(patch_px=2), SparseUpdate()]


def pictures(count: int = 6, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(count))


def network(net: type[nn.Module] = Residual) -> nn.Module:
    torch.manual_seed(0)
    return with_statistics(net()) if net is Odd else scramble(net()).eval()


def plan_of(model: nn.Module, last: int, method: Method | None = None) -> Plan:
    return last_layers(trace(model, pictures(2)), last, method or Exact())


def made(net: type[nn.Module], last: int, method: Method | None = None) -> tuple[nn.Module, nn.Module, Front]:
    """A network with its plan in float, the same with its frozen part in integers, and that part."""
    ours, theirs = network(net), network(net)
    plan = plan_of(ours, last, method)
    front = integer_front(ours, plan, pictures(8).split(3))
    install(ours, front)
    apply(ours, front.left_over(plan))
    apply(theirs, plan)
    return ours.train(), theirs.train(), front


class TestIntegers:
    @pytest.mark.parametrize("batch", [1, 5])
    @pytest.mark.parametrize(("net", "last"), [(Residual, 2), (Residual, 3), (Odd, 1), (Odd, 2)])
    def test_are_those_of_the_reference(self, net: type[nn.Module], last: int, batch: int) -> None:
        ours, _, front = made(net, last)
        x = pictures(batch)
        end = front.quantized.graph.layers[-1]
        integers = integer_reference.run(front.quantized, x.numpy())
        assert len(set(integers.reshape(-1).tolist())) > 20
        wanted = (torch.tensor(integers.astype(int)).float() - end.out.zero_point) * end.out.scale
        assert torch.equal(ours.get_submodule(NAME)(x), wanted)
        assert torch.equal(QuantizedNetwork(front.quantized)(x), wanted)

    @pytest.mark.parametrize("at_once", [1, 2, 3, 99])
    def test_do_not_depend_on_how_many_go_at_a_time(self, at_once: int) -> None:
        part = made(Residual, 2)[0].get_submodule(NAME)
        whole = part(pictures(5))
        part.at_once = at_once
        assert torch.equal(part(pictures(5)), whole)

    def test_are_close_to_the_float_numbers(self) -> None:
        ours, theirs, _ = made(Residual, 2)
        x = pictures(8)
        wanted = find_cut(theirs, SHAPE).prefix(theirs, x)[0]
        error = (ours.get_submodule(NAME)(x) - wanted).abs().max() / wanted.abs().max()
        assert 0 < error < 0.03

    def test_end_behind_the_mean_where_the_head_alone_learns(self) -> None:
        ours, theirs, front = made(Odd, 0)
        x = pictures(4)
        assert front.part.shape == (12,) and front.part.layer == "flatten"
        assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=0.1)


class TestTheRest:
    @pytest.mark.parametrize("method", METHODS, ids=lambda method: method.method)
    @pytest.mark.parametrize(("net", "last"), [(Residual, 2), (Odd, 1)])
    def test_trains_as_planned_behind_the_dequantised_map(
        self, net: type[nn.Module], last: int, method: Method
    ) -> None:
        ours, theirs, _ = made(net, last, method)
        x, cut = pictures(4), find_cut(theirs, SHAPE)
        found = []
        for model, run in ((ours, ours), (theirs, lambda x: cut.suffix(theirs, ours.get_submodule(NAME)(x)))):
            torch.manual_seed(1)
            y, learned = run(x), {name: p for name, p in model.named_parameters() if p.requires_grad}
            found.append((y, dict(zip(learned, torch.autograd.grad(y.square().sum(), learned.values()), strict=True))))
        (y, grads), (y2, grads2) = found
        assert torch.equal(y, y2) and grads.keys() == grads2.keys() and len(grads) > 3
        assert all(torch.equal(grads[name], grads2[name]) for name in grads)

    def test_has_the_gradients_of_stock_autograd(self) -> None:
        """Front and rest as two networks, the rest by nothing but torch, in float64."""
        torch.manual_seed(0)
        tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)]
        model = scramble(nn.Sequential(block(3, 5), block(5, 4, stride=2), block(4, 6), *tail)).eval()
        plan = plan_of(model, 1)
        front, rest = integer_front(model, plan, [pictures(8)]), copy.deepcopy(model[2:]).double()
        install(model, front)
        apply(model.double(), front.left_over(plan))
        x = pictures(3).double()
        F.cross_entropy(model(x), torch.tensor([0, 3, 1])).backward()
        F.cross_entropy(rest(QuantizedNetwork(front.quantized)(x)), torch.tensor([0, 3, 1])).backward()
        for ours, theirs in ((model[2][0].weight, rest[0][0].weight), (model[2][1].bias, rest[0][1].bias),
                             (model[5].weight, rest[3].weight)):  # fmt: skip
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)
            assert ours.grad.abs().max() > 0

    def test_answers_from_integers_in_every_mode(self) -> None:
        ours, theirs, _ = made(Residual, 2)
        x = pictures(4)
        answer = ours(x).detach()
        assert not torch.equal(answer, theirs(x))
        with torch.no_grad():
            for mode in (True, False):
                torch.testing.assert_close(ours.train(mode)(x), answer)

    def test_functional_norms_keep_their_statistics(self) -> None:
        class Functional(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.norm, self.head = block(3, 4), nn.Conv2d(4, 4, 3), Norm(4), nn.Linear(4, 5)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.head(self.norm(self.b(self.a(x))).mean((2, 3)))

        class Norm(nn.BatchNorm2d):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)

        ours, theirs, _ = made(Functional, 1)
        x = pictures(4)
        torch.testing.assert_close(ours(x), theirs(x), atol=0.05, rtol=0.05)

    def test_a_copy_stands_on_its_own(self) -> None:
        model = network()
        install(model, integer_front(model, plan_of(model, 2), [pictures(8)]))
        twin = copy.deepcopy(model)
        with torch.no_grad():
            before = twin(pictures(3))
            model.head.weight.zero_()
            model.get_submodule(NAME).network.steps[0].weight.value.zero_()
            assert torch.equal(twin(pictures(3)), before) and not torch.equal(model(pictures(3)), before)


class TestMemory:
    def test_the_float_numbers_are_gone(self) -> None:
        model = network(Odd)
        plan = plan_of(model, 1)
        parts = (model.first, model.wide, model.deep)
        frozen = [*(p for part in parts for p in part.parameters()), model.deep[1].running_var]
        numbers = [weakref.ref(tensor.untyped_storage()) for tensor in frozen]
        front = integer_front(model, plan, [pictures(8)])
        install(model, front)
        del frozen
        gc.collect()
        assert [number() for number in numbers] == [None] * len(numbers)
        names = {name for name, _ in model.named_parameters()}
        assert names == {name for name, _ in network(Odd).named_parameters()
                         if name.startswith(("last", "classifier"))}  # fmt: skip

    def test_bytes_fall_to_about_a_quarter(self) -> None:
        """All that is held, by storage, counters of norms aside: weights, norms and scales of a frozen part."""

        def held(module: nn.Module) -> int:
            storages = [t.untyped_storage() for t in (*module.parameters(), *module.buffers()) if t.dim()]
            return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

        torch.manual_seed(0)
        model = nn.Sequential(block(3, 32), block(32, 64), block(64, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                              nn.Linear(64, 5)).eval()  # fmt: skip
        before, plan = held(model), plan_of(model, 1)
        rest = held(model[2]) + held(model[5])
        front = integer_front(model, plan, [pictures(8)])
        install(model, front)
        assert front.part.float_bytes == before - rest
        assert front.part.integer_bytes == held(model) - rest
        assert 0.25 < (held(model) - rest) / (before - rest) < 0.28
        weights = [step.weight.value for step in model.get_submodule(NAME).network.convs()]
        assert {w.dtype for w in weights} == {torch.int8} and sum(w.numel() for w in weights) == 32 * 27 + 64 * 288

    def test_is_predicted_and_measured_alike(self) -> None:
        model, x = network(), pictures(4)
        plan = plan_of(model, 2)
        front = integer_front(model, plan, [pictures(8)])
        float_cost = profile(model, x, plan)
        install(model, front)
        predicted = profile(model, x, front.left_over(plan))
        apply(model, front.left_over(plan))
        measured = measure(model, x, repeats=1)
        assert measured.param_bytes == predicted.param_bytes < float_cost.param_bytes
        row = next(layer for layer in predicted.layers if layer.name == NAME)
        assert row.param_bytes == front.part.integer_bytes
        assert sum(layer.param_bytes for layer in predicted.layers) == predicted.param_bytes
        assert measured.kept_bytes == predicted.kept_bytes == float_cost.kept_bytes
        assert measured.forward_macs == predicted.forward_macs == float_cost.forward_macs
        # operators make a number or two for themselves
        assert measured.peak_bytes == pytest.approx(predicted.peak_bytes, abs=64)

    def test_a_layer_that_both_sides_call_keeps_its_numbers(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3), nn.Linear(3, 5)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.head(self.a(self.b(self.a(x))).mean((2, 3)))

        model = network(Twice)
        plan = Plan(input_shape=(2, *SHAPE), learns={"b": ("weight",), "head": ("weight",)})
        front = integer_front(model, plan, [pictures(8)])
        install(model, front)
        assert model.a.weight is not None and front.part.float_bytes == 0
        torch.testing.assert_close(model(pictures(3)), network(Twice)(pictures(3)), atol=0.02, rtol=0.05)


class TestGoingBack:
    def test_remove_and_load_give_the_network_back(self) -> None:
        model = network()
        floats, x = copy.deepcopy(model.state_dict()), pictures(3)
        flags = [(name, p.requires_grad, p.shape) for name, p in model.named_parameters()]
        wanted = model(x)
        install(model, integer_front(model, plan_of(model, 2), [pictures(8)]))
        assert has_front(model) and not torch.equal(model(x), wanted)
        remove(model)
        assert not has_front(model) and "forward" not in model.__dict__
        model.load_state_dict(floats)
        assert torch.equal(model(x), wanted)
        assert [(name, p.requires_grad, p.shape) for name, p in model.named_parameters()] == flags

    def test_the_file_and_the_state_make_the_network_again(self, tmp_path: Path) -> None:
        model = network()
        front = integer_front(model, plan_of(model, 2), [pictures(8)])
        install(model, front)
        front.save(tmp_path / "frozen")
        other = scramble(Residual()).eval()
        assert restore(other, tmp_path / "frozen", front.part) is not None
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(pictures(3)), model(pictures(3)))
        with pytest.raises(RunError, match="is not the frozen part that the run was trained behind"):
            restore(other, tmp_path / "frozen", front.part.model_copy(update={"digest": "0"}))

    def test_looking_leaves_the_network_as_it_was(self) -> None:
        model = network().train()
        state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
        integer_front(model, plan_of(model, 2), [pictures(8)])
        assert [m.training for m in model.modules()] == modes and not has_front(model)
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


class TestRefusals:
    @pytest.mark.parametrize(
        ("net", "last", "words"),
        [
            (Inverted, 1, "layer 'stem.2' is a hardswish, which is no clamp, so the frozen part cannot be held in 8 "
                          "bits: let it learn too, and all behind it, or train without --frozen-bits"),
            (Branching, 1, "layer 'pool' is a max_pool2d, which has no integer step"),
            (Residual, 6, "layer 'stem.0' learns, and nothing worth keeping lies in front of it: let fewer layers "
                          "learn, or train without --frozen-bits"),
        ],
    )  # fmt: skip
    def test_name_the_layer(self, net: type[nn.Module], last: int, words: str) -> None:
        model = network(net)
        with pytest.raises(Refusal) as caught:
            integer_front(model, plan_of(model, last), [pictures(8)])
        assert words in str(caught.value)
        assert not has_front(model) and "_edgetune" not in model.__dict__

    def test_a_second_time(self) -> None:
        model = network()
        plan = plan_of(model, 2)
        front = integer_front(model, plan, [pictures(8)])
        install(model, front)
        for again in (lambda: install(model, front), lambda: integer_front(model, plan, [pictures(8)])):
            with pytest.raises(Refusal, match=f"'{NAME}' holds a frozen part in integers already: build"):
                again()

    def test_with_a_plan_applied(self) -> None:
        model = network()
        plan = plan_of(model, 2)
        front = integer_front(model, plan, [pictures(8)])
        apply(model, plan)
        with pytest.raises(ModelError, match="a plan is applied to this network already: call its undo"):
            install(model, front)

    def test_by_the_quantizer(self) -> None:
        from edgetune.quantize import quantize

        model = network()
        install(model, integer_front(model, plan_of(model, 2), [pictures(8)]))
        with pytest.raises(Refusal, match=f"'{NAME}' is in integers already: quantize"):
            quantize(model, [pictures(8)])


def test_the_front_of_a_network_whose_flags_are_set() -> None:
    """As the benches train: no plan, evaluation mode."""
    model = network()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("down", "short", "head")))
    front = front_of(model, [pictures(8)])
    assert front.part.digest == integer_front(network(), plan_of(network(), 2), [pictures(8)]).part.digest
