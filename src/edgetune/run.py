"""Run: what happened in one training, and the folder with enough to predict, evaluate, resume and ship from.

    run.json              the Run record; written last when a run starts, so where it is, the rest is too
    plan.json             the Plan, as a person can read it; at the end with what was fitted after the training
    trained.json          the Plan as it was trained, from when the other is fitted until the run has finished
    frozen.safetensors    the frozen part in integers, where the run has one (`edgetune.frozen`)
    teacher.safetensors   the float network that another learns from, where the run has one (`edgetune.distil`)
    weights.safetensors   the whole state_dict, the last good one
    packed.safetensors    the network on kernels of few bits, where it has such layers (`edgetune.packed`)
    *.checkpoint          all that going on needs, in one file, so that no two of its parts can disagree

Every file is replaced whole or not at all.
"""

from __future__ import annotations

import hashlib
import itertools
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationInfo, field_validator
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import nn

from edgetune.apply import rewrite
from edgetune.cache import Cache, CacheUse, Features
from edgetune.contract import Plan
from edgetune.costs import Costs
from edgetune.data import Augment, Dataset, Pictures, Preprocess, batches, load_data, open_picture
from edgetune.distil import Distil
from edgetune.errors import ModelError, RunError
from edgetune.frozen import FrozenPart, restore
from edgetune.graph import evaluating
from edgetune.models import head_classes, load_model, replace_head
from edgetune.record import Record, atomic_write

RUN, PLAN, TRAINED = "run.json", "plan.json", "trained.json"
WEIGHTS, FROZEN = "weights.safetensors", "frozen.safetensors"
TEACHER, PACKED = "teacher.safetensors", "packed.safetensors"
State = dict[str, torch.Tensor]


class Interrupted(RunError):
    """Training was stopped by Ctrl-C; what was reached is saved, and the message says how to go on."""


class Settings(Record):
    """How a network is trained: SGD with momentum, or AdamW, the rate rising over `warm_up` of all steps, then falling
    to zero as a cosine; gradients longer than `clip_norm` are shortened (None: none are); norms and biases don't decay.
    With `update_as_it_comes` a parameter takes its step as soon as its gradient is there, which then goes; the norm of
    all gradients is never known, so `clip_norm` must be None. With `frozen_bits` what is in front of the first layer
    that learns runs in integers. With `distil` the network also learns from the float network that it was."""

    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=0.01, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = Field(default=1e-4, ge=0)
    warm_up: float = Field(default=0.1, ge=0, lt=1)
    clip_norm: float | None = Field(default=2.0, gt=0)
    update_as_it_comes: bool = False
    seed: int = 0
    augment: Augment | None = None
    baseline: bool = False
    cache: Cache | None = None
    frozen_bits: Literal[8] | None = None
    distil: Distil | None = None

    @property
    def step(self) -> dict[str, Any]:
        """What the costs of a step depend on, as `edgetune.costs` takes it."""
        copies = 2 if self.optimizer == "adamw" else 1
        return {"update_as_it_comes": self.update_as_it_comes, "optimizer_copies": copies}

    @field_validator("update_as_it_comes")
    @classmethod
    def _norm_is_not_asked_for(cls, early: bool, others: ValidationInfo) -> bool:
        if early and others.data.get("clip_norm") is not None:
            raise ValueError("the norm of all gradients is not known when the first is used: say clip_norm=None")
        return early


class ModelRef(Record):
    """How to build the network again: a name that `load_model` knows, its options; and its first weights."""

    name: str
    options: dict[str, Any] = {}
    weights: str | None = None


class DataRef(Record):
    """Which pictures were used. `fingerprint` tells if they are still the same, `skipped` were unreadable."""

    source: str
    fingerprint: str
    counts: dict[str, int]
    val_fraction: float | None = None
    limit: int | None = None
    seed: int = 0
    skip_bad_images: bool = False
    skipped: tuple[str, ...] = ()


class Epoch(Record):
    """One pass over the training pictures: mean loss, validation loss and accuracy (0..1), its time."""

    train_loss: float
    val_loss: float
    val_accuracy: float
    ms: float


