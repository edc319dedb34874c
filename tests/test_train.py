"""Training goes on exactly where it was, whatever stopped it, and keeps good weights when it cannot."""

from __future__ import annotations

import copy
import errno
import itertools
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edgetune as et
from edgetune import loop
from edgetune.contract import Plan
from edgetune.costs import Costs, costs_of, unrestrained
from edgetune.data import Augment, Dataset, Preprocess, batches, load_data
from edgetune.errors import DivergedError, PlanError, RunError
from edgetune.loop import accumulate, cross_entropy, rate_at
from edgetune.methods.backward.gradient_filter import GradientFilter
from edgetune.methods.backward.sparse_update import SparseUpdate
from edgetune.models import model_card
from edgetune.plan import last_layers
from edgetune.run import WEIGHTS, Epoch, Interrupted, Run, Settings, load_run, read_run, read_tensors
from edgetune.train import resume, train

PICTURES, BATCH, EPOCHS = 38, 8, 3
STEPS = 5 * EPOCHS  # the last batch of an epoch is a small one
VIEWS = Augment(flip=True, crop_scale=0.7, shift_px=2)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data("digits", Preprocess.from_input(model_card("digits_net").input), limit=PICTURES)


def network(seed: int = 1) -> nn.Module:
    """Two convolutions with norms that have seen something, and dropout."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(96, 10))  # fmt: skip
    for norm in (model[1], model[4]):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
    return model.eval()


def plan_for(model: nn.Module, micro_batch: int | None = None) -> Plan:
    plan = last_layers(et.trace(model, torch.zeros(BATCH, 1, 32, 32)), None, GradientFilter(patch_px=2))
    return plan.model_copy(update={"micro_batch": micro_batch})


@pytest.fixture(scope="module")
def costs() -> Costs:
    """Predicted only, and once: what is measured is no matter of these tests."""
    model = network()
    x, y = torch.zeros(BATCH, 1, 32, 32), torch.zeros(BATCH, dtype=torch.long)
    return costs_of(model, plan_for(model), x, y, measured=False)


Start = Callable[..., Run]


@pytest.fixture
def start(digits: Dataset, costs: Costs) -> Start:
    def begin(out: Path, model: nn.Module | None = None, plan: Plan | None = None, **changes: object) -> Run:
        model = network() if model is None else model
        settings = {"epochs": EPOCHS, "batch_size": BATCH, "learning_rate": 0.05, "augment": VIEWS, "seed": 5}
        return train(model, digits, plan or plan_for(model), out=out, costs=costs, **{**settings, **changes})

    return begin


class Stop(loop.Silent):
    """Raises at the n-th step that it sees, or at the end of the n-th epoch."""

    def __init__(self, step: int = 0, epoch: int = 0, stop: type[BaseException] = KeyboardInterrupt) -> None:
        self.left, self.last_epoch, self.stop = step, epoch, stop

    def advance(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.stop

    def epoch(self, number: int, row: Epoch) -> None:
        if number == self.last_epoch:
            raise self.stop


class Killed(BaseException):
    """Stands for a kill: nobody catches it, so nothing more is written."""


def curves(epochs: tuple[Epoch, ...]) -> list[tuple[float, float, float]]:
    return [(row.train_loss, row.val_loss, row.val_accuracy) for row in epochs]


def same(a: Path, b: Path) -> bool:
    """Whether two run folders hold the same weights, bit for bit, and the same curves."""
    runs, states = [read_run(p) for p in (a, b)], [read_tensors(p / WEIGHTS)[0] for p in (a, b)]
    plain = [curves(run.plain.epochs) if run.plain else [] for run in runs]
    return (
        states[0].keys() == states[1].keys()
        and all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        and curves(runs[0].epochs) == curves(runs[1].epochs)
        and plain[0] == plain[1]
        and {run.status for run in runs} == {"finished"}
    )


@pytest.fixture
def whole(start: Start, tmp_path: Path) -> Path:
    """The run that nothing interrupts."""
    start(tmp_path / "whole", baseline=True)
    return tmp_path / "whole"


class TestGoingOn:
    @pytest.mark.parametrize("step", [1, 4, 5, 6, 12, STEPS, STEPS + 1, STEPS + 8, 2 * STEPS])
    def test_after_ctrl_c_at_any_step(
        self, start: Start, digits: Dataset, whole: Path, tmp_path: Path, step: int
    ) -> None:
        out = tmp_path / "cut"
        with pytest.raises(Interrupted, match=f"edgetune train --resume {out}"):
            start(out, baseline=True, progress=Stop(step))
        assert read_run(out).status == "interrupted"
        assert resume(out, model=network(seed=9), data=digits).status == "finished"
        assert same(out, whole)

    def test_where_windows_of_the_weights_learn(self, start: Start, digits: Dataset, tmp_path: Path) -> None:
        plan = last_layers(et.trace(network(), torch.zeros(BATCH, 1, 32, 32)), None, SparseUpdate(ratio=0.5))
        start(tmp_path / "whole", plan=plan)
        with pytest.raises(Interrupted):
            start(tmp_path / "cut", plan=plan, progress=Stop(STEPS // 2))
        resume(tmp_path / "cut", model=network(seed=9), data=digits)
        assert same(tmp_path / "cut", tmp_path / "whole")
        weights, before = read_tensors(tmp_path / "cut" / WEIGHTS)[0], network().state_dict()
        assert weights.keys() == before.keys()
        moved = (weights["3.weight"] != before["3.weight"]).flatten(2).any(2).any(0)
        assert moved.tolist() == [True, True, False, False]

    def test_after_ctrl_c_at_the_end_of_an_epoch(
        self, start: Start, digits: Dataset, whole: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(Interrupted):
            start(tmp_path / "cut", baseline=True, progress=Stop(epoch=2))
        assert len(read_run(tmp_path / "cut").epochs) == 2
        resume(tmp_path / "cut", model=network(seed=9), data=digits)
        assert same(tmp_path / "cut", whole)

    def test_after_many_interruptions(self, start: Start, digits: Dataset, whole: Path, tmp_path: Path) -> None:
        out, rng = tmp_path / "cut", random.Random(0)
        with pytest.raises(Interrupted):
            start(out, baseline=True, progress=Stop(1))
        for _ in range(50):
            try:
                resume(out, model=network(seed=9), data=digits, progress=Stop(rng.randint(1, 5)))
                break
            except Interrupted:
                assert load_run(out, network(seed=9)).run.status == "interrupted"
        assert same(out, whole)

    def test_after_ctrl_c_in_the_middle_of_an_update(
        self, start: Start, digits: Dataset, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        update, count = torch.optim.SGD.step, itertools.count(1)

        def cut(self: torch.optim.SGD) -> None:
            update(self)
            if next(count) == 7:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.SGD, "step", cut)
            with pytest.raises(Interrupted):
                start(tmp_path / "cut", baseline=True)
        resume(tmp_path / "cut", model=network(seed=9), data=digits)
        assert same(tmp_path / "cut", whole)

    @pytest.mark.parametrize("save_every_s", [0.0, 60.0])
    @pytest.mark.parametrize("step", [3, 5, 8, STEPS + 7])
    def test_after_a_kill_between_steps(
        self, start: Start, digits: Dataset, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        step: int, save_every_s: float,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(loop, "SAVE_EVERY_S", save_every_s)
        with pytest.raises(Killed):
            start(tmp_path / "cut", baseline=True, progress=Stop(step, stop=Killed))
        assert read_run(tmp_path / "cut").status == "running"
        load_run(tmp_path / "cut", network(seed=9))
        resume(tmp_path / "cut", model=network(seed=9), data=digits)
        assert same(tmp_path / "cut", whole)

    @pytest.mark.parametrize("moment", ["fsync", "replace"])
    def test_after_a_kill_while_any_file_is_written(
        self, start: Start, digits: Dataset, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        moment: str,
    ) -> None:  # fmt: skip
        for write in range(1 if moment == "fsync" else 2, 60, 4):
            out = tmp_path / f"cut-{write}"
            with monkeypatch.context() as patch:
                patch.setattr(os, moment, _dies_at(getattr(os, moment), write))
                try:
                    start(out, baseline=True)
                    break
                except Killed:
                    pass
            if not (out / "run.json").exists():
                assert write <= 5
                continue
            load_run(out, network(seed=9))
            if read_run(out).status == "running":
                resume(out, model=network(seed=9), data=digits)
            assert same(out, whole)
        else:
            pytest.fail("a run writes more files than were tried")

    def test_after_a_full_disk(
        self, start: Start, digits: Dataset, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "cut"
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", _full_from(os.fsync, 9))
            with pytest.raises(RunError, match=rf"'{out}/[a-z.]+' cannot be written \(No space left"):
                start(out, baseline=True)
        load_run(out, network(seed=9))
        resume(out, model=network(seed=9), data=digits)
        assert same(out, whole)

    def test_depends_on_the_seed_only(self, start: Start, whole: Path, tmp_path: Path) -> None:
        torch.manual_seed(99)
        model = network()
        start(tmp_path / "again", model, baseline=True)
        assert same(tmp_path / "again", whole)
        start(tmp_path / "other", baseline=True, seed=6)
        assert not same(tmp_path / "other", whole)

    def test_after_kill_9_of_the_process(self, tmp_path: Path) -> None:
        """A process is killed at a chance moment; this one ends what it began."""
        out = tmp_path / "cut"
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(out)], env=ENVIRONMENT)
        while not (out / "run.json").exists() or len(read_run(out).epochs) < 2:
            assert process.poll() is None, "the process ended by itself"
            time.sleep(0.01)
        time.sleep(random.Random(3).uniform(0, 0.1))
        process.kill()
        process.wait()
        assert load_run(out).run.status == "running"
        assert resume(out).status == "finished"
        assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
        scope: dict[str, object] = {"__name__": "whole"}
        exec(SCRIPT, scope)
        scope["begin"](str(tmp_path / "whole"))  # type: ignore[operator]
        assert same(out, tmp_path / "whole")


def _dies_at(call: Callable[..., object], turn: int) -> Callable[..., object]:
    count = itertools.count(1)

    def dying(*args: object) -> object:
        if next(count) == turn:
            raise Killed
        return call(*args)

    return dying


def _full_from(call: Callable[..., object], turn: int) -> Callable[..., object]:
    count = itertools.count(1)

    def full(*args: object) -> object:
        if next(count) >= turn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return call(*args)

    return full


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
SCRIPT = """
import sys, torch, edgetune as et
from edgetune.data import Preprocess, load_data
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.models import load_model, model_card
from edgetune.plan import last_layers
from edgetune.costs import costs_of
from edgetune.train import train

