"""model, data, Plan -> Run: train as planned, and by plain back-propagation if asked; leave a run folder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import nn

from edgetune.apply import apply, rewrite
from edgetune.cache import Cache
from edgetune.contract import Plan
from edgetune.costs import Costs, costs_of
from edgetune.data import Augment, Dataset, batches
from edgetune.distil import Distil
from edgetune.errors import ModelError, PlanError, RunError
from edgetune.frozen import has_front, integer_front, restore
from edgetune.graph import not_finite
from edgetune.job import Job, OnFinish
from edgetune.loop import Progress, Silent
from edgetune.run import (
    FROZEN,
    PLAN,
    RUN,
    TEACHER,
    DataRef,
    ModelRef,
    Plain,
    Run,
    Settings,
    build,
    check_same,
    device_of,
    digest,
    evaluate,
    fill,
    open_data,
    plan_trained,
    read_run,
    read_tensors,
    versions,
)

CALIBRATED_ON = 256
"""Training pictures, or a few more, that the ranges of an integer part are taken from."""


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
    optimizer: Literal["sgd", "adamw"] = "sgd",
    distil: Distil | None = None,
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
    ever after, and its float weights are let go of (`edgetune.frozen`). With `distil` it also learns from the float
    network that it was (`edgetune.distil`). `clip_norm=None, update_as_it_comes=True` gives
    every parameter its step as soon as its gradient is there: the same training in less memory. `model_name`,
    `model_options`, `weights` and `data_options` (what `load_data` was given) are written down so that the run can be
    loaded and resumed by itself; `costs` are measured unless given; `on_finish(out, run)` is called at the end, to
    write reports.
    Raises Interrupted after Ctrl-C, DivergedError when the loss or a weight is no number, ModelError for a network with
    such weights from the start, PlanError or Refusal when the plan does not fit, RunError when `out` cannot be used.
    """
    settings = _settings(
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, momentum=momentum,
        weight_decay=weight_decay, warm_up=warm_up, clip_norm=clip_norm, seed=seed, baseline=baseline,
        update_as_it_comes=update_as_it_comes, frozen_bits=frozen_bits, optimizer=optimizer, distil=distil,
        cache=cache, augment=data.augment if augment is True else augment or None,
    )  # fmt: skip
    folder = Path(out)
    _refuse(folder, model, plan, settings)
    before = evaluate(model, data.val, len(data.classes), batch_size).accuracy
    front = None if frozen_bits is None else integer_front(model, plan, _to_calibrate(data, model, settings))
    batch = _first_batch(data, model, settings)
    costs = costs or costs_of(model, plan, *batch, plain_measured=baseline, **settings.step)
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
    teacher = None if distil is None else copy.deepcopy(model)
    job = Job(folder, run, plan, data, model, _as_it_was(model, run, plan), progress or Silent(), on_finish, teacher)
    return job.finish(*job.begin(front, batch))


def _as_it_was(model: nn.Module, run: Run, plan: Plan) -> nn.Module:
    """The network that plain back-propagation trains: a copy where the plan rewrites the model's blocks."""
    if not run.plain or not (plan.rewritten() or plan.arithmetic()):
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
    if (name := not_finite(model)) is not None:
        raise ModelError(f"'{name}' has values that are not numbers: load other weights")
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
    plan = plan_trained(folder)
    if digest(plan) != run.plan_digest:
        raise RunError(
            f"'{folder / PLAN}' was edited after the run began: put it back as it was, "
            "or train anew with --plan"
        )
    model = build(run) if model is None else model
    if data is None:
        data = open_data(run)
    check_same(run, data)
    teacher = None
    if run.settings.distil is not None:
        teacher = copy.deepcopy(model)
        fill(teacher, read_tensors(folder / TEACHER)[0], folder / TEACHER)
    job = Job(folder, run, plan, data, model, _as_it_was(model, run, plan), progress or Silent(), on_finish, teacher)
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
