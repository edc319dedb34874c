"""One cell of an accuracy bench: a pretrained network is trained by one method, and tested."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from edgetune.bench.arms import BATCH, Arm, Trainee
from edgetune.bench.cases import Bench
from edgetune.bench.cells import Line, cell_key, kept_for_backward, pack_bits
from edgetune.bench.photos import Split
from edgetune.bench.timing import CLOCKS
from edgetune.data.chance import permutation
from edgetune.hosts.arithmetic import advance

WARM_UP = 0.2
LOOKED_AT = 128
"""Pictures of the training part that a method may trace and calibrate with."""


def adapt(bench: Bench, arm: Arm, split: Split, rate: float, seed: int) -> Line:
    """Train on one split and test: accuracy, right or wrong by photo, curve, bytes kept, seconds."""
    started = time.perf_counter()
    trainee, curve = trained(bench, arm, split, rate, seed)
    found = tested(trainee, bench, split)
    return {**found, "curve": curve, "seconds": round(time.perf_counter() - started, 1)}


def trained(bench: Bench, arm: Arm, split: Split, rate: float, seed: int) -> tuple[Trainee, list[Line]]:
    """The network of an arm after its training, and the curve of that."""
    torch.manual_seed(seed)
    trainee = trainee_of(bench, arm, split[0], seed)
    return trainee, _train(trainee, bench, split[0], rate, seed) if arm.trains else []


def tested(trainee: Trainee, bench: Bench, split: Split) -> Line:
    """Accuracy and loss on the test part, right or wrong by photo, and the bytes that a batch of the other keeps."""
    source, labels, (train, test) = bench.source(), bench.photos().labels, split
    # behind training, as bounds of what is kept may have followed it
    trainee.model.train(trainee.live)
    kept = kept_for_backward(trainee.model, source.seen(train[:BATCH], 0))
    trainee.model.eval()
    with torch.no_grad():
        logits = torch.cat([trainee.model(source.seen(part, None)) for part in chunks(test, 100)])
    correct, loss = logits.argmax(1) == labels[test], F.cross_entropy(logits, labels[test])
    return {
        "accuracy": 100 * float(correct.double().mean()),
        "test_loss": float(loss.nan_to_num(1e9, 1e9)),
        "correct": pack_bits(correct),
        "tested": len(test),
        "test_set": cell_key({"photos": test}),
        "kept_bytes": kept,
    }


def trainee_of(bench: Bench, arm: Arm, train: Sequence[int], seed: int) -> Trainee:
    """The case's network as the arm makes it, which has looked at photos from all over the training part."""
    spread = list(train[:: max(1, len(train) // LOOKED_AT)][:LOOKED_AT])
    x, y = bench.source().seen(spread, None), bench.photos().labels[spread]
    return arm.prepare(bench.learning_part(seed), x, y)


def _train(trainee: Trainee, bench: Bench, train: Sequence[int], rate: float, seed: int) -> list[Line]:
    """One-cycle SGD; mean loss, median gradient norm and step time, one entry an epoch."""
    source, labels, recipe, epochs = bench.source(), bench.photos().labels, bench.case.recipe, bench.case.epochs
    optimizer = trainee.optimizer(trainee.model, rate, recipe.momentum, seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        rate,
        total_steps=epochs * len(chunks(train, BATCH)),
        pct_start=WARM_UP,
        cycle_momentum=False,
    )
    now, history = CLOCKS[recipe.clock], list[Line]()
    trainee.model.train(trainee.live)
    for epoch in range(epochs):
        order = [train[i] for i in permutation(len(train), "order", seed, epoch)]
        steps = []
        for number, chosen in enumerate(chunks(order, BATCH)):
            advance(trainee.model, (epoch + number * BATCH / len(train)) / epochs)
            x, y, started = source.seen(chosen, epoch), labels[chosen], now()
            loss, norm = step(trainee, optimizer, x, y, recipe.clip)
            steps.append((loss, norm, 1000 * (now() - started)))
            schedule.step()
            if not math.isfinite(loss):
                return [*history, {"loss": None, "step": len(steps)}]  # diverged: nothing comes back from that
        losses, norms, times = zip(*steps, strict=True)
        history.append(
            {
                "loss": statistics.fmean(losses),
                "gradient_norm": statistics.median(norms),
                "step_ms": statistics.median(times),
            }
        )
    advance(trainee.model, 1.0)
    return history


def step(
    trainee: Trainee, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, clip: float | None
) -> tuple[float, float]:
    """One training step on x (n c h w), y (n): the loss, and the norm of the gradient before it is clipped."""
    optimizer.zero_grad()
    loss = F.cross_entropy(trainee.model(x), y) if trainee.loss is None else trainee.loss(x, y) / len(x)
    loss.backward()  # type: ignore[no-untyped-call]
    trainee.rescale(trainee.model)
    learned = [parameter for parameter in trainee.model.parameters() if parameter.requires_grad]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in learned if parameter.grad is not None])
    if clip is not None:
        nn.utils.clip_grads_with_norm_(learned, clip, norm)
    optimizer.step()
    return float(loss.detach()), float(norm)


def chunks(items: Sequence[int], size: int) -> list[list[int]]:
    """The items in their order, so many at a time."""
    return [list(items[first : first + size]) for first in range(0, len(items), size)]
