"""A run under way: a model trains as planned, then by plain back-propagation if asked; the folder follows every epoch.

Whatever stops it, what was reached is in the folder, from which `edgetune.train.resume` goes on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgetune.apply import Undo, apply, rewrite
from edgetune.cache import FILES, Sight, open_features
from edgetune.contract import Plan
from edgetune.costs import planned_again, unrestrained
from edgetune.data import Dataset, batches
from edgetune.distil import distilled
from edgetune.errors import DivergedError, ModelError, Refusal
from edgetune.fit import fit
from edgetune.frozen import Front, has_front, install, remove
from edgetune.graph import evaluating
from edgetune.loop import Leg, Loss, Position, Progress
from edgetune.packed import PackedNetwork, pack
from edgetune.run import (
    FROZEN,
    PACKED,
    PLAN,
    RUN,
    TEACHER,
    TRAINED,
    WEIGHTS,
    Interrupted,
    PackedFile,
    Plain,
    Run,
    State,
    device_of,
    digest,
    evaluate,
    fill,
    read_tensors,
    sweep,
    write_tensors,
)

PLANNED, PLAIN = "planned.checkpoint", "plain.checkpoint"
FITTED_ON = 1024
"""Training pictures, or a few more, that settings and norms are fitted to."""
OnFinish = Callable[[Path, Run], None]


@dataclass
class Job:
    """A run under way: what it works with, and the folder it writes to; `plain_model` has no rewritten blocks."""

    folder: Path
    run: Run
    plan: Plan
    data: Dataset
    model: nn.Module
    plain_model: nn.Module
    progress: Progress
    on_finish: OnFinish | None
    teacher: nn.Module | None = None

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
            costs = planned_again(self.run.costs, self.model, plan, *batch, **self.run.settings.step)
            self.run = self.run.model_copy(update={"costs": costs})

    def _write_first(self, front: Front | None, plain: State) -> None:
        """run.json comes last, so where it is, all is."""
        self.plan.save(self.folder / PLAN)
        if self.teacher is not None:
            write_tensors(self.folder / TEACHER, self.teacher.state_dict())
        if front is not None:
            front.save(self.folder / FROZEN)
        state, start = self.model.state_dict(), Position().model_dump_json()
        write_tensors(self.folder / WEIGHTS, state, self.run.plan_digest)
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
                fitted = self._fit()
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
        self._pack()
        self.note(status="finished", **fitted)
        for file in (self.folder / PLANNED, self.folder / PLAIN, self.folder / TRAINED, *self.folder.glob(FILES)):
            if file.is_file():
                file.unlink()
        if self.on_finish is not None:
            self.on_finish(self.folder, self.run)
        return self.run

    def _fit(self) -> dict[str, Any]:
        """Fit the trained network where its methods ask for it; returns what changes in the record.

        The plan it was trained by is written first, and last the weights, which say whose they are: a run that is
        stopped in between is loaded, and gone on with, as one that was just trained.
        """
        size, trained = self.run.settings.batch_size, self.plan
        self.plan = fit(self.model, trained, self._to_fit)
        if self.plan is trained:
            return {}
        trained.save(self.folder / TRAINED)
        self.plan.save(self.folder / PLAN)
        write_tensors(self.folder / WEIGHTS, self.model.state_dict(), digest(self.plan))
        score = evaluate(self.model, self.data.val, len(self.data.classes), size)
        return {"plan_digest": digest(self.plan), "accuracy_after": score.accuracy}

    def _to_fit(self) -> Iterator[torch.Tensor]:
        """Training pictures as they are, in batches x (n c h w)."""
        size = self.run.settings.batch_size
        some = islice(batches(self.data.train, size, seed=self.run.settings.seed), -(-FITTED_ON // size))
        return (x.to(device_of(self.model)) for x, _ in some)

    def _pack(self) -> None:
        """Leave the packed network beside the weights, where the plan has layers that can be packed."""
        if all(method.unpacked() is not None for method in self.plan.arithmetic().values()):
            return
        try:
            packed = pack(copy.deepcopy(self.model).cpu(), self.plan.input_shape)
        except (ModelError, Refusal) as reason:
            self.progress.tell(f"there is no {PACKED}: {reason}")
            return
        packed.save(self.folder / PACKED)
        classes, batch_size = len(self.data.classes), self.run.settings.batch_size
        score = evaluate(PackedNetwork(packed), self.data.val, classes, batch_size)
        self.note(packed=PackedFile(file_bytes=(self.folder / PACKED).stat().st_size, accuracy=score.accuracy))

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
            write_tensors(self.folder / WEIGHTS, self.model.state_dict(), self.run.plan_digest)
            self.note(epochs=at.epochs, cached=leg.cached() or self.run.cached)

        leg = self._leg(self.model.train(), PLANNED, saved)
        leg.loss_of = self._distilled()
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

    def _distilled(self) -> Loss | None:
        settings = self.run.settings.distil
        if settings is None or self.teacher is None:
            return None
        shape = self.plan.input_shape[1:]
        return distilled(self.model, self.teacher, settings, torch.zeros(1, *shape, device=device_of(self.model)))

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
