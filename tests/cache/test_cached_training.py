"""Training from cached features is training: bit for bit, wherever it is stopped and whatever becomes of the file."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from edgetune import loop
from edgetune.apply import apply
from edgetune.cache import Cache, Features, Sight, open_features
from edgetune.codecs import FIXED, PLAIN
from edgetune.contract import Method
from edgetune.costs import Costs, costs_of
from edgetune.data import Augment, Dataset, Preprocess, load_data
from edgetune.errors import RunError
from edgetune.graph import trace
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.gradient_filter import GradientFilter
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.plan import last_layers
from edgetune.run import WEIGHTS, Interrupted, Run, evaluate, read_run, read_tensors
from edgetune.train import resume, train
from nets import Inverted, Opaque, Residual, block, scramble

PICTURES, BATCH, EPOCHS = 38, 8, 4
SAMPLE = (BATCH, 3, 16, 16)
VIEWS = Augment(flip=True, crop_scale=0.7, shift_px=2)
EVERY_VIEW = Cache(views=EPOCHS)
"""Shows what training without a cache shows; on its own it never finds anything again."""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data("digits", Preprocess(size=SAMPLE[2:]), limit=PICTURES)


class Dropping(nn.Module):
    """Dropout in front of what learns, and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = block(3, 6, stride=2), block(6, 6), block(6, 8)
        self.early, self.late, self.head = nn.Dropout(0.2), nn.Dropout(0.4), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.late(self.c(self.b(self.early(self.a(x)))).mean((2, 3))))


def network(net: Callable[[], nn.Module] = Residual, seed: int = 0) -> nn.Module:
    """A network for ten classes, with norms that have seen something."""
    torch.manual_seed(seed)
    model = scramble(net())
    parts = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    owner, _, leaf = parts[-1].rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Linear(model.get_submodule(parts[-1]).in_features, 10))
    return model.eval()


@pytest.fixture(scope="module")
def costs() -> Costs:
    """Predicted only, and once: what is measured is no matter of these tests."""
    model, x = network(), torch.zeros(SAMPLE)
    plan = last_layers(trace(model, x), 1, Exact())
    return costs_of(model, plan, x, torch.zeros(BATCH, dtype=torch.long), measured=False)


Start = Callable[..., Run]


@pytest.fixture
def start(digits: Dataset, costs: Costs) -> Start:
    def begin(
        out: Path, cache: Cache | None = None, *, model: nn.Module | None = None, last: int = 2,
        method: Method | None = None, micro_batch: int | None = None, **changes: object,
    ) -> Run:  # fmt: skip
        model = network() if model is None else model
        plan = last_layers(trace(model, torch.zeros(SAMPLE)), last, method or PooledChain(patch_px=2))
        plan = plan.model_copy(update={"micro_batch": micro_batch})
        settings = {"epochs": EPOCHS, "batch_size": BATCH, "learning_rate": 0.05, "augment": None, "seed": 5}
        return train(model, digits, plan, out=out, costs=costs, cache=cache, **{**settings, **changes})

    return begin