def begin(out):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = load_model("digits_net")
    data = load_data("digits", Preprocess.from_input(model_card("digits_net").input), limit=20)
    x, y = torch.zeros(4, 1, 32, 32), torch.zeros(4, dtype=torch.long)
    plan = last_layers(et.trace(model, x), 2, PooledChain(patch_px=2))
    train(model, data, plan, out=out, epochs=15, batch_size=4, model_name="digits_net",
          data_options={"limit": 20}, costs=costs_of(model, plan, x, y, measured=False))

if __name__ == "__main__":
    begin(sys.argv[1])
"""


class TestRefusals:
    def test_a_finished_run_is_not_resumed(self, whole: Path, digits: Dataset) -> None:
        with pytest.raises(RunError, match="has finished, so there is nothing to resume"):
            resume(whole, model=network(), data=digits)

    def test_a_folder_with_a_run_is_not_overwritten(self, whole: Path, start: Start) -> None:
        before = (whole / WEIGHTS).read_bytes()
        with pytest.raises(RunError, match="holds a run already"):
            start(whole)
        assert (whole / WEIGHTS).read_bytes() == before

    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"epochs": 0}, "epochs cannot be 0"),
            ({"learning_rate": float("nan")}, "learning_rate cannot be nan"),
            ({"momentum": 1.0}, r"momentum cannot be 1\.0"),
        ],
    )
    def test_settings_that_make_no_sense(
        self, start: Start, tmp_path: Path, changes: dict[str, float], complaint: str
    ) -> None:
        with pytest.raises(RunError, match=complaint):
            start(tmp_path / "out", **changes)
        assert not (tmp_path / "out").exists()

    def test_plans_that_do_not_fit_leave_nothing_behind(self, start: Start, tmp_path: Path) -> None:
        nothing = Plan(input_shape=(BATCH, 1, 32, 32))
        stranger = nothing.model_copy(update={"learns": {"blocks.3": ("weight",)}})
        for plan, complaint in ((nothing, "lets nothing learn"), (stranger, "blocks.3.weight")):
            with pytest.raises(PlanError, match=complaint):
                start(tmp_path / "out", plan=plan)
        assert not (tmp_path / "out").exists()

    def test_an_edited_plan_other_pictures_and_a_bad_checkpoint(
        self, start: Start, digits: Dataset, tmp_path: Path
    ) -> None:
        out = tmp_path / "cut"
        with pytest.raises(Interrupted):
            start(out, progress=Stop(2))
        plan = Plan.load(out / "plan.json")
        plan.model_copy(update={"micro_batch": 2}).save(out / "plan.json")
        with pytest.raises(RunError, match=r"plan\.json' was edited"):
            resume(out, model=network(), data=digits)
        plan.save(out / "plan.json")
        fewer = load_data("digits", digits.preprocess, limit=20)
        with pytest.raises(RunError, match="are not those that the run began with"):
            resume(out, model=network(), data=fewer)
        os.truncate(out / "planned.checkpoint", 900)
        with pytest.raises(RunError, match=r"planned\.checkpoint' is missing or damaged"):
            resume(out, model=network(), data=digits)


class TestDivergence:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_keeps_the_last_good_weights(
        self, start: Start, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float
    ) -> None:
        good, count = [], itertools.count(1)

        class Keep(loop.Silent):
            def epoch(self, number: int, row: Epoch) -> None:
                good.append(read_tensors(tmp_path / "out" / WEIGHTS)[0])

        def spoiled(loss_of: loop.Loss, *batch: object) -> float:
            if next(count) == 13:  # in the third epoch; steps before it have gone on from the good weights
                model[8].weight.data.fill_(bad)
            return accumulate(loss_of, *batch)  # type: ignore[arg-type]

        monkeypatch.setattr(loop, "accumulate", spoiled)
        model = network()
        with pytest.raises(DivergedError, match="not a number at step 13 of 15: train anew with a --learning"):
            start(tmp_path / "out", model, progress=Keep())
        kept = load_run(tmp_path / "out", network(seed=9))
        assert (kept.run.status, len(kept.run.epochs), len(good)) == ("diverged", 2, 2)
        for state in (kept.model.state_dict(), model.state_dict()):
            assert all(torch.equal(state[name], good[-1][name]) for name in state)
        with pytest.raises(RunError, match="train anew with a lower --learning-rate"):
            resume(tmp_path / "out", model=model, data=digits)

    def test_a_rate_far_too_high_ends_with_the_first_weights(self, start: Start, tmp_path: Path) -> None:
        with pytest.raises(DivergedError):
            start(tmp_path / "out", learning_rate=1e30)
        first, kept = network().state_dict(), read_tensors(tmp_path / "out" / WEIGHTS)[0]
        assert all(torch.equal(kept[name], first[name]) for name in first)

    def test_of_the_comparison_does_not_lose_the_run(
        self, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        count = itertools.count(1)
        monkeypatch.setattr(
            loop, "accumulate", lambda *a: accumulate(*a) * (float("nan") if next(count) > STEPS else 1)
        )
        run = start(tmp_path / "out", baseline=True)
        assert run.plain is not None and run.accuracy_after is not None
        assert (run.status, run.plain.diverged, run.plain.accuracy) == ("finished", True, None)


class TestSteps:
    @pytest.mark.parametrize("micro_batch", [1, 3, 8])
    def test_micro_batches_add_up_to_the_whole_batch(self, micro_batch: int) -> None:
        x, y = torch.randn(8, 1, 32, 32).double(), torch.randint(10, (8,))
        model = network()
        plan = plan_for(model)
        et.apply(model.double(), plan)
        losses, gradients = [], []
        for size in (micro_batch, 8):
            model.zero_grad()
            losses.append(accumulate(cross_entropy(model), x, y, size))
            gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
        assert losses[1] == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-12)
        for small, large in zip(*gradients, strict=True):
            torch.testing.assert_close(small, large, rtol=1e-10, atol=1e-14)

    def test_updates_as_they_come_are_the_same_run(self, start: Start, tmp_path: Path) -> None:
        for name, early in (("together", False), ("early", True)):
            start(tmp_path / name, clip_norm=None, update_as_it_comes=early)
        together, early = (read_tensors(tmp_path / name / WEIGHTS)[0] for name in ("together", "early"))
        assert all(torch.equal(tensor, early[key]) for key, tensor in together.items())

    def test_updates_as_they_come_are_refused_where_gradients_add_up(self, start: Start, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="the norm of all gradients is not known"):
            start(tmp_path / "a", update_as_it_comes=True)
        with pytest.raises(PlanError, match="adds up gradients of 3 pictures at a time"):
            start(tmp_path / "b", plan=plan_for(network(), 3), clip_norm=None, update_as_it_comes=True)
        with pytest.raises(DivergedError):
            start(tmp_path / "c", learning_rate=1e30, clip_norm=None, update_as_it_comes=True)

    def test_a_micro_batched_run_is_the_same_run(
        self, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)  # its masks differ with the batches
        runs = [start(tmp_path / str(size), plan=plan_for(network(), size)) for size in (None, 3)]
        for a, b in zip(*(curves(run.epochs) for run in runs), strict=True):
            assert a == pytest.approx(b, rel=1e-4)

    def test_the_plain_comparison_is_ordinary_training(
        self, start: Start, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
        run = start(tmp_path / "out", baseline=True, weight_decay=0.01)
        model = unrestrained(network())
        deep = [p for p in model.parameters() if p.ndim > 1]
        flat = [p for p in model.parameters() if p.ndim == 1]
        optimizer = torch.optim.SGD([{"params": deep, "weight_decay": 0.01}, {"params": flat}], 1.0, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, STEPS, run.settings))
        losses = []
        for epoch in range(EPOCHS):
            total = 0.0
            for x, y in batches(digits.train, BATCH, seed=5, epoch=epoch, settings=VIEWS):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 2.0)
                optimizer.step()
                schedule.step()
                total += loss.item() * len(y)
            losses.append(total / PICTURES)
        assert run.plain is not None
        assert [row.train_loss for row in run.plain.epochs] == pytest.approx(losses, rel=1e-5)

    def test_the_rate_rises_then_falls_to_nothing(self) -> None:
        settings = Settings(learning_rate=0.4, warm_up=0.2)
        rates = [rate_at(step, 50, settings) for step in range(50)]
        assert rates[:10] == pytest.approx([0.04 * (n + 1) for n in range(10)])
        assert rates[10] == 0.4 and all(a > b > 0 for a, b in itertools.pairwise(rates[10:]))
        assert rates[30] == pytest.approx(0.2) and rates[-1] < 0.001
        assert rate_at(0, 1, Settings(learning_rate=0.4)) == 0.4

    def test_it_learns(self, digits: Dataset, costs: Costs, tmp_path: Path) -> None:
        model = network()
        run = train(model, digits, plan_for(model), out=tmp_path / "out", epochs=25, batch_size=BATCH,
                    learning_rate=0.3, costs=costs, augment=False)  # fmt: skip
        assert run.epochs[-1].train_loss < 0.75 * run.epochs[0].train_loss
        assert run.accuracy_after is not None and run.accuracy_after > run.accuracy_before + 0.1


class TestSurroundings:
    def test_the_model_comes_back_trained_and_otherwise_as_it_was(self, start: Start, tmp_path: Path) -> None:
        model = network()
        first, flags = copy.deepcopy(model), [p.requires_grad for p in model.parameters()]
        torch.manual_seed(4)
        expected = torch.rand(3)
        torch.manual_seed(4)
        start(tmp_path / "out", model)
        assert torch.equal(torch.rand(3), expected)
        assert [p.requires_grad for p in model.parameters()] == flags
        assert "forward" not in model.__dict__ and all(p.grad is None for p in model.parameters())
        assert not torch.equal(model[8].weight, first[8].weight)
        assert torch.equal(model[4].running_mean, first[4].running_mean)
        assert torch.equal(model[4].weight, first[4].weight), "a norm's scale learned, though the plan has none"

    def test_who_watches_sees_every_step(self, start: Start, tmp_path: Path) -> None:
        seen: list[object] = []

        class Watch:
            def start(self, title: str, total: int, done: int) -> None:
                seen.append((title, total, done))

            def advance(self) -> None:
                seen.append("step")

            def epoch(self, number: int, row: Epoch) -> None:
                seen.append(number)

            def tell(self, sentence: str) -> None:
                seen.append(sentence)

        start(tmp_path / "out", baseline=True, progress=Watch(),
              on_finish=lambda out, run: seen.append((out, run.status)))  # fmt: skip
        epochs = [entry for n in range(1, EPOCHS + 1) for entry in [*["step"] * 5, n]]
        assert seen == [("planned", STEPS, 0), *epochs, ("plain back-propagation", STEPS, 0), *epochs,
                        (tmp_path / "out", "finished")]  # fmt: skip

    def test_costs_are_measured_unless_given(self, digits: Dataset, tmp_path: Path) -> None:
        model = network()
        plan = plan_for(model, micro_batch=2)
        run = train(model, digits, plan, out=tmp_path / "out", epochs=1, batch_size=BATCH, baseline=True)
        costs = read_run(tmp_path / "out").costs
        assert costs is not None and costs == run.costs and (costs.batch_size, costs.micro_batch) == (BATCH, 2)
        assert costs.planned_measured is not None and costs.plain_measured is not None
        assert costs.planned_measured.kept_bytes < costs.plain_measured.kept_bytes
