"""The training bench: what its arms make of a network, what a step costs, and a small grid that really trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgetune.bench import costs, training
from edgetune.bench.adapt import step, trainee_of
from edgetune.bench.arms import Arm, Prepare, Trainee, frozen_int8, last, planned, stock
from edgetune.bench.cases import Bench
from edgetune.bench.cells import CellStore, kept_for_backward
from edgetune.bench.costs import macs
from edgetune.bench.grid import GridOptions
from edgetune.frozen import NAME
from edgetune.methods.backward.exact import Exact
from edgetune.quantize import QuantizedNetwork

BENCH = Bench(training.DIGITS, "", quick=True)
ARMS = {(arm.method, arm.patch_px): arm for case, arm in training.ROWS if case is training.DIGITS}
INT8 = ["int8 without QAS", "int8 with QAS", "int8 state with QAS", "int8 with QAS and gains"]


def made(method: str, patch_px: int | None = None) -> Trainee:
    return trainee_of(BENCH, ARMS[method, patch_px], BENCH.photos().splits[0][0], 0)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    chosen = BENCH.photos().splits[0][0][:32]
    return BENCH.source().seen(chosen, 0), BENCH.photos().labels[chosen]


def kept(method: str, patch_px: int | None = None) -> int:
    return kept_for_backward(made(method, patch_px).model, batch()[0])


def learned(trainee: Trainee) -> dict[str, torch.Tensor]:
    return {name: p for name, p in trainee.model.named_parameters() if p.requires_grad}


def test_every_row_has_a_name_of_its_own_and_a_plain_one_beside_it() -> None:
    rows = [(case.name, *arm.identity.values()) for case, arm in training.ROWS]
    assert len(rows) == len(set(rows))
    assert {case for case, _ in training.ROWS} == set(training.GRID.cases)
    assert all(training.GRID.plain(case).rates is None for case in training.GRID.cases)
    # commas part the names on the command line
    assert not any("," in case.name for case in training.GRID.cases)


def test_a_rate_counts_by_its_worst_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {0: 0.3, 1: 2.3, 2: 0.4}
    monkeypatch.setattr(training, "adapt", lambda bench, arm, split, rate, seed: {"test_loss": losses[seed]})
    found = training.search(BENCH, training.HEAD, ([], []), 0.01, 0)
    assert found == {"test_loss": 2.3, "searched_seeds": 3}


def test_plain_learns_everything_and_the_head_alone_nothing_else() -> None:
    network = BENCH.learning_part(0)
    assert set(learned(made("plain"))) == {name for name, _ in network.named_parameters()}
    assert set(learned(made("head only"))) == {"head.weight", "head.bias"}


def test_exact_with_scales_takes_the_steps_of_plain() -> None:
    x, y = batch()
    after = []
    for method in ("plain", "exact, with scales"):
        trainee = made(method)
        optimizer = trainee.optimizer(trainee.model, 0.003, 0.0, 0)
        for _ in range(3):
            step(trainee, optimizer, x, y, None)
        after.append(learned(trainee))
    assert set(after[0]) == set(after[1])
    for name, value in after[0].items():
        torch.testing.assert_close(value, after[1][name], rtol=1e-4, atol=1e-5)


def test_clipping_is_by_the_norm_and_leaves_alone_without_one() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    found = {}
    for clip in (None, 0.01):
        model = nn.Linear(3, 2)
        with torch.no_grad():
            model.weight.fill_(0.5)
            model.bias.zero_()
        trainee = Trainee(model)
        _, norm = step(trainee, trainee.optimizer(model, 0.0, 0.0, 0), x, y, clip)
        now = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
        found[clip] = (norm, float(now))
    assert found[None][0] == pytest.approx(found[None][1]) and found[None][0] == pytest.approx(found[0.01][0])
    assert found[0.01][1] == pytest.approx(0.01, rel=1e-3)


def test_integer_arms_differ_in_scaling_and_state_alone() -> None:
    x, y = batch()
    steps = {}
    for method in INT8:
        trainee = made(method)
        assert isinstance(trainee.model, QuantizedNetwork)
        conv = list(trainee.model.convs())[-1]
        F.cross_entropy(trainee.model(x), y).backward()
        trainee.rescale(trainee.model)
        (grad,) = (p.grad for p in conv.weight.parameters())
        assert grad is not None
        steps[method] = (grad, conv)
    bare, scaled, stepped, gained = (steps[method][0] for method in INT8)
    scale, gain = (getattr(steps[INT8[0]][1], name).view(-1, 1, 1, 1) for name in ("weight_scale", "gain"))
    torch.testing.assert_close(scaled.double(), bare.double() * scale**-2, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(gained.double(), scaled.double() * gain**2, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(stepped, scaled)
    values = [steps[method][1].weight.value for method in INT8]
    assert [value.dtype for value in values] == [torch.float32, torch.float32, torch.int8, torch.float32]


def test_arms_keep_less_in_the_order_in_which_they_should() -> None:
    plain, exact, int8 = kept("plain"), kept("exact"), kept("int8 with QAS")
    assert kept("head only") < kept("pooled chain", 4) < kept("pooled chain", 2) < exact < plain
    assert kept("pooled chain", 2) < kept("pooled chain, with scales", 2)
    assert kept("int8 without QAS") == int8 == kept("int8 state with QAS") < exact / 3


def test_products_are_counted_as_by_hand() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, groups=2)
            self.head = nn.Linear(6 * 9, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.conv2(self.conv1(x)).flatten(1))

    model, x, y = Net(), torch.randn(2, 3, 7, 7), torch.tensor([0, 4])
    conv1, conv2, head = 2 * 49 * 4 * 3 * 9, 2 * 9 * 6 * 2 * 9, 2 * 54 * 5
    # nobody asks for the gradient of the picture
    assert macs(model, x, y) == (conv1 + conv2 + head, conv1 + 2 * conv2 + 2 * head)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.conv1.requires_grad_(False)
    assert macs(model, x, y) == (conv1 + conv2 + head, conv2 + 2 * head)


def test_a_small_grid_trains_and_says_what_a_step_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(training.DIGITS, epochs=2, rates=(0.003,))
    arms: tuple[Arm, ...] = (training.plain(None), training.BEFORE, training.int8(None)[-1])

    grid = replace(training.GRID, cases=(case,), rows=tuple((case, arm) for arm in arms))
    monkeypatch.setattr(training, "GRID", grid)
    monkeypatch.setattr(costs, "ROUNDS", 1)
    monkeypatch.setattr(training, "SEARCHED_SEEDS", 1)
    options = GridOptions(out=str(tmp_path / "t.jsonl"), quick=True)
    rows = {row["method"]: row for row in grid.run(options)["rows"]}
    lines = CellStore(options.out).lines()
    assert grid.run(options)["rows"] == list(rows.values()) and CellStore(options.out).lines() == lines
    plain, before, int8 = (rows[arm.method] for arm in arms)
    assert plain["accuracy_mean"] > before["accuracy_mean"]
    assert int8["accuracy_difference"] > before["accuracy_difference"]
    assert int8["forward_macs"] == plain["forward_macs"]
    assert 0 < int8["kept_bytes"] < int8["kept_bytes_baseline"] == plain["kept_bytes"]
    assert int8["kept_bytes"] < int8["peak_bytes"] and int8["peak_bytes_baseline"] == plain["peak_bytes"]
    assert int8["method_ms"] > 0 and int8["baseline_ms"] > 0 and (int8["clock"], int8["threads"]) == ("cpu", 1)
    assert "method_ms" not in before


@pytest.mark.parametrize("prepare", [stock(2), planned(last(2, Exact()))], ids=["stock", "planned"])
def test_a_frozen_part_in_integers_trains_the_same_parameters(prepare: Prepare) -> None:
    train = BENCH.photos().splits[0][0]
    ours, theirs = (trainee_of(BENCH, Arm("x", p), train, 0) for p in (frozen_int8(prepare), prepare))
    assert learned(ours).keys() == learned(theirs).keys() and hasattr(ours.model, NAME)
    (x, y), losses = batch(), []
    for trainee in (ours, theirs):
        optimizer = trainee.optimizer(trainee.model, 0.01, 0.0, 0)
        losses.append([step(trainee, optimizer, x, y, None)[0] for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]
    assert losses[0][-1] < losses[0][0]
