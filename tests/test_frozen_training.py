"""Training with the frozen part in integers: it goes on, answers and composes as any training does."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import edgetune as et
from edgetune import loop
from edgetune.cache import Cache
from edgetune.contract import Method
from edgetune.costs import Costs, costs_of
from edgetune.data import Augment, Dataset, Preprocess, load_data
from edgetune.errors import ModelError, Refusal, RunError
from edgetune.frozen import NAME, has_front
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.methods.backward.sparse_update import SparseUpdate
from edgetune.plan import last_layers
from edgetune.run import FROZEN, WEIGHTS, Interrupted, Run, evaluate, load_run, read_run, read_tensors
from edgetune.train import resume, train
from nets import Residual, scramble

PICTURES, BATCH, EPOCHS = 38, 8, 3
SAMPLE = (BATCH, 3, 16, 16)
VIEWS = Augment(flip=True, crop_scale=0.7, shift_px=2)
METHODS: list[Method] = [Exact(), PooledChain(patch_px=2), SparseUpdate()]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data("digits", Preprocess(size=SAMPLE[2:]), limit=PICTURES)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = scramble(Residual())
    model.head = nn.Linear(8, 10)
    return model.eval()


def plan_of(model: nn.Module, last: int = 2, method: Method | None = None) -> et.Plan:
    return last_layers(et.trace(model, torch.zeros(SAMPLE)), last, method or PooledChain(patch_px=2))


@pytest.fixture(scope="module")
def costs() -> Costs:
    """Predicted only, and of the float network."""
    model = network()
    return costs_of(model, plan_of(model), torch.zeros(SAMPLE), torch.zeros(BATCH, dtype=torch.long), measured=False)


Start = Callable[..., Run]


@pytest.fixture
def start(digits: Dataset, costs: Costs) -> Start:
    def begin(
        out: Path, model: nn.Module | None = None, last: int = 2, method: Method | None = None, **changes: object
    ) -> Run:
        model = network() if model is None else model
        settings = {"epochs": EPOCHS, "batch_size": BATCH, "learning_rate": 0.05, "augment": None, "seed": 5}
        plan = plan_of(model, last, method)
        return train(model, digits, plan, out=out, costs=costs, **{"frozen_bits": 8, **settings, **changes})

    return begin


class Stop(loop.Silent):
    """Raises at the n-th step that it sees."""

    def __init__(self, step: int, stop: type[BaseException]) -> None:
        self.left, self.stop = step, stop

    def advance(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.stop


class Killed(BaseException):
    """Stands for a kill: nobody catches it, so nothing more is written."""


def same(a: Path, b: Path) -> bool:
    """Whether two runs left the same weights, bit for bit, and the same losses, planned and plain."""
    states, runs = [read_tensors(path / WEIGHTS)[0] for path in (a, b)], [read_run(path) for path in (a, b)]
    rows = [(*run.epochs, *(run.plain.epochs if run.plain else ())) for run in runs]
    losses = [[(row.train_loss, row.val_loss) for row in each] for each in rows]
    return losses[0] == losses[1] and states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


class TestTheRun:
    @pytest.mark.parametrize("method", METHODS, ids=lambda method: method.method)
    def test_answers_as_at_the_end_of_training(
        self, start: Start, digits: Dataset, tmp_path: Path, method: Method
    ) -> None:
        model = network()
        run = start(tmp_path / "run", model, method=method)
        loaded = load_run(tmp_path / "run", network(seed=9))
        x = torch.randn(5, *SAMPLE[1:])
        with torch.no_grad():
            assert torch.equal(loaded.model(x), model(x))
        score = evaluate(loaded.model, digits.val, 10, BATCH)
        assert (score.loss, score.accuracy) == (run.epochs[-1].val_loss, run.epochs[-1].val_accuracy)
        again = load_run(tmp_path / "run", model).model  # one that has its integers already
        with torch.no_grad():
            assert torch.equal(again(x), loaded.model(x))

    def test_float_weights_are_gone_while_it_trains(self, start: Start, tmp_path: Path) -> None:
        model, alive = network(), list[int]()
        storages = [weakref.ref(p.untyped_storage()) for part in (model.stem, model.one, model.two)
                    for p in part.parameters()]  # fmt: skip

        class Look(loop.Silent):
            def advance(self) -> None:
                gc.collect()
                alive.append(sum(storage() is not None for storage in storages))

        start(tmp_path / "run", model, epochs=1, progress=Look(), cache=Cache(), baseline=True)
        assert len(storages) == 16 and set(alive) == {0}

    def test_says_what_became_of_the_frozen_part(self, start: Start, tmp_path: Path) -> None:
        run = start(tmp_path / "run")
        assert run.settings.frozen_bits == 8 and run.frozen is not None
        assert (run.frozen.bits, run.frozen.layer, run.frozen.shape) == (8, "relu", (6, 16, 16))
        assert run.frozen.integer_bytes < 0.35 * run.frozen.float_bytes  # filters this small are half scales
        assert read_run(tmp_path / "run") == run

    def test_costs_are_those_of_the_network_in_integers(self, start: Start, costs: Costs, tmp_path: Path) -> None:
        run = start(tmp_path / "run")
        assert run.costs is not None and run.frozen is not None
        saved = costs.planned_predicted.param_bytes - run.costs.planned_predicted.param_bytes
        norms = 2 * 4 * 4 * 6  # running statistics of four norms are no parameters
        assert saved == run.frozen.float_bytes - norms - run.frozen.integer_bytes
        assert run.costs.plain_predicted == costs.plain_predicted

    def test_is_another_than_in_float_but_as_good(self, start: Start, tmp_path: Path) -> None:
        runs = [start(tmp_path / str(bits), frozen_bits=bits) for bits in (8, None)]
        losses = [run.epochs[-1].train_loss for run in runs]
        assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)
        assert not (tmp_path / "None" / FROZEN).exists() and runs[1].frozen is None

    def test_plain_back_propagation_is_in_float(self, start: Start, tmp_path: Path) -> None:
        runs = [start(tmp_path / str(bits), frozen_bits=bits, baseline=True) for bits in (8, None)]
        rows = [[(row.train_loss, row.val_loss) for row in run.plain.epochs] for run in runs if run.plain]
        assert rows[0] == rows[1] and len(rows[0]) == EPOCHS


class TestGoingOn:
    @pytest.mark.parametrize("step", [1, 7, 15, 20])
    @pytest.mark.parametrize("stop", [KeyboardInterrupt, Killed], ids=["ctrl-c", "kill"])
    def test_after_a_stop_between_steps(
        self, start: Start, digits: Dataset, tmp_path: Path, step: int, stop: type[BaseException]
    ) -> None:
        start(tmp_path / "whole", augment=VIEWS, baseline=True)
        with pytest.raises((Interrupted, Killed)):
            start(tmp_path / "cut", augment=VIEWS, baseline=True, progress=Stop(step, stop))
        load_run(tmp_path / "cut", network(seed=9))
        resume(tmp_path / "cut", model=network(seed=9), data=digits)
        assert same(tmp_path / "cut", tmp_path / "whole")
        assert (tmp_path / "cut" / FROZEN).read_bytes() == (tmp_path / "whole" / FROZEN).read_bytes()

    def test_with_the_network_that_was_interrupted(self, start: Start, digits: Dataset, tmp_path: Path) -> None:
        start(tmp_path / "whole")
        model = network()
        with pytest.raises(Interrupted):
            start(tmp_path / "cut", model, progress=Stop(7, KeyboardInterrupt))
        resume(tmp_path / "cut", model=model, data=digits)
        assert same(tmp_path / "cut", tmp_path / "whole")

    @pytest.mark.parametrize("write", range(1, 6))
    def test_nothing_is_lost_where_the_first_files_cannot_be_written(
        self, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int
    ) -> None:
        """Plan, integers, weights, checkpoint, run.json: the model is as it was."""
        model, left = network(), [write]
        x = torch.randn(3, *SAMPLE[1:])
        wanted, sync = model(x), os.fsync

        def full(file: int) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(28, "No space left on device")
            sync(file)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(RunError, match="No space left"):
                start(tmp_path / "run", model)
        assert not has_front(model) and torch.equal(model(x), wanted)
        assert not (tmp_path / "run" / "run.json").exists()

    @pytest.mark.parametrize("damage", ["gone", "short", "other"])
    def test_not_from_a_damaged_or_foreign_file(
        self, start: Start, digits: Dataset, tmp_path: Path, damage: str
    ) -> None:
        with pytest.raises(Interrupted):
            start(tmp_path / "cut", progress=Stop(7, KeyboardInterrupt))
        file = tmp_path / "cut" / FROZEN
        if damage == "gone":
            file.unlink()
        elif damage == "short":
            file.write_bytes(file.read_bytes()[:-9])
        else:
            start(tmp_path / "other", network(seed=3))
            file.write_bytes((tmp_path / "other" / FROZEN).read_bytes())
        for use in (
            lambda: load_run(tmp_path / "cut", network(seed=9)),
            lambda: resume(tmp_path / "cut", model=network(seed=9), data=digits),
        ):
            with pytest.raises(RunError, match=f"{FROZEN}'.*train anew"):
                use()


class TestWithACache:
    @pytest.mark.parametrize("keep", ["memory", "disk"])
    def test_is_as_without(self, start: Start, tmp_path: Path, keep: str) -> None:
        for name, cache in (("with", Cache(keep=keep)), ("without", None)):
            start(tmp_path / name, cache=cache)
        assert same(tmp_path / "with", tmp_path / "without")
        use = read_run(tmp_path / "with").cached
        assert use is not None and use.layers == (NAME,) and use.found > 0

    def test_never_finds_what_the_float_network_kept(self, start: Start, tmp_path: Path) -> None:
        cache = Cache(keep="disk", folder=str(tmp_path / "cache"), codec="int8")
        uses = [start(tmp_path / f"run-{i}", frozen_bits=bits, cache=cache).cached
                for i, bits in enumerate((None, 8, None, 8))]  # fmt: skip
        assert [use.computed if use else None for use in uses] == [PICTURES, PICTURES, 0, 0]
        assert len(list((tmp_path / "cache").iterdir())) == 4, "to train and to validate, in float and in integers"

    def test_goes_on_after_a_stop(self, start: Start, digits: Dataset, tmp_path: Path) -> None:
        cache = Cache(keep="disk", views=2)
        start(tmp_path / "whole", cache=cache, augment=VIEWS)
        with pytest.raises(Interrupted):
            start(tmp_path / "cut", cache=cache, augment=VIEWS, progress=Stop(8, KeyboardInterrupt))
        resume(tmp_path / "cut", model=network(seed=9), data=digits)
        assert same(tmp_path / "cut", tmp_path / "whole")


class TestRefusals:
    def test_leave_nothing_behind(self, start: Start, tmp_path: Path) -> None:
        model = network()
        with pytest.raises(Refusal, match=r"layer 'stem.0' learns.*: let fewer layers learn"):
            start(tmp_path / "run", model, last=6)
        assert not (tmp_path / "run").exists() and not has_front(model)

    def test_other_bits(self, start: Start, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="frozen_bits cannot be 4"):
            start(tmp_path / "run", frozen_bits=4)

    @pytest.mark.parametrize("bits", [8, None])
    def test_a_network_that_has_its_integers(self, start: Start, tmp_path: Path, bits: int | None) -> None:
        model = network()
        start(tmp_path / "run", model)
        with pytest.raises(ModelError, match="has a frozen part in integers from a training before: build it anew"):
            train(model, load_data("digits", Preprocess(size=SAMPLE[2:]), limit=PICTURES), plan_of(model),
                  out=tmp_path / "again", frozen_bits=bits)  # fmt: skip