class Watch(loop.Silent):
    """Keeps what is told; stops at the n-th step that it sees, if asked."""

    def __init__(self, step: int = 0, stop: type[BaseException] = KeyboardInterrupt) -> None:
        self.left, self.stop, self.told = step, stop, list[str]()

    def advance(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.stop

    def tell(self, sentence: str) -> None:
        self.told.append(sentence)


class Killed(BaseException):
    """Stands for a kill: nobody catches it, so nothing more is written."""


def same(a: Path, b: Path) -> bool:
    """Whether two run folders hold the same weights, bit for bit, and the same losses."""
    states, runs = [read_tensors(path / WEIGHTS)[0] for path in (a, b)], [read_run(path) for path in (a, b)]
    losses = [[(row.train_loss, row.val_loss) for row in run.epochs] for run in runs]
    return losses[0] == losses[1] and all(torch.equal(states[0][name], states[1][name]) for name in states[0])


class TestBitForBit:
    @pytest.mark.parametrize("net", [Residual, Inverted, Opaque, Dropping], ids=lambda net: net.__name__)
    @pytest.mark.parametrize("method", [Exact(), PooledChain(patch_px=2), GradientFilter(patch_px=2)],
                             ids=lambda method: method.method)  # fmt: skip
    @pytest.mark.parametrize("last", [1, 2])
    def test_networks_and_methods(
        self, start: Start, tmp_path: Path, net: type[nn.Module], method: Method, last: int
    ) -> None:
        for name, cache in (("with", Cache()), ("without", None)):
            run = start(tmp_path / name, cache, model=network(net), method=method, last=last)
        assert same(tmp_path / "with", tmp_path / "without")
        use = read_run(tmp_path / "with").cached
        assert use is not None and use.found > 0 and run.cached is None

    @pytest.mark.parametrize("keep", ["memory", "disk"])
    @pytest.mark.parametrize("micro_batch", [1, 3, 4, 8, 100])
    def test_micro_batches(self, start: Start, tmp_path: Path, keep: str, micro_batch: int) -> None:
        for name, cache in (("with", Cache(keep=keep)), ("without", None)):
            start(tmp_path / name, cache, micro_batch=micro_batch)
        assert same(tmp_path / "with", tmp_path / "without")
        use = read_run(tmp_path / "with").cached
        assert use is not None and use.found > 0

    @pytest.mark.parametrize("batch_size", [1, 7, 38, 50])
    def test_batches_with_a_small_one_at_the_end(self, start: Start, tmp_path: Path, batch_size: int) -> None:
        for name, cache in (("with", Cache()), ("without", None)):
            start(tmp_path / name, cache, batch_size=batch_size)
        assert same(tmp_path / "with", tmp_path / "without")

    def test_channels_last(self, start: Start, tmp_path: Path) -> None:
        for name, cache in (("with", Cache()), ("without", None)):
            start(tmp_path / name, cache, model=network().to(memory_format=torch.channels_last))
        assert same(tmp_path / "with", tmp_path / "without")

    def test_random_views_that_are_all_kept(self, start: Start, tmp_path: Path) -> None:
        for name, cache in (("with", EVERY_VIEW), ("without", None)):
            start(tmp_path / name, cache, augment=VIEWS, progress=Watch())
        assert same(tmp_path / "with", tmp_path / "without")

    def test_several_values_that_cross(self, start: Start, tmp_path: Path) -> None:
        for name, cache in (("with", Cache(keep="disk")), ("without", None)):
            start(tmp_path / name, cache, model=network(Inverted), last=2)
        use = read_run(tmp_path / "with").cached
        assert same(tmp_path / "with", tmp_path / "without")
        assert use is not None and use.layers == ("stem.2", "mul")


class TestValidation:
    def test_measures_the_network_itself_whatever_the_codec(self, start: Start, tmp_path: Path) -> None:
        """Also where dropout, which is still in evaluation, lets more of the network be kept."""
        for net in (Residual, Dropping, Opaque):
            run = start(tmp_path / net.__name__, Cache(codec="int8"), model=network(net))
            model = network(net)
            model.load_state_dict(read_tensors(tmp_path / net.__name__ / WEIGHTS)[0])
            score = evaluate(model, load_data("digits", run.preprocess, limit=PICTURES).val, 10, BATCH)
            assert (run.epochs[-1].val_loss, run.epochs[-1].val_accuracy) == (score.loss, score.accuracy)

    def test_finds_its_pictures_again(self, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        opened = []

        def spy(*given: object) -> Features:
            opened.append(open_features(*given))  # type: ignore[arg-type]
            return opened[-1]

        monkeypatch.setattr(importlib.import_module("edgetune.job"), "open_features", spy)
        start(tmp_path / "out", Cache(keep="disk"))
        val = opened[0].use
        assert (val.found, val.computed) == ((EPOCHS - 1) * 32, 32 + EPOCHS * 6)


class TestViews:
    def test_epochs_see_them_in_turn(self, start: Start, tmp_path: Path) -> None:
        """Two views kept, or the third epoch's made equal to the first's: the same training."""
        start(tmp_path / "kept", Cache(views=2), augment=VIEWS)
        start(tmp_path / "small", Cache(views=2, size_bytes=1), augment=VIEWS, progress=Watch())
        start(tmp_path / "all", EVERY_VIEW, augment=VIEWS, progress=Watch())
        assert same(tmp_path / "kept", tmp_path / "small")
        first = [[row.train_loss for row in read_run(tmp_path / name).epochs] for name in ("kept", "all")]
        assert first[0][:2] == first[1][:2] and first[0][2] != first[1][2]

    def test_what_is_found_is_counted(self, start: Start, tmp_path: Path) -> None:
        use = start(tmp_path / "out", Cache(codec="float16", views=3), augment=VIEWS).cached
        assert use is not None
        assert use.validation_bytes == 32 * 4 * 6 * 16 * 16, "the last batch is a small one, and computed"
        assert (use.stored, use.computed, use.found) == (3 * PICTURES, 3 * PICTURES, PICTURES)
        assert use.hit_rate == 0.25 and use.sample_bytes == 2 * 6 * 16 * 16

    def test_pictures_as_they_are_have_one(self, start: Start, tmp_path: Path) -> None:
        use = start(tmp_path / "out", Cache(codec="int8", views=3)).cached
        assert use is not None and (use.stored, use.found) == (PICTURES, (EPOCHS - 1) * PICTURES)

    def test_views_that_never_come_back_are_told(self, start: Start, tmp_path: Path) -> None:
        watch = Watch()
        start(tmp_path / "out", EVERY_VIEW, augment=VIEWS, progress=watch)
        assert watch.told == ["with 4 views no picture is seen twice in 4 epochs: take fewer views or more epochs"]


class TestWhatIsTrainedOn:
    @pytest.mark.parametrize("codec", [name for name, codec in PLAIN.items() if not codec.exact])
    def test_never_depends_on_what_is_kept(self, start: Start, tmp_path: Path, codec: str) -> None:
        """A codec's errors are there from the first epoch on, kept or not; so stopping changes nothing."""
        start(tmp_path / "all", Cache(codec=codec))
        some = 2 * 20 * PLAIN[codec].size((1, 6, 16, 16))  # half of it goes to the pictures to validate
        for name, size, words in (("some", some, "room for 20 of 38"), ("none", 1, "room for 0 of 38")):
            watch = Watch()
            start(tmp_path / name, Cache(codec=codec, size_bytes=size), progress=watch)
            assert len(watch.told) == 1 and words in watch.told[0]
            assert same(tmp_path / "all", tmp_path / name)

    @pytest.mark.parametrize("room", [9, 19, 32])
    def test_what_does_not_fit_is_computed_in_whole_batches(
        self, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
    ) -> None:
        """A cache of half the pictures halves the work, too."""
        model = network()
        plan = last_layers(trace(model, torch.zeros(SAMPLE)), 2, Exact())
        apply(model, plan)
        cache = Cache(codec="int8", size_bytes=room * PLAIN["int8"].size((1, 6, 16, 16)))
        sight, watch, ran = Sight(0, None, BATCH, BATCH), Watch(), list[int]()
        features = open_features(model.train(), digits, cache, sight, tmp_path, watch.tell)
        prefix = features.cut.prefix

        def counted(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            ran.append(len(x))
            return prefix(model, x)

        features.cut = dataclasses.replace(features.cut, prefix=counted)
        outputs = []
        for epoch in range(3):
            ran.clear()
            outputs.append(torch.cat([forward(x) for forward, x, _ in features.batches(epoch)]).detach())
            order = torch.cat([x for _, x, _ in features.batches(epoch)])
            outputs[-1] = outputs[-1][order.argsort()]
            lacking = PICTURES if epoch == 0 else PICTURES - room
            assert ran == [BATCH] * -(-lacking // BATCH)
        assert all(torch.allclose(y, outputs[0], rtol=1e-5, atol=1e-6) for y in outputs)
        assert (features.use.found, features.use.computed) == (2 * room, 3 * PICTURES - 2 * room)

    def test_lossy_codecs_change_little(self, start: Start, tmp_path: Path) -> None:
        losses = {}
        for codec in FIXED:
            run = start(tmp_path / codec, Cache(codec=codec))
            losses[codec] = run.epochs[-1].train_loss
        assert len(set(losses.values())) == len(FIXED)
        assert losses["float16"] == pytest.approx(losses["float32"], rel=1e-4)
        assert losses["int8"] == pytest.approx(losses["float32"], rel=1e-3)
        assert losses["int4"] == pytest.approx(losses["float32"], rel=2e-2)
        assert losses["bounded"] == pytest.approx(losses["float32"], rel=2e-2)

    def test_features_a_codec_cannot_hold_are_refused(self, start: Start, tmp_path: Path) -> None:
        wrong = [("float16", 1e5, "more than the 65504 of float16"), ("int8", 3e38, "not finite"),
                 ("int4", 3e38, "not finite"), ("bounded", 3e38, "not finite")]
        for codec, weight, words in wrong:
            model = network()
            model.stem[1].weight.data.fill_(weight)
            with pytest.raises(RunError, match=f"a picture among '.*{words}.*: keep features with codec float32"):
                start(tmp_path / codec, Cache(codec=codec), model=model)


class TestGoingOn:
    @pytest.fixture(params=[("disk", "int8"), ("memory", "float32")], ids="-".join)
    def cache(self, request: pytest.FixtureRequest) -> Cache:
        return Cache(keep=request.param[0], codec=request.param[1], views=2)

    @pytest.mark.parametrize("step", [1, 5, 13])
    @pytest.mark.parametrize("stop", [KeyboardInterrupt, Killed], ids=["ctrl-c", "kill"])
    def test_after_a_stop_between_steps(
        self, start: Start, digits: Dataset, tmp_path: Path, cache: Cache, step: int, stop: type[BaseException]
    ) -> None:
        start(tmp_path / "whole", cache, augment=VIEWS)
        with pytest.raises((Interrupted, Killed)):
            start(tmp_path / "cut", cache, augment=VIEWS, progress=Watch(step, stop))
        run = resume(tmp_path / "cut", model=network(seed=9), data=digits)
        assert run.settings.cache == cache
        assert same(tmp_path / "cut", tmp_path / "whole")

    @pytest.mark.parametrize("write", [1, 12, 60])
    @pytest.mark.parametrize("stop", [KeyboardInterrupt, Killed], ids=["ctrl-c", "kill"])
    def test_after_a_stop_in_the_middle_of_a_record(
        self, start: Start, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int,
        stop: type[BaseException],
    ) -> None:  # fmt: skip
        cache = Cache(keep="disk", views=2)
        start(tmp_path / "whole", cache, augment=VIEWS)
        count, put = itertools.count(1), os.pwrite

        def cut(file: int, record: bytes, place: int) -> int:
            if next(count) == write:
                put(file, record[: len(record) // 2], place)
                raise stop
            return put(file, record, place)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", cut)
            with pytest.raises((Interrupted, Killed)):
                start(tmp_path / "cut", cache, augment=VIEWS)
        resume(tmp_path / "cut", model=network(seed=9), data=digits, progress=Watch())
        assert same(tmp_path / "cut", tmp_path / "whole")

    def test_what_was_kept_is_found_again(self, start: Start, digits: Dataset, tmp_path: Path) -> None:
        with pytest.raises(Interrupted):
            start(tmp_path / "cut", Cache(keep="disk", codec="int8"), progress=Watch(10))
        use = resume(tmp_path / "cut", model=network(seed=9), data=digits).cached
        assert use is not None and (use.computed, use.found) == (PICTURES, (EPOCHS - 1) * PICTURES)

    @pytest.mark.parametrize("damage", ["bit", "short", "other", "gone", "folder"])
    def test_from_a_damaged_file(self, start: Start, digits: Dataset, tmp_path: Path, damage: str) -> None:
        cache = Cache(keep="disk")
        start(tmp_path / "whole", cache)
        with pytest.raises(Interrupted):
            start(tmp_path / "cut", cache, progress=Watch(7))
        (file,) = (tmp_path / "cut").glob("train-*.cache")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        if damage in ("gone", "folder"):
            file.unlink()
        else:
            file.write_bytes({"bit": content, "short": content[: len(content) // 3], "other": b"x" * 50000}[damage])
        if damage == "folder":
            file.mkdir()
        watch = Watch()
        resume(tmp_path / "cut", model=network(seed=9), data=digits, progress=watch)
        assert same(tmp_path / "cut", tmp_path / "whole")
        words = {"bit": "damaged in places", "other": "damaged in places", "folder": "takes no more features"}
        assert [words[damage] in told for told in watch.told] == [True] if damage in words else len(watch.told) <= 1

    def test_on_a_full_disk_it_computes_and_says_so_once(
        self, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start(tmp_path / "whole", Cache(keep="disk"))
        count, put, watch = itertools.count(1), os.pwrite, Watch()

        def full(file: int, record: bytes, place: int) -> int:
            if next(count) > 9:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return put(file, record, place)

        monkeypatch.setattr(os, "pwrite", full)
        run = start(tmp_path / "full", Cache(keep="disk"), progress=watch)
        assert same(tmp_path / "full", tmp_path / "whole")
        assert len(watch.told) == 1 and "takes no more features (No space left on device)" in watch.told[0]
        assert run.cached is not None and run.cached.stored == 9


class TestNeverStale:
    def test_a_folder_serves_the_same_frozen_part_again(self, start: Start, tmp_path: Path) -> None:
        cache = Cache(keep="disk", codec="float16", folder=str(tmp_path / "kept"), views=2)
        start(tmp_path / "first", cache, augment=VIEWS)
        again = start(tmp_path / "again", cache, augment=VIEWS, learning_rate=0.2).cached
        assert again is not None and again.hit_rate == 1.0
        assert sorted(path.name.partition("-")[0] for path in (tmp_path / "kept").iterdir()) == ["train", "val"]

    def test_whatever_matters_makes_another_file(self, start: Start, digits: Dataset, tmp_path: Path) -> None:
        cache = Cache(keep="disk", folder=str(tmp_path / "kept"))
        heavier = network()
        heavier.stem[0].weight.data[0, 0, 0, 0] += 1e-3
        others = [
            {}, {"model": heavier}, {"last": 3}, {"augment": VIEWS}, {"augment": VIEWS, "seed": 6},
            {"augment": Augment(flip=False)}, {"micro_batch": 4}, {"cache": cache.model_copy(update={"codec": "int8"})},
        ]  # fmt: skip
        for number, changes in enumerate(others, start=1):
            given = {"cache": cache, "epochs": 1, **changes}
            run = start(tmp_path / f"run-{number}", progress=Watch(), **given)
            assert run.cached is not None and run.cached.found == 0
            assert len(list((tmp_path / "kept").glob("train-*"))) == number

    def test_other_pictures_make_another_file(self, costs: Costs, digits: Dataset, tmp_path: Path) -> None:
        cache = Cache(keep="disk", folder=str(tmp_path / "kept"))
        wider = digits.preprocess.model_copy(update={"std": (1.0, 1.0, 1.0)})
        sets = [digits, load_data("digits", digits.preprocess, limit=30), load_data("digits", wider, limit=PICTURES)]
        for number, data in enumerate(sets, start=1):
            model = network()
            plan = last_layers(trace(model, torch.zeros(SAMPLE)), 1, Exact())
            train(model, data, plan, out=tmp_path / str(number), epochs=1, batch_size=BATCH, costs=costs, cache=cache,
                  augment=False)  # fmt: skip
            assert len(list((tmp_path / "kept").glob("train-*"))) == number


class TestSurroundings:
    def test_without_a_frozen_part_nothing_is_cached_and_all_is_as_without(self, start: Start, tmp_path: Path) -> None:
        watch = Watch()
        run = start(tmp_path / "with", Cache(views=1), last=6, augment=VIEWS, progress=watch)
        start(tmp_path / "without", last=6, augment=VIEWS)
        assert same(tmp_path / "with", tmp_path / "without") and run.cached is None
        assert len(watch.told) == 1
        assert watch.told[0].startswith("nothing is cached: layer 'stem.0' learns, and nothing worth keeping lies in")

    def test_the_file_goes_when_the_run_has_finished(self, start: Start, digits: Dataset, tmp_path: Path) -> None:
        with pytest.raises(Interrupted):
            start(tmp_path / "out", Cache(keep="disk"), progress=Watch(4))
        assert len(list((tmp_path / "out").glob("*.cache"))) == 2
        resume(tmp_path / "out", model=network(seed=9), data=digits)
        assert list((tmp_path / "out").glob("*.cache")) == []

    def test_a_baseline_beside_it_is_the_same_with_and_without(self, start: Start, tmp_path: Path) -> None:
        runs = [start(tmp_path / str(n), cache, baseline=True) for n, cache in enumerate((Cache(), None))]
        plain = [run.plain for run in runs]
        assert plain[0] is not None and plain[1] is not None
        assert [e.train_loss for e in plain[0].epochs] == [e.train_loss for e in plain[1].epochs]

    def test_what_the_cache_did_is_still_known_when_the_baseline_was_interrupted(
        self, start: Start, digits: Dataset, tmp_path: Path
    ) -> None:
        with pytest.raises(Interrupted):
            start(tmp_path / "out", Cache(), baseline=True, progress=Watch(5 * EPOCHS + 3))
        before = read_run(tmp_path / "out").cached
        assert before is not None and before.found > 0
        assert resume(tmp_path / "out", model=network(seed=9), data=digits).cached == before

    @pytest.mark.parametrize("wrong", [{"codec": "int3"}, {"views": 0}, {"size_bytes": 0}, {"keep": "tape"}])
    def test_settings_that_make_no_sense(self, wrong: dict[str, object]) -> None:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Cache(**wrong)
