"""model, data, Plan -> Run: train as planned, and by plain back-propagation if asked; leave a run folder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import nn

from edgetune.apply import Undo, apply, rewrite
from edgetune.cache import FILES, Cache, Sight, open_features
from edgetune.contract import Plan
from edgetune.costs import Costs, costs_of, planned_again, unrestrained
from edgetune.data import Augment, Dataset, batches
from edgetune.errors import DivergedError, ModelError, PlanError, Refusal, RunError
from edgetune.frozen import Front, has_front, install, integer_front, remove, restore
from edgetune.graph import evaluating
from edgetune.loop import Leg, Position, Progress, Silent
from edgetune.run import (
    FROZEN,
    PLAN,
    RUN,
    WEIGHTS,
    DataRef,
    Interrupted,
    ModelRef,
    Plain,
    Run,
    Settings,
    State,
    build,
    check_same,
    device_of,
    digest,
    evaluate,
    fill,
    open_data,
    read_run,
    read_tensors,
    sweep,
    versions,
    write_tensors,
)

PLANNED, PLAIN = "planned.checkpoint", "plain.checkpoint"
CALIBRATED_ON = 256
"""Training pictures, or a few more, that the ranges of an integer part are taken from."""

OnFinish = Callable[[Path, Run], None]


def train(
    model: nn.Module,
    data: Dataset,
    plan: Plan,
    *,
    out: str | Path,
    epochs: int = 10,
    batch_size: int = 32,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    warm_up: float = 0.1,
    clip_norm: float | None = 2.0,
    update_as_it_comes: bool = False,
    seed: int = 0,
    augment: Augment | bool | None = True,
    baseline: bool = False,
    cache: Cache | None = None,
    frozen_bits: Literal[8] | None = None,
    model_name: str = "",
    model_options: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    costs: Costs | None = None,
    data_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    on_finish: OnFinish | None = None,
) -> Run:
    """Train `model` in place as `plan` says and leave a run folder at `out`.

    What a method adds to the network stays there, once it is trained.
    `augment` is True for the data's own views, False or None for none; `baseline` also trains a copy by plain
    full back-propagation, to compare; `cache` keeps what the frozen part gives (without one, as ever, all of the
    network runs in every epoch). With `frozen_bits` the frozen part becomes an integer network, in training and
    ever after, and its float weights are let go of (`edgetune.frozen`). `clip_norm=None, update_as_it_comes=True` gives
    every parameter its step as soon as its gradient is there: the same training in less memory. `model_name`,
    `model_options`, `weights` and `data_options` (what `load_data` was given) are written down so that the run can be
    loaded and resumed by itself; `costs` are measured unless given; `on_finish(out, run)` is called at the end, to
    write reports.
    Raises Interrupted after Ctrl-C, DivergedError when the loss is no number, PlanError or Refusal when the
    plan does not fit, RunError when `out` cannot be used.
    """
    settings = _settings(
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, momentum=momentum,
        weight_decay=weight_decay, warm_up=warm_up, clip_norm=clip_norm, seed=seed, baseline=baseline,
        update_as_it_comes=update_as_it_comes, frozen_bits=frozen_bits,
        cache=cache, augment=data.augment if augment is True else augment or None,
    )  # fmt: skip
    folder = Path(out)
    _refuse(folder, model, plan, settings)
    before = evaluate(model, data.val, len(data.classes), batch_size).accuracy
    front = None if frozen_bits is None else integer_front(model, plan, _to_calibrate(data, model, settings))
    batch = _first_batch(data, model, settings)
    costs = costs or costs_of(model, plan, *batch, plain_measured=baseline, update_as_it_comes=update_as_it_comes)
    origin = None if weights is None else str(weights)
    run = Run(
        status="running",
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=ModelRef(name=model_name, options=dict(model_options or {}), weights=origin),
        data=_reference(data, **(data_options or {})),
        classes=data.classes,
        preprocess=data.preprocess,
        settings=settings,
        plan_digest=digest(plan),
        versions=versions(),
        accuracy_before=before,
        plain=Plain() if baseline else None,
        costs=costs,
        frozen=None if front is None else front.part,
    )
    job = _Job(folder, run, plan, data, model, _as_it_was(model, run, plan), progress or Silent(), on_finish)
    return job.finish(*job.begin(front, batch))


def _as_it_was(model: nn.Module, run: Run, plan: Plan) -> nn.Module:
    """The network that plain back-propagation trains: a copy where the plan rewrites the model's blocks."""
    if not run.plain or not plan.rewritten():
        return model
    _refuse_integers(model)
    return copy.deepcopy(model)


def _refuse_integers(model: nn.Module) -> None:
    if has_front(model):
        raise ModelError("the network has a frozen part in integers from a training before: build it anew, and load "
                         "float weights")


