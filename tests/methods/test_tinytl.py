"""TinyTL: the branch against its formula, its gradients against autograd, its bytes against its page; whole runs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edgetune as et
from edgetune.apply import rewrite
from edgetune.blocks import blocks
from edgetune.contract import Plan
from edgetune.data import Dataset
from edgetune.errors import PlanError, Refusal
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.tinytl import Lite, TinyTL, norm_groups, pooled
from edgetune.models import load_model
from edgetune.profile import measure, profile
from edgetune.report import report
from edgetune.run import Interrupted, evaluate, load_run
from edgetune.train import resume, train
from nets import NETS, scramble
from stopping import Stop, few_digits


def network(name: str = "Stacked", *shape: int) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(3)
    model = scramble(NETS[name]()).double().eval()
    return model, torch.randn(*(shape or (3, 3, 21, 18)), dtype=torch.float64)


def plan_for(model: nn.Module, x: torch.Tensor, settings: TinyTL | None = None, count: int | None = None) -> Plan:
    return (settings or TinyTL()).last_blocks(et.trace(model, x), count)


def awaken(model: nn.Module) -> None:
    """Branches as after some training: no scale is zero."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)


@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 3, 7, 9), (1, 5, 12, 6)])
@pytest.mark.parametrize("size", [2, 3])
def test_pooling_is_that_of_torch_and_keeps_nothing(shape: tuple[int, ...], size: int) -> None:
    x, kept = torch.randn(shape, dtype=torch.float64, requires_grad=True), list[torch.Tensor]()
    if min(shape[2:]) < size:
        return
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours = pooled(x, size)
    theirs = F.avg_pool2d(x, size)
    gy = torch.randn_like(theirs)
    assert torch.allclose(ours, theirs) and not kept
    assert torch.allclose(*(torch.autograd.grad(y, x, gy)[0] for y in (ours, theirs)))


@pytest.mark.parametrize("name", ["Residual", "Stacked"])
@pytest.mark.parametrize("settings", [TinyTL(), TinyTL(kernel_size=3, groups=3, reduction=3), TinyTL(reduction=1)])
def test_a_block_adds_what_the_formula_says(name: str, settings: TinyTL) -> None:
    model, x = network(name, 1, 3, 23, 18)
    plan, twin = plan_for(model, x, settings), copy.deepcopy(model)
    rewrite(model, plan)
    awaken(model)
    for block, stack in plan.rewritten().items():
        old, new, own = twin.get_submodule(block), model.get_submodule(block), stack[0]
        assert isinstance(own, TinyTL)
        channels = next(found for found in blocks(et.trace(twin, x)) if found.name == block).in_shapes[0][1]
        z = torch.randn(1, channels, 11, 9, dtype=torch.float64)
        y, p = old(z.clone()), dict(new.lite.named_parameters())
        stride = round(11 / y.shape[2])
        small = F.conv2d(F.avg_pool2d(z, own.reduction), p["conv1.weight"], None, stride, own.kernel_size // 2, 1,
                         own.groups)
        small = F.relu(F.group_norm(small, norm_groups(channels), p["norm1.weight"], p["norm1.bias"]))
        small = F.conv2d(small, p["conv2.weight"])
        small = F.group_norm(small, norm_groups(y.shape[1]), p["norm2.weight"], p["norm2.bias"])
        expected = y + F.interpolate(small, y.shape[2:], mode="bilinear", align_corners=False)
        assert torch.allclose(new(z.clone()), expected, atol=1e-12)
        assert not torch.allclose(y, expected, atol=1e-3)


@pytest.mark.parametrize("name", ["Residual", "Stacked"])
@pytest.mark.parametrize("settings", [TinyTL(), TinyTL(biases=False), TinyTL(residuals=False)])
@pytest.mark.parametrize("batch", [1, 3])
def test_gradients_are_those_of_autograd(name: str, settings: TinyTL, batch: int) -> None:
    model, x = network(name, batch, 3, 21, 18)
    plan = plan_for(model, x, settings)
    rewrite(model, plan)
    awaken(model)
    stock = copy.deepcopy(model).eval()
    et.apply(model, plan)
    for each in (model, stock):
        F.cross_entropy(each(x), torch.arange(batch) % 5).backward()
    stocks = dict(stock.named_parameters())
    learned = [name for name, p in model.named_parameters() if p.grad is not None]
    assert set(learned) == plan.learned()
    for each in learned:
        assert torch.allclose(dict(model.named_parameters())[each].grad, stocks[each].grad, atol=1e-10), each


