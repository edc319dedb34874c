"""Networks without weights at hand are taught from nothing, once; the temporary folder remembers them.

First with norms that follow their batches, then with frozen ones: a network that only ever trained with batch
statistics sits where the loss is too sharp for any usual learning rate once its norms are frozen, as they are on
the device. An interrupted lesson goes on from its last whole epoch.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from edgetune.bench.cells import cell_key, written_once
from edgetune.data import Augment, Pictures, Preprocess, batches, load_data
from edgetune.models import load_model, load_weights, model_card
from edgetune.models.head import replace_head
from edgetune.record import Record

BATCH = 64


class Cycle(Record):
    """Epochs of SGD under one triangular cycle of the learning rate; `frozen` norms keep their statistics."""

    epochs: int
    peak_rate: float
    frozen: bool


def cycles(free: int, frozen: int) -> tuple[Cycle, ...]:
    """So many epochs with norms that follow their batches, and then with frozen ones."""
    return (
        Cycle(epochs=free, peak_rate=0.1, frozen=False),
        Cycle(epochs=frozen, peak_rate=0.02, frozen=True),
    )


class Lesson(Record):
    """What a network is taught with: pictures of `size` px, in cycles one after the other.

    `data` is a built-in name or a folder below the data folder, of which `limit` pictures are taken. A lesson may come
    `after` another one, whose head is left.
    """

    network: str
    size: int
    cycles: tuple[Cycle, ...] = cycles(4, 2)
    data: str = "cifar10"
    classes: int = 10
    limit: int | None = None
    after: Lesson | None = None

    @property
    def preprocess(self) -> Preprocess:
        """Pictures as the network's card wants them, whole and at this size."""
        card = Preprocess.from_input(model_card(self.network).input)
        return card.model_copy(update={"size": (self.size, self.size), "crop_fraction": 1.0})


def taught(lesson: Lesson, data: Path) -> Path:
    """The file of the network's weights; the first call teaches it, others wait for that.

    Raises DataError where the lesson's pictures are not below `data`.
    """
    path = Path(tempfile.gettempdir()) / f"edgetune-taught-{cell_key(lesson.model_dump())}.safetensors"
    checkpoint = path.with_suffix(".checkpoint")

    def write(partial: Path) -> None:
        os.environ.setdefault("EDGETUNE_DATA", str(data))
        folder = data / lesson.data
        source = folder if folder.is_dir() else lesson.data
        pictures = load_data(source, lesson.preprocess, limit=lesson.limit).train
        model = _beginner(lesson, data)
        teach(model, pictures, lesson.cycles, checkpoint=checkpoint, say=_say(lesson))
        state = model.state_dict().items()
        save_file({key: value.contiguous(memory_format=torch.contiguous_format) for key, value in state}, partial)

    written_once(path, write)
    checkpoint.unlink(missing_ok=True)
    return path


def _beginner(lesson: Lesson, data: Path) -> nn.Module:
    torch.manual_seed(0)
    if lesson.after is None:
        return load_model(lesson.network, num_classes=lesson.classes)
    model = load_model(lesson.network, num_classes=lesson.after.classes)
    load_weights(model, taught(lesson.after, data))
    replace_head(model, lesson.classes, seed=0)
    return model


def teach(
    model: nn.Module,
    pictures: Pictures,
    cycles: tuple[Cycle, ...],
    *,
    views: Augment | None = None,
    checkpoint: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Train in place, one cycle after the other, and leave the network in eval mode.

    `views` are shifted and mirrored pictures unless given. With a `checkpoint` file it goes on where it stopped.
    """
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    views, done = views or Augment(shift_px=max(2, pictures.preprocess.size[0] // 8)), 0
    before: dict[str, Any] = torch.load(checkpoint) if checkpoint is not None and checkpoint.exists() else {}
    if before:
        model.load_state_dict(before["model"])
        done = before["epoch"]
    epoch = 0
    for cycle in cycles:
        model.train(not cycle.frozen)
        optimizer, schedule = _sgd(model, cycle, len(pictures))
        for _ in range(cycle.epochs):
            epoch += 1
            if epoch == done:
                optimizer.load_state_dict(before["optimizer"])
                schedule.load_state_dict(before["schedule"])
            if epoch <= done:
                continue
            loss = _epoch(model, optimizer, schedule, batches(pictures, BATCH, seed=0, epoch=epoch - 1, settings=views))
            say(f"epoch {epoch}: loss {loss:.3f}")
            if checkpoint is not None:
                _save(checkpoint, {"model": model, "optimizer": optimizer, "schedule": schedule}, epoch)
    model.eval()


def _sgd(model: nn.Module, cycle: Cycle, pictures: int) -> tuple[torch.optim.SGD, Any]:
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = cycle.epochs * -(-pictures // BATCH)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, cycle.peak_rate, steps, anneal_strategy="linear")


def _epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    drawn: Iterator[tuple[torch.Tensor, torch.Tensor]],
) -> float:
    """The mean loss of an epoch."""
    total, count = 0.0, 0
    for x, y in drawn:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y, label_smoothing=0.1)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total, count = total + float(loss.detach()), count + 1
    return total / max(count, 1)


def _save(checkpoint: Path, states: dict[str, Any], epoch: int) -> None:
    partial = checkpoint.with_suffix(".partial")
    torch.save({name: each.state_dict() for name, each in states.items()} | {"epoch": epoch}, partial)
    partial.replace(checkpoint)


def _say(lesson: Lesson) -> Callable[[str], None]:
    heading = f"{lesson.network} at {lesson.size} px, {lesson.data}"
    return lambda line: print(f"{heading}, {line}", file=sys.stderr, flush=True)