def _refuse(folder: Path, model: nn.Module, plan: Plan, settings: Settings) -> None:
    if (folder / RUN).exists():
        raise RunError(
            f"'{folder}' holds a run already: choose another folder with --out, "
            f"or go on with --resume {folder}"
        )
    if not plan.learned():
        raise PlanError("the plan lets nothing learn: list at least the classifier in `learns`")
    _refuse_integers(model)
    micro = plan.micro_batch or settings.batch_size
    if settings.update_as_it_comes and micro < settings.batch_size:
        raise PlanError(f"the plan adds up gradients of {micro} pictures at a time, so they cannot be used as they "
                        f"come: take a batch of {micro}, or update when all are there")


def _reference(data: Dataset, **options: Any) -> DataRef:
    known = {"source": data.source, "fingerprint": data.fingerprint, "counts": data.counts}
    return DataRef(**known, skipped=data.skipped, **options)


def resume(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    data: Dataset | None = None,
    progress: Progress | None = None,
    on_finish: OnFinish | None = None,
) -> Run:
    """Go on with an interrupted or killed run, to exactly where it would have been without the interruption.

    The network and the pictures are found again by what run.json says, unless they are given.
    Raises RunError when there is nothing to go on with, or pictures, plan or files are not what they were.
    """
    folder, run = Path(path), read_run(path)
    if run.status in _OVER:
        raise RunError(f"run '{path}' {_OVER[run.status]}")
    plan = Plan.load(folder / PLAN)
    if digest(plan) != run.plan_digest:
        raise RunError(
            f"'{folder / PLAN}' was edited after the run began: put it back as it was, "
            "or train anew with --plan"
        )
    model = build(run) if model is None else model
    if data is None:
        data = open_data(run)
    check_same(run, data)
    job = _Job(folder, run, plan, data, model, _as_it_was(model, run, plan), progress or Silent(), on_finish)
    rewritten = rewrite(model, plan)
    front = restore(model, folder / FROZEN, run.frozen)
    return job.finish(apply(model, plan if front is None else front.left_over(plan)), rewritten)


_OVER = {
    "finished": "has finished, so there is nothing to resume: train longer with a new run and more --epochs",
    "diverged": "met a loss that is not a number and would again: train anew with a lower --learning-rate",
}