def test_nothing_changes_at_first_and_the_last_scale_can_begin() -> None:
    model, x = network()
    before = model(x)
    et.apply(model, plan_for(model, x))
    assert torch.equal(model(x), before)
    F.cross_entropy(model(x), torch.arange(3)).backward()
    for name, parameter in model.named_parameters():
        if ".lite." in name and parameter.grad is not None:
            assert bool(parameter.grad.any()) == name.endswith("norm2.weight"), name


def test_kept_bytes_are_those_of_the_page_and_predicted_to_the_byte() -> None:
    model, x = load_model("resnet20", num_classes=10).eval(), torch.randn(2, 3, 32, 32)
    plan = plan_for(model, x, TinyTL(biases=False), count=1)
    predicted = profile(model, x, plan)
    undo = et.apply(model, plan)
    measured = measure(model, x)
    undo()
    assert [(row.name, row.kept_bytes) for row in predicted.layers] == [
        (row.name, row.kept_bytes) for row in measured.layers]
    assert predicted.peak_bytes == measured.peak_bytes
    n, c, hw = 2, 64, 4 * 4  # the branch's maps: half of 8 x 8
    branch = sum(row.kept_bytes for row in predicted.layers if ".lite." in row.name)
    assert branch == n * hw * (4 * c + 8 * c + c // 8 + 4 * c) + 2 * 8 * n * norm_groups(c)


def test_the_plan_says_what_learns() -> None:
    model, x = network()
    whole, last = plan_for(model, x), plan_for(model, x, count=1)
    assert list(whole.layers) == ["stage.0", "stage.1"] and list(last.layers) == ["stage.1"]
    assert whole.learns["stage.1.lite.norm2"] == ("weight",)  # the block's own shift learns
    assert whole.learns["stem.1"] == ("bias",) and "stem.1" not in last.learns
    assert whole.learns["stage.0.gate.1"] == ("bias",) and whole.learns["head"] == ("weight", "bias")
    assert not any(role.endswith("weight") for role in whole.learned() if ".lite." not in role and "head" not in role)
    alone = plan_for(model, x, TinyTL(biases=False))
    assert alone.learns["stage.1.lite.norm2"] == ("weight", "bias") and "stem.1" not in alone.learns
    assert plan_for(model, x, TinyTL(residuals=False)).layers == {}
    assert Plan.model_validate_json(whole.model_dump_json()) == whole


def test_branches_fit_small_maps_and_odd_channels() -> None:
    model, x = network("Stacked", 1, 3, 5, 6)  # maps of 3 x 3 and six channels
    own = plan_for(model, x, TinyTL(groups=4)).layers["stage.0"][0]
    assert own == TinyTL(groups=2, kernel_size=1)
    assert [norm_groups(channels) for channels in (3, 8, 15, 16, 24, 100)] == [1, 1, 1, 2, 3, 10]


@pytest.mark.parametrize(("settings", "said"), [
    (TinyTL(groups=4), "groups=4"), (TinyTL(reduction=12), "reduction=12"), (TinyTL(residuals=False), "residuals")])
def test_settings_that_do_not_fit_are_refused_by_name(settings: TinyTL, said: str) -> None:
    model, x = network()
    with pytest.raises(Refusal, match=f"'stage.0' .*{said}"):
        et.apply(model, Plan(input_shape=tuple(x.shape), layers={"stage.0": (settings,)}))
    for wrong in ({"kernel_size": 4}, {"residuals": False, "biases": False}):
        with pytest.raises(ValueError, match=r"must"):
            TinyTL.model_validate(wrong)


def test_layers_and_missing_blocks_are_refused() -> None:
    model, x = network()
    shape = tuple(x.shape)
    for layer, said in (("stem.0", "not a block"), ("head", "not a block"), ("stage.0.gate.0", "no part")):
        with pytest.raises(Refusal, match=said):
            et.apply(model, Plan(input_shape=shape, layers={layer: (TinyTL(),)}))
    with pytest.raises(Refusal, match="is a block"):
        et.apply(model, Plan(input_shape=shape, layers={"stage.0": (Exact(),)}))
    for count in (0, 3):
        with pytest.raises(PlanError, match=f"last {count} blocks .* has 2"):
            plan_for(model, x, count=count)
    with pytest.raises(PlanError, match="has 0"):
        plan_for(*network("Inverted"))


def test_a_block_with_a_forward_or_a_branch_of_its_own_is_refused_and_left() -> None:
    model, x = network()
    plan = plan_for(model, x)
    model.stage[1].lite = nn.Identity()
    names = list(model.state_dict())
    with pytest.raises(Refusal, match=r"stage\.1"):
        et.apply(model, plan)
    assert list(model.state_dict()) == names and "forward" not in vars(model.stage[0])
    model.stage[0].register_forward_hook(lambda *_: None)
    with pytest.raises(Refusal, match="hooks"):
        et.apply(model, plan)


def test_rewriting_comes_first_stays_and_is_done_once() -> None:
    model, x = network()
    plan, names = plan_for(model, x), list(model.state_dict())
    undo_rewriting = rewrite(model, plan)
    weights = model.stage[0].lite.conv1.weight
    assert not rewrite(model, plan)
    undo = et.apply(model, plan)
    undo()
    assert model.stage[0].lite.conv1.weight is weights
    twin = copy.deepcopy(model)
    awaken(twin)
    assert not torch.allclose(twin(x), model(x))  # the copy has branches of its own
    with pytest.raises(PlanError, match="another plan"):
        et.apply(model, plan_for(network()[0], x, TinyTL(seed=1)))
    undo_rewriting()
    assert list(model.state_dict()) == names
    et.apply(model, plan)()
    assert list(model.state_dict()) == names


def test_first_weights_depend_on_seed_and_block_alone() -> None:
    def first(seed: int) -> list[torch.Tensor]:
        model, x = network()
        torch.manual_seed(torch.initial_seed() + len(taken))
        state = torch.get_rng_state()
        rewrite(model, plan_for(model, x, TinyTL(seed=seed)))
        assert torch.equal(torch.get_rng_state(), state)
        return [module.conv1.weight for module in model.modules() if isinstance(module, Lite)]

    taken: list[list[torch.Tensor]] = []
    for seed in (0, 0, 1):
        taken.append(first(seed))
    assert all(map(torch.equal, taken[0], taken[1])) and not any(map(torch.equal, taken[0], taken[2]))


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return few_digits()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("cached", [False, True])
def test_a_run_is_resumed_loaded_and_reported(digits: Dataset, tmp_path: Path, cached: bool) -> None:
    def start(out: Path, **changes: object) -> nn.Module:
        torch.manual_seed(1)
        model = load_model("digits_net")
        plan = TinyTL().last_blocks(et.trace(model, torch.zeros(8, 1, 32, 32)), 1)
        train(model, digits, plan, out=out, epochs=2, batch_size=8, augment=False, model_name="digits_net",
              **{"baseline": True, **changes})
        return model

    model = start(tmp_path / "whole")
    assert any(isinstance(module, Lite) for module in model.modules())  # what was trained is there
    cache = et.Cache(keep="memory") if cached else None
    with pytest.raises(Interrupted):
        start(tmp_path / "parts", progress=Stop(), cache=cache)
    done = resume(tmp_path / "parts", data=digits)
    whole = load_run(tmp_path / "whole", model=load_model("digits_net"))
    parts = load_run(tmp_path / "parts")
    assert done.accuracy_after == whole.run.accuracy_after and done.plain == whole.run.plain.model_copy(
        update={"epochs": done.plain.epochs})
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, parts.model.state_dict()[name]) and torch.equal(tensor, model.state_dict()[name])
    assert bool(whole.model.state_dict()["features.3.lite.norm2.weight"].any())
    assert evaluate(parts.model, digits.val, 10).accuracy == done.accuracy_after
    assert "features.3.lite.conv1" in report(tmp_path / "parts").read_text()