class Plain(Record):
    """The same training by plain full back-propagation, to compare; `accuracy` is None until it has ended."""

    accuracy: float | None = None
    diverged: bool = False
    epochs: tuple[Epoch, ...] = ()


class PackedFile(Record):
    """The packed network of a run: the size of its file, and its own accuracy (0..1) on the validation pictures."""

    file_bytes: int
    accuracy: float


class Run(Record):
    """One training. `epochs` holds the curves, `versions` what it ran on, accuracies lie between 0 and 1;
    `cached` is what the cache did for the planned training, `frozen` what became of the part in integers, `packed` what
    came of layers of few bits."""

    status: Literal["running", "interrupted", "diverged", "finished"]
    started: str
    model: ModelRef
    classes: tuple[str, ...]
    preprocess: Preprocess
    data: DataRef
    settings: Settings
    plan_digest: str
    versions: dict[str, str]
    accuracy_before: float
    accuracy_after: float | None = None
    epochs: tuple[Epoch, ...] = ()
    plain: Plain | None = None
    costs: Costs | None = None
    cached: CacheUse | None = None
    frozen: FrozenPart | None = None
    packed: PackedFile | None = None


def versions() -> dict[str, str]:
    """What numbers may depend on: the packages, the interpreter, the processor and the number of threads."""
    packages = {name: metadata.version(name) for name in ("edgetune", "torch", "numpy", "pillow")}
    return {
        **packages,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def digest(plan: Plan) -> str:
    """A short hash of what a plan says."""
    return hashlib.sha256(plan.model_dump_json().encode()).hexdigest()[:16]


def fresh_folder(parent: str | Path, stem: str) -> Path:
    """The first of PARENT/stem-1, PARENT/stem-2, ... that does not exist yet."""
    return next(path for n in itertools.count(1) if not (path := Path(parent) / f"{stem}-{n}").exists())


def sweep(folder: Path) -> None:
    """Remove what a kill in the middle of writing leaves behind: halves of files under hidden names."""
    for name in (RUN, PLAN, TRAINED, WEIGHTS, FROZEN, TEACHER, PACKED, "*.checkpoint"):
        for half in folder.glob(f".{name}.*"):
            half.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: State, about: str = "") -> None:
    """Write tensors, and a text about them, as one safetensors file; of weights it is the digest of their plan. Raises
    RunError when it cannot."""
    whole = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    atomic_write(path, safetensors_torch.save(whole, {"about": about}))


