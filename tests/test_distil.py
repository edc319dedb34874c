"""Distillation: the losses against slow formulas, which maps are compared, and what networks are refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgetune.apply import apply, rewrite
from edgetune.compress import recipe
from edgetune.distil import Distil, _pairs, distilled, features_apart, logits_apart
from edgetune.errors import Refusal
from edgetune.graph import trace
from edgetune.methods.arithmetic.xnor import XNOR
from nets import Signed

Maps = list[torch.Tensor]


def slow_features(student: Maps, teacher: Maps) -> float:
    total = 0.0
    for mine, theirs in zip(student, teacher):
        for s, t in zip(mine, theirs):
            a, b = s.flatten().tolist(), t.flatten().tolist()
            long, other = math.sqrt(sum(v * v for v in a)), math.sqrt(sum(v * v for v in b))
            total += sum((u / long - v / other) ** 2 for u, v in zip(a, b))
    return total


def slow_logits(student: torch.Tensor, teacher: torch.Tensor) -> float:
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist()):
        mine, theirs = sum(math.exp(v) for v in s), sum(math.exp(v) for v in t)
        for u, v in zip(s, t):
            q, p = math.exp(u) / mine, math.exp(v) / theirs
            total += p * (math.log(p) - math.log(q))
    return total


def maps(*shapes: tuple[int, ...]) -> Maps:
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


class TestLosses:
    @pytest.mark.parametrize("shapes", [((3, 2, 4, 5),), ((2, 1, 1, 1), (2, 3, 2, 2)), ((1, 4, 3, 3),) * 3])
    def test_features(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        student, teacher = maps(*shapes), maps(*shapes)
        assert float(features_apart(student, teacher)) == pytest.approx(slow_features(student, teacher), rel=1e-12)

    def test_features_do_not_see_lengths(self) -> None:
        (student,), (teacher,) = maps((2, 3, 4, 4)), maps((2, 3, 4, 4))
        apart = float(features_apart([student], [teacher]))
        assert float(features_apart([7 * student], [teacher])) == pytest.approx(apart, rel=1e-12)
        assert float(features_apart([teacher * 3], [teacher])) == pytest.approx(0, abs=1e-20)
        assert float(features_apart([-teacher], [teacher])) == pytest.approx(4 * 2)

    def test_a_map_of_zeros_has_a_gradient(self) -> None:
        student = torch.zeros(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
        features_apart([student], maps((1, 2, 2, 2))).backward()
        assert student.grad is not None and student.grad.isfinite().all()

    @pytest.mark.parametrize("shape", [(1, 2), (5, 3), (4, 17)])
    def test_logits(self, shape: tuple[int, int]) -> None:
        student, teacher = maps(shape, shape)
        assert float(logits_apart(student, teacher)) == pytest.approx(slow_logits(student, teacher), rel=1e-10)
        assert float(logits_apart(teacher, teacher + 5)) == pytest.approx(0, abs=1e-12)

    def test_gradients(self) -> None:
        (a,), (b,) = maps((2, 3)), maps((2, 3))
        assert torch.autograd.gradcheck(lambda s: logits_apart(s, b), a.requires_grad_())
        (a,), (b,) = maps((2, 2, 2, 2)), maps((2, 2, 2, 2))
        assert torch.autograd.gradcheck(lambda s: features_apart([s], [b]), a.requires_grad_())


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Signed(3)


SAMPLE = torch.zeros(1, 1, 8, 8)


class TestPairs:
    def test_blocks_of_equal_networks(self, net: nn.Module) -> None:
        graph = trace(net, SAMPLE)
        pairs = list(_pairs(graph, graph))
        assert len(pairs) == 3 and all(own == other for own, other in pairs)

    def test_clips_stand_for_activations_and_moved_pools_for_pools(self, net: nn.Module) -> None:
        teacher = trace(net, SAMPLE)
        rewrite(net, recipe(teacher, XNOR()).plan)
        student = trace(net, SAMPLE)
        pairs = list(_pairs(student, teacher))
        assert len(pairs) == 3
        for own, other in pairs:
            assert student[own].out_shape == teacher[other].out_shape
        *blocks, last = pairs
        assert all(own == f"{other}_clip" for own, other in blocks)
        assert teacher[last[1]].kind == "max_pool" and student[last[0]].out_shape == (1, 6, 4, 4)


class TestDistilled:
    @pytest.mark.parametrize("settings", [Distil(), Distil(features=0.5), Distil(features=1, logits=2)])
    def test_the_loss_is_the_sum_of_its_parts(self, net: nn.Module, settings: Distil) -> None:
        teacher = copy.deepcopy(net)
        for parameter in net.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        x, y = torch.randn(3, 1, 8, 8), torch.tensor([0, 2, 1])
        loss = distilled(net.train(), teacher, settings, SAMPLE)
        shown: dict[str, torch.Tensor] = {}

        def look(name: str, of: nn.Module, key: str) -> None:
            of.get_submodule(name).register_forward_hook(lambda _m, _x, out: shown.__setitem__(key, out))

        mine, theirs = copy.deepcopy(net), copy.deepcopy(teacher).eval()
        for name in ("one", "two", "pair"):
            look(name, mine, f"s{name}")
            look(name, theirs, f"t{name}")
        logits, told = mine(x).detach(), theirs(x).detach()
        expected = float(F.cross_entropy(logits, y, reduction="sum")) + settings.logits * slow_logits(logits, told)
        names = ("one", "two", "pair")
        expected += settings.features * slow_features([shown[f"s{n}"] for n in names], [shown[f"t{n}"] for n in names])
        assert float(loss(x, y).detach()) == pytest.approx(expected, rel=1e-4)

    def test_the_teacher_stays_as_it_is(self, net: nn.Module) -> None:
        teacher = copy.deepcopy(net)
        before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
        plan = recipe(trace(net, SAMPLE), XNOR()).plan
        rewrite(net, plan)
        apply(net, plan)
        loss = distilled(net.train(), teacher, Distil(features=1, logits=1), SAMPLE)
        loss(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])).backward()
        assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
        assert all(parameter.grad is None for parameter in teacher.parameters())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())

    def test_a_planned_student_gives_the_loss_of_one_without_a_plan(self, net: nn.Module) -> None:
        """Both rewritten; with a plan applied backward keeps bits, and that must not show."""
        teacher, settings = copy.deepcopy(net), Distil(features=1, logits=1)
        plan = recipe(trace(net, SAMPLE), XNOR()).plan
        rewrite(net, plan)
        other = copy.deepcopy(teacher)
        rewrite(other, plan)
        apply(net, plan)
        x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
        ours, plain = (distilled(each.train(), teacher, settings, SAMPLE)(x, y) for each in (net, other))
        ours.backward()
        plain.backward()
        assert float(ours.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
        for (name, a), b in zip(net.named_parameters(), other.parameters(), strict=True):
            assert a.grad is not None and b.grad is not None
            assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-5), name

    def test_features_need_blocks(self) -> None:
        flat = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        with pytest.raises(Refusal, match="has no blocks whose features could be compared: distil logits alone"):
            distilled(flat, copy.deepcopy(flat), Distil(features=1), SAMPLE)
        assert distilled(flat, copy.deepcopy(flat), Distil(logits=1), SAMPLE)(SAMPLE, torch.tensor([1])).ndim == 0
