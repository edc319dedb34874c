"""The training loop: one network through its epochs, able to stop anywhere and go on exactly where it was.

Order, views and dropout of a step depend on (seed, epoch, index) and (seed, step) alone, never on what came
before, so the weights, the momentum, the step number and what methods remember are all there is to save.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from edgetune.cache import CacheUse, Features
from edgetune.data import Dataset, batches, generator_for
from edgetune.errors import DivergedError, RunError
from edgetune.graph import not_finite
from edgetune.hosts.arithmetic import advance
from edgetune.record import Record
from edgetune.run import Epoch, Settings, device_of, evaluate, fill, read_tensors, write_tensors
from edgetune.update import as_it_comes

Forward = Callable[[torch.Tensor], torch.Tensor]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

SAVE_EVERY_S = 60.0
"""Longest time in seconds that a kill can undo within an epoch."""


class Progress(Protocol):
    """Whoever wants to watch: `start` at each training (planned, then plain), `advance` after a step, `epoch`
    after each pass, `tell` with a sentence that a person should know. Raising KeyboardInterrupt from any of them
    stops as Ctrl-C does."""

    def start(self, title: str, total: int, done: int) -> None: ...
    def advance(self) -> None: ...
    def epoch(self, number: int, row: Epoch) -> None: ...
    def tell(self, sentence: str) -> None: ...


class Silent:
    """A `Progress` that nobody watches; what a person should know becomes a warning."""

    def start(self, title: str, total: int, done: int) -> None:
        pass

    def advance(self) -> None:
        pass

    def epoch(self, number: int, row: Epoch) -> None:
        pass

    def tell(self, sentence: str) -> None:
        warnings.warn(sentence, stacklevel=2)


def rate_at(step: int, total: int, settings: Settings) -> float:
    """The learning rate of a step (0 .. total-1): up in a straight line, then down to 0 as half a cosine."""
    rising = round(settings.warm_up * total)
    if step < rising:
        return settings.learning_rate * (step + 1) / rising
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / (total - rising)))


def cross_entropy(model: Forward) -> Loss:
    """The loss of x (n c h w), y (n), summed over samples, of a network that learns from labels alone."""
    return lambda x, y: F.cross_entropy(model(x), y, reduction="sum")


def accumulate(loss_of: Loss, x: torch.Tensor, y: torch.Tensor, micro_batch: int) -> float:
    """Add the gradient of the mean loss of x (n c h w), y (n), `micro_batch` samples at a time.

    Equal to the whole batch at once wherever samples don't see each other, as with frozen norms. Returns the
    loss. With cached features x (n) are the numbers of the pictures.
    """
    total = 0.0
    for xs, ys in zip(x.split(micro_batch), y.split(micro_batch), strict=True):
        loss = loss_of(xs, ys) / len(x)
        loss.backward()
        total += loss.item()
    return total


class Position(Record):
    """How far a training is: steps done, the epochs behind it, and sums over the steps of the present one."""

    step: int = 0
    epochs: tuple[Epoch, ...] = ()
    loss: float = 0.0
    ms: float = 0.0


OPTIMIZER_STATE = ("momentum_buffer", "exp_avg", "exp_avg_sq", "step")
"""What an optimizer may remember of a parameter."""


def optimizer_named(name: str, groups: list[dict[str, Any]], rate: float, momentum: float) -> torch.optim.Optimizer:
    """SGD, or AdamW, whose decay is apart from the gradient and so means the same however gradients are scaled."""
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=rate, betas=(momentum, 0.999))
    return torch.optim.SGD(groups, lr=rate, momentum=momentum)


def _remembered(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that a state_dict leaves out: what methods remember from step to step."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


@dataclass
class Leg:
    """One training of one network, planned or plain; `saved` hears of every epoch and of Ctrl-C.

    With `features`, and `val_features`, the frozen part of the network is looked up instead of run. `loss_of` is what
    a teacher adds to the labels.
    """

    model: nn.Module
    data: Dataset
    settings: Settings
    micro_batch: int
    checkpoint: Path
    saved: Callable[[Position], None]
    features: Features | None = None
    val_features: Features | None = None
    loss_of: Loss | None = None
    at: Position = field(default_factory=Position)
    whole: bool = True  # False while weights, momentum and step number are not of one moment

    def __post_init__(self) -> None:
        self.learned = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        flat = [p for p in self.learned.values() if p.ndim <= 1]
        deep = [p for p in self.learned.values() if p.ndim > 1]
        settings = self.settings
        groups = [{"params": deep, "weight_decay": settings.weight_decay}, {"params": flat, "weight_decay": 0.0}]
        self.optimizer = optimizer_named(
            settings.optimizer, [g for g in groups if g["params"]], settings.learning_rate, settings.momentum)
        self.per_epoch = -(-len(self.data.train) // self.settings.batch_size)
        self.total = self.settings.epochs * self.per_epoch

    def load(self) -> None:
        """Take up weights, momentum and position from the checkpoint. Raises RunError when it is none."""
        tensors, about = read_tensors(self.checkpoint)
        prefix = "model/"
        state = {
            name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
        }
        fill(self.model, state, self.checkpoint)
        try:
            self.at = Position.model_validate_json(about)
        except ValidationError as failure:
            raise RunError(f"'{self.checkpoint}' is no checkpoint of edgetune: train anew") from failure
        for name, parameter in self.learned.items():
            held = {key: tensors[f"{key}/{name}"] for key in OPTIMIZER_STATE if f"{key}/{name}" in tensors}
            for key, saved in held.items():
                like = parameter if saved.shape == parameter.shape else saved
                self.optimizer.state[parameter][key] = torch.empty_like(like).copy_(saved)
        for name, buffer in _remembered(self.model).items():
            if (kept := tensors.get(f"state/{name}")) is not None:
                buffer.copy_(kept)

    def save(self) -> None:
        """Write the checkpoint."""
        tensors = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.learned.items():
            held = self.optimizer.state[parameter]
            tensors |= {f"{key}/{name}": held[key] for key in OPTIMIZER_STATE if held.get(key) is not None}
        tensors |= {f"state/{name}": buffer for name, buffer in _remembered(self.model).items()}
        write_tensors(self.checkpoint, tensors, self.at.model_dump_json())

    def run(self, title: str, progress: Progress) -> None:
        """Train from where it is to the end. Ctrl-C saves first, a loss that is no number does not."""
        progress.start(title, self.total, self.at.step)
        try:
            for epoch in range(len(self.at.epochs), self.settings.epochs):
                self._steps(epoch, progress)
                self._close(epoch, progress)
        except KeyboardInterrupt:
            if self.whole:  # else a step was cut in two, and the checkpoint before it stands
                self.save()
                self.saved(self.at)
            raise

    def _steps(self, epoch: int, progress: Progress) -> None:
        last_save = time.monotonic()
        for forward, x, y in self._batches(epoch):
            began = time.perf_counter()
            loss = self._step(forward, x, y)
            self.at = Position(
                step=self.at.step + 1,
                epochs=self.at.epochs,
                loss=self.at.loss + loss * len(y),
                ms=self.at.ms + (time.perf_counter() - began) * 1e3,
            )
            self.whole = True
            if time.monotonic() - last_save > SAVE_EVERY_S:
                self.save()
                last_save = time.monotonic()
            progress.advance()

    def _batches(self, epoch: int) -> Iterator[tuple[Forward, torch.Tensor, torch.Tensor]]:
        """What is left of an epoch: for each batch the forward pass, what goes in, and the labels y (n)."""
        start = self.at.step - epoch * self.per_epoch
        if self.features is not None:
            yield from self.features.batches(epoch, start)
            return
        settings = self.settings
        for x, y in batches(self.data.train, settings.batch_size, seed=settings.seed, epoch=epoch,
                            settings=settings.augment, start=start):  # fmt: skip
            yield self.model, x, y

    def _step(self, forward: Forward, x: torch.Tensor, y: torch.Tensor) -> float:
        """One batch; raises DivergedError before a gradient that is no number can spoil a weight."""
        device = device_of(self.model)
        torch.manual_seed(generator_for("step", self.settings.seed, self.at.step).initial_seed())  # dropout
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.at.step, self.total, self.settings)
        advance(self.model, self.at.step / self.total)
        self.optimizer.zero_grad()
        update = self._update_as_it_comes if self.settings.update_as_it_comes else self._update
        return update(self.loss_of or cross_entropy(forward), x.to(device), y.to(device))

    def _update(self, loss_of: Loss, x: torch.Tensor, y: torch.Tensor) -> float:
        """All gradients, clipped, and then the step."""
        loss = accumulate(loss_of, x, y, self.micro_batch)
        grads = [p.grad for p in self.learned.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        self._check(math.isfinite(loss) and math.isfinite(norm))
        if self.settings.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.learned.values(), self.settings.clip_norm, norm)
        self.whole = False
        self.optimizer.step()
        return loss

    def _update_as_it_comes(self, loss_of: Loss, x: torch.Tensor, y: torch.Tensor) -> float:
        """The step of each parameter within backward."""

        def one(parameter: nn.Parameter) -> None:
            assert parameter.grad is not None
            self._check(bool(parameter.grad.isfinite().all()))
            self.optimizer.step()

        self.whole = False
        with as_it_comes(self.model, one):
            loss = accumulate(loss_of, x, y, len(x))
        self._check(math.isfinite(loss))
        return loss

    def _check(self, sound: bool) -> None:
        if not sound:
            where = f"step {self.at.step + 1} of {self.total}"
            raise DivergedError(f"the loss or its gradient is not a number at {where}")

    def cached(self) -> CacheUse | None:
        """What the features have done so far."""
        if self.features is None or self.val_features is None:
            return None
        val = self.val_features.use
        return self.features.use.model_copy(update={"validation_bytes": val.stored * val.sample_bytes})

    def _close(self, epoch: int, progress: Progress) -> None:
        classes, batch_size = len(self.data.classes), self.settings.batch_size
        advance(self.model, self.at.step / self.total)
        score = evaluate(self.model, self.data.val, classes, batch_size, self.val_features)
        if not math.isfinite(score.loss):
            raise DivergedError(f"the validation loss is not a number after epoch {epoch + 1}")
        if (name := not_finite(self.model)) is not None:  # layers that read signs hide it from the loss
            raise DivergedError(f"'{name}' has values that are not numbers after epoch {epoch + 1}")
        row = Epoch(
            train_loss=self.at.loss / len(self.data.train),
            val_loss=score.loss,
            val_accuracy=score.accuracy,
            ms=self.at.ms,
        )
        self.at = Position(step=self.at.step, epochs=(*self.at.epochs, row))
        self.save()
        self.saved(self.at)
        progress.epoch(epoch + 1, row)