def _first_batch(data: Dataset, model: nn.Module, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = next(batches(data.train, settings.batch_size, seed=settings.seed, settings=settings.augment))
    return x.to(device_of(model)), y.to(device_of(model))


def _to_calibrate(data: Dataset, model: nn.Module, settings: Settings) -> list[torch.Tensor]:
    """Training pictures as they are first seen, in batches x (n c h w)."""
    seen = batches(data.train, settings.batch_size, seed=settings.seed, settings=settings.augment)
    return [x.to(device_of(model)) for x, _ in islice(seen, -(-CALIBRATED_ON // settings.batch_size))]


def _settings(**given: Any) -> Settings:
    try:
        return Settings(**given)
    except ValidationError as failure:
        first = failure.errors()[0]
        name, why = first["loc"][0], first["msg"]
        raise RunError(f"{name} cannot be {first['input']} ({why}): give another value") from failure


@dataclass
class _Job:
    """A run under way: what it works with, and the folder it writes to; `plain_model` has no rewritten blocks."""

    folder: Path
    run: Run
    plan: Plan
    data: Dataset
    model: nn.Module
    plain_model: nn.Module
    progress: Progress
    on_finish: OnFinish | None

    def note(self, **changes: Any) -> None:
        """Change the record, and the file with it."""
        self.run = self.run.model_copy(update=changes)
        self.run.save(self.folder / RUN)

    def begin(self, front: Front | None, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[Undo, Undo]:
        """Make the model train as planned, and write the folder as it is before the first step.

        Returns what takes the plan off the model, and what gives back its blocks. Where anything fails the model is as
        it was.
        """
        with ExitStack() as back:
            rewritten, plan = rewrite(self.model, self.plan), self.plan
            back.callback(rewritten)
            floats, plain = self.model.state_dict(), self.plain_model.state_dict()
            if front is not None:
                plan = front.left_over(plan)
                install(self.model, front)
                back.callback(self._float_again, floats)
                self._foresee_again(plan, batch)
            undo = apply(self.model, plan)
            back.callback(undo)
            self._write_first(front, plain)
            back.pop_all()
        return undo, rewritten

    def _foresee_again(self, plan: Plan, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        """The costs of the planned step, now that its network is in integers."""
        if self.run.costs is not None:
            costs = planned_again(self.run.costs, self.model, plan, *batch, self.run.settings.update_as_it_comes)
            self.run = self.run.model_copy(update={"costs": costs})

    def _write_first(self, front: Front | None, plain: State) -> None:
        """run.json comes last, so where it is, all is."""
        self.plan.save(self.folder / PLAN)
        if front is not None:
            front.save(self.folder / FROZEN)
        state, start = self.model.state_dict(), Position().model_dump_json()
        write_tensors(self.folder / WEIGHTS, state)
        for checkpoint, first in ((PLANNED, state), *([(PLAIN, plain)] if self.run.plain else [])):
            write_tensors(self.folder / checkpoint, {f"model/{name}": t for name, t in first.items()}, start)
        self.note()

    def _float_again(self, floats: State) -> None:
        remove(self.model)
        self.model.load_state_dict(floats)

    def finish(self, undo: Undo, rewritten: Undo) -> Run:
        """Train both networks from their checkpoints to the end; `undo` takes the plan off the model.

        After an interruption `rewritten` gives back its blocks too, for a resumption with this very model; but not
        where integers are in front of them.
        """
        device = device_of(self.model)
        sweep(self.folder)
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                try:
                    self._train_planned()
                finally:
                    undo()
                    self.model.eval().zero_grad()
                if self.run.plain:
                    self._train_plain(self.run.plain)
        except KeyboardInterrupt as stop:
            if not has_front(self.model):
                rewritten()
            self.note(status="interrupted")
            way_out = f"`edgetune train --resume {self.folder}`"
            raise Interrupted(f"training was stopped and is saved: go on with {way_out}") from stop
        except DivergedError as failure:
            self.note(status="diverged")
            fill(self.model, read_tensors(self.folder / WEIGHTS)[0], self.folder / WEIGHTS)
            rate = self.run.settings.learning_rate
            raise DivergedError(
                f"{failure}: train anew with a --learning-rate below {rate:g}; "
                f"the last good weights are in '{self.folder}'"
            ) from failure
        self.note(status="finished")
        for file in (self.folder / PLANNED, self.folder / PLAIN, *self.folder.glob(FILES)):
            if file.is_file():
                file.unlink()
        if self.on_finish is not None:
            self.on_finish(self.folder, self.run)
        return self.run

    def _leg(self, model: nn.Module, checkpoint: str, saved: Callable[[Position], None]) -> Leg:
        settings = self.run.settings
        leg = Leg(
            model,
            self.data,
            settings,
            self.plan.micro_batch or settings.batch_size,
            self.folder / checkpoint,
            saved,
        )
        leg.load()
        return leg

    def _train_planned(self) -> None:
        def saved(at: Position) -> None:
            write_tensors(self.folder / WEIGHTS, self.model.state_dict())
            self.note(epochs=at.epochs, cached=leg.cached() or self.run.cached)

        leg = self._leg(self.model.train(), PLANNED, saved)
        self.note(status="running")
        self._open_features(leg)
        try:
            leg.run("planned", self.progress)
        finally:
            for features in (leg.features, leg.val_features):
                if features is not None:
                    features.close()
        saved(leg.at)  # a kill may have come between the last checkpoint and its weights
        self.note(epochs=leg.at.epochs, accuracy_after=leg.at.epochs[-1].val_accuracy)

    def _open_features(self, leg: Leg) -> None:
        """Let the leg train from features where the run has a cache and something frozen to keep."""
        settings, micro = self.run.settings, min(leg.micro_batch, self.run.settings.batch_size)
        if settings.cache is None or len(leg.at.epochs) == settings.epochs:
            return
        tell, size = self.progress.tell, settings.batch_size
        val = Sight(settings.seed, None, size, min(size, len(self.data.val)))
        sight = Sight(settings.seed, settings.augment, size, min(micro, len(self.data.train)))
        common = self.model, self.data, settings.cache
        try:
            with evaluating(self.model):
                leg.val_features = open_features(*common, val, self.folder, tell, "val")
            taken = leg.val_features.room_bytes
            leg.features = open_features(*common, sight, self.folder, tell, "train", taken)
        except Refusal as reason:
            tell(f"nothing is cached: {reason}")
            if leg.val_features is not None:
                leg.val_features.close()
                leg.val_features = None
            return
        if settings.augment is not None and settings.cache.views >= settings.epochs:
            tell(f"with {settings.cache.views} views no picture is seen twice in {settings.epochs} epochs: "
                 "take fewer views or more epochs")
        if self.run.cached is not None:  # resumed: go on counting
            so_far = {"found": self.run.cached.found, "computed": self.run.cached.computed}
            leg.features.use = leg.features.use.model_copy(update=so_far)

    def _train_plain(self, plain: Plain) -> None:
        """The same data, steps and rates for stock autograd: all parameters learn, norms stay frozen."""

        def saved(at: Position) -> None:
            self.note(plain=plain.model_copy(update={"epochs": at.epochs}))

        model = copy.deepcopy(self.plain_model)
        if has_front(model):
            remove(model)
        leg = self._leg(unrestrained(model), PLAIN, saved)
        try:
            leg.run("plain back-propagation", self.progress)
            accuracy = leg.at.epochs[-1].val_accuracy
            self.note(plain=plain.model_copy(update={"epochs": leg.at.epochs, "accuracy": accuracy}))
        except DivergedError:  # a comparison that fails is a result, and no reason to lose the run
            self.note(plain=plain.model_copy(update={"epochs": leg.at.epochs, "diverged": True}))
