"""COMET: the noise is what the law says, the bound follows the gradient, the cap on bytes holds."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edgetune as et
from edgetune.codecs import Bounded
from edgetune.contract import Plan
from edgetune.loop import Silent
from edgetune.methods.backward.comet import COMET, WIDEST, exact_noise, fitted_noise
from edgetune.methods.backward.exact import Exact
from edgetune.models import load_model
from edgetune.plan import last_layers
from edgetune.run import Interrupted, load_run
from edgetune.train import resume, train
from hosts.test_coded import ALL
from nets import scramble
from stopping import Stop, few_digits


def with_comet(plan: Plan, method: COMET) -> Plan:
    return plan.model_copy(update={"layers": {name: (*stack, method) for name, stack in plan.layers.items()}})


def applied(name: str, method: COMET, px: int = 33) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A network with everything learning exactly, the same with COMET, and a batch."""
    torch.manual_seed(4)
    model, x = scramble(ALL[name]()), torch.randn(4, 3, px, px)
    plan = last_layers(et.trace(model, x), None, Exact(), scales=True)
    exact, ours = copy.deepcopy(model), copy.deepcopy(model)
    et.apply(exact, plan)
    et.apply(ours, with_comet(plan, method))
    return exact, ours, x


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    F.cross_entropy(model(x), torch.arange(len(x)) % 5).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / (expected.norm() + 1e-12))


@pytest.mark.parametrize("bound", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("groups", [1, 8])
def test_the_noise_on_a_gradient_is_what_the_law_says(bound: float, groups: int) -> None:
    torch.manual_seed(0)
    x = F.avg_pool2d(torch.randn(16, 8, 36, 36), 3, 1).mul(3).relu()
    gy, measured = torch.randn(16, 32, 34, 34) * torch.rand(1, 32, 1, 1), []
    for shift in range(8):
        rolled = x.roll(shift, 3)
        error = Bounded(bound).decode(Bounded(bound).encode(rolled), x.shape) - rolled
        measured.append(torch.ops.aten.convolution_backward(
            gy, error, torch.empty(32, 8 // groups, 3, 3), None, (1, 1), (1, 1), (1, 1), False, (0, 0), groups,
            (False, True, False))[1])
    spread = float(torch.stack(measured).square().mean().sqrt())
    assert exact_noise(bound, (x != 0).float().mean(), gy).item() == pytest.approx(spread, rel=0.1)


def test_the_published_law_needs_a_constant_for_every_size_of_a_map() -> None:
    share, ratios = torch.tensor(0.5), []
    for px in (4, 8, 16):
        gy = torch.randn(8, 4, px, px, generator=torch.Generator().manual_seed(px))
        ratios.append(float(exact_noise(0.1, share, gy) / fitted_noise(0.1, share, gy)))
    assert ratios[2] / ratios[0] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_off_by_about_the_tolerance(name: str) -> None:
    for tolerance in (0.1, 0.01):
        start = min(tolerance, 0.02)  # holds on for values that no convolution reads as they are
        exact, ours, x = applied(name, COMET(tolerance=tolerance, start=start, most_bits=32, interval=1))
        gradients(ours, x)  # the first step finds the bounds
        found, expected = gradients(ours, x), gradients(exact, x)
        assert found.keys() == expected.keys()
        for parameter in found:
            if found[parameter].dim() == 4:
                assert relative(found[parameter], expected[parameter]) < 4 * tolerance, parameter
            elif parameter.endswith("bias"):  # shifts see masks alone, and those are exact
                assert relative(found[parameter], expected[parameter]) < 1e-4 or name in ("Inverted", "Stacked")


def test_masks_and_input_gradients_are_exact_behind_relus() -> None:
    exact, ours, x = applied("Residual", COMET(start=WIDEST))
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    gradients(exact, first)
    gradients(ours, second)
    assert torch.allclose(first.grad, second.grad, rtol=1e-4, atol=1e-7)


def test_the_bound_follows_every_interval_and_each_copy_has_its_own() -> None:
    _, ours, x = applied("Residual", COMET(interval=2))
    twin = copy.deepcopy(ours)
    assert math.isnan(ours.one[0][0].comet[0]) and "one.0.0.comet" not in ours.state_dict()
    seen = []
    for _ in range(4):
        gradients(ours, x)
        seen.append(float(ours.one[0][0].comet[0]))
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.mul_(1.1)
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert math.isnan(twin.one[0][0].comet[0])


def test_kept_bytes_stay_below_what_is_predicted_however_data_look() -> None:
    for scale in (1e-3, 1.0, 1e6):
        _, ours, x = applied("Residual", COMET(most_bits=4))
        plan = last_layers(et.trace(ALL["Residual"](), x), None, Exact(), scales=True)
        noise = x * scale * torch.randn_like(x).exp()
        predicted = et.profile(scramble(ALL["Residual"]()), x, with_comet(plan, COMET(most_bits=4))).kept_bytes
        gradients(ours, noise)
        assert et.measure(ours, noise, repeats=1).kept_bytes <= predicted


def test_values_that_are_not_finite_are_kept_as_they_are() -> None:
    exact, ours, x = applied("Residual", COMET(most_bits=32))
    x[0, 0, 0, 0] = math.nan
    assert all(bool(g.isnan().any()) == bool(gradients(exact, x)[name].isnan().any())
               for name, g in gradients(ours, x).items())


def test_published_setting() -> None:
    own = COMET.published()
    assert (own.tolerance, own.interval, own.law) == (0.01, 1000, "fitted")
    exact, ours, x = applied("Residual", own.model_copy(update={"most_bits": 32.0}))
    gradients(ours, x)
    assert relative(gradients(ours, x)["one.0.0.weight"], gradients(exact, x)["one.0.0.weight"]) < 0.3


@pytest.mark.usefixtures("one_thread")
def test_a_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    digits = few_digits()

    def start(out: Path, progress: Silent | None = None) -> nn.Module:
        torch.manual_seed(1)
        model = load_model("digits_net")
        plan = with_comet(last_layers(et.trace(model, torch.zeros(8, 1, 32, 32)), 4, Exact()), COMET(interval=2))
        train(model, digits, plan, out=out, epochs=2, batch_size=8, augment=False, model_name="digits_net",
              baseline=False, progress=progress or Silent())
        return model

    whole = start(tmp_path / "whole")
    with pytest.raises(Interrupted):
        start(tmp_path / "parts", Stop())
    resume(tmp_path / "parts", data=digits)
    parts = load_run(tmp_path / "parts").model
    assert all(torch.equal(tensor, parts.state_dict()[name]) for name, tensor in whole.state_dict().items())