def read_tensors(path: Path) -> tuple[State, str]:
    """What `write_tensors` wrote. Raises RunError naming the file when it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return tensors, (file.metadata() or {}).get("about", "")
    except (SafetensorError, OSError, ValueError) as failure:
        raise RunError(f"'{path}' is missing or damaged ({failure}): restore it, or train anew") from failure


@dataclass(frozen=True)
class LoadedRun:
    """A trained network with what its use needs: preprocessing and class names travel with the weights."""

    folder: Path
    run: Run
    plan: Plan
    model: nn.Module

    @property
    def preprocess(self) -> Preprocess:
        return self.run.preprocess

    @property
    def classes(self) -> tuple[str, ...]:
        return self.run.classes


def read_run(path: str | Path) -> Run:
    """The record of a run folder alone. Raises RunError when the folder holds none, or a garbled one."""
    folder = Path(path)
    if not (folder / RUN).is_file():
        raise RunError(f"'{path}' holds no run ({RUN} is missing): give a folder that `edgetune train` left")
    return Run.load(folder / RUN)


def plan_trained(folder: Path) -> Plan:
    """The plan that a run trains by, whether or not the one in its folder is fitted already."""
    return Plan.load(folder / (TRAINED if (folder / TRAINED).is_file() else PLAN))


def load_run(path: str | Path, model: nn.Module | None = None) -> LoadedRun:
    """A run folder with its network, in evaluation mode.

    The network is built again by the name in run.json, unless `model` gives it; it gets the blocks that the plan
    rewrites, and takes the weights.
    Raises RunError when a file is missing, garbled or of another network, ModelError when it cannot be built.
    """
    folder, run = Path(path), read_run(path)
    state, of_plan = read_tensors(folder / WEIGHTS)
    plan = plan_trained(folder)
    if digest(plan) != of_plan:
        plan = Plan.load(folder / PLAN)
    model = build(run) if model is None else model
    rewrite(model, plan)
    restore(model, folder / FROZEN, run.frozen)
    fill(model, state, folder / WEIGHTS)
    return LoadedRun(folder=folder, run=run, plan=plan, model=model.eval())


def build(run: Run) -> nn.Module:
    """The network of a run as it was built for training, before any weights."""
    if not run.model.name:
        raise RunError(
            "the run does not say how its network is made: pass the network itself as `model`, "
            "or train with `model_name`"
        )
    model = load_model(run.model.name, len(run.classes), **run.model.options)
    try:
        fits = head_classes(model) == len(run.classes)
    except ModelError:
        return model
    if not fits:
        replace_head(model, len(run.classes))
    return model


def fill(model: nn.Module, state: State, path: Path) -> None:
    """Put a whole state_dict into `model`; raises RunError unless every key fits."""
    try:
        model.load_state_dict(state)
    except RuntimeError as failure:
        reason = str(failure).strip().splitlines()[-1].strip()
        raise RunError(
            f"'{path}' does not fit the network of its run ({reason}): "
            "build the network as it was when it was trained"
        ) from failure


def open_data(run: Run) -> Dataset:
    """The pictures of a run again. Raises RunError when they have changed, DataError when they are gone."""
    ref = run.data
    data = load_data(
        ref.source,
        run.preprocess,
        val_fraction=ref.val_fraction,
        seed=ref.seed,
        limit=ref.limit,
        skip_bad_images=ref.skip_bad_images,
    )
    check_same(run, data)
    return data


def check_same(run: Run, data: Dataset) -> None:
    """Refuse to go on with other pictures than a run began with."""
    if data.fingerprint != run.data.fingerprint:
        raise RunError(
            f"the pictures of '{run.data.source}' are not those that the run began with: "
            "put them back as they were, or train anew"
        )


class Score(Record):
    """What a network knew: per class, how many pictures it saw and told right; the mean loss of all."""

    seen: tuple[int, ...]
    right: tuple[int, ...]
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of all pictures told right, 0..1."""
        return sum(self.right) / max(sum(self.seen), 1)


def evaluate(
    model: nn.Module, pictures: Pictures, classes: int, batch_size: int = 32, features: Features | None = None
) -> Score:
    """Run `model` over pictures in evaluation mode, from their `features` where there are some.

    Raises ModelError when its head does not fit.
    """
    direct = ((model, x, y) for x, y in batches(pictures, batch_size, shuffle=False))
    seen, right, loss = torch.zeros(classes, dtype=torch.long), torch.zeros(classes, dtype=torch.long), 0.0
    with evaluating(model), torch.no_grad():
        for forward, x, y in direct if features is None else features.in_order():
            logits = forward(x.to(device_of(model))).float().cpu()
            if logits.shape != (len(y), classes):
                raise ModelError(
                    f"the network gives {tuple(logits.shape)} for {len(y)} pictures of "
                    f"{classes} classes: fit its head with replace_head"
                )
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
            seen += torch.bincount(y, minlength=classes)
            right += torch.bincount(y[logits.argmax(1) == y], minlength=classes)
    return Score(seen=tuple(seen.tolist()), right=tuple(right.tolist()), loss=loss / max(len(pictures), 1))


def predict(loaded: LoadedRun, paths: Iterable[str | Path], top: int = 3) -> list[list[tuple[str, float]]]:
    """The `top` classes of each picture with their probabilities, likeliest first. Raises DataError."""
    answers = []
    with evaluating(loaded.model), torch.no_grad():
        for path in paths:
            x = loaded.preprocess.apply(open_picture(path))[None].to(device_of(loaded.model))
            shares, order = loaded.model(x)[0].float().softmax(0).sort(descending=True)
            answers.append(
                [(loaded.classes[i], float(share)) for i, share in zip(order.tolist(), shares)][:top]
            )
    return answers


def device_of(model: nn.Module) -> torch.device:
    """Where a network's parameters live."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
