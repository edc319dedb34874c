"""What a network knows: its accuracy on labelled pictures, and its answers to new ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from edgetune.data import Pictures, batches, open_picture
from edgetune.errors import ModelError
from edgetune.graph import evaluating
from edgetune.record import Record
from edgetune.run import LoadedRun, device_of


class Score(Record):
    """What a network knew: per class, how many pictures it saw and told right; the mean loss of all."""

    seen: tuple[int, ...]
    right: tuple[int, ...]
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of all pictures told right, 0..1."""
        return sum(self.right) / max(sum(self.seen), 1)


def evaluate(model: nn.Module, pictures: Pictures, classes: int, batch_size: int = 32) -> Score:
    """Run `model` over pictures in evaluation mode. Raises ModelError when its head does not fit."""
    seen, right, loss = torch.zeros(classes, dtype=torch.long), torch.zeros(classes, dtype=torch.long), 0.0
    with evaluating(model), torch.no_grad():
        for x, y in batches(pictures, batch_size, shuffle=False):
            logits = model(x.to(device_of(model))).float().cpu()
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
