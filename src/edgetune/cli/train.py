"""`edgetune train`"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetune.cli import caching, options
from edgetune.cli.order import Data, Model, Order, Out, names, run_folder, tell, watched
from edgetune.cli.setup import DEMO_DATA, DEMO_MODEL, Wish, make_plan, one_batch

if TYPE_CHECKING:
    from edgetune.run import Run

EXAMPLES = (
    ("edgetune train", "the demo: digits as another camera sees them, in under a minute"),
    (
        "edgetune train --model mobilenet_v2 --weights w.safetensors --data photos --memory 24MiB --epochs 10",
        "your own photos, under a memory budget",
    ),
    (
        "edgetune train --model resnet18 --data photos --val-fraction 0.2 --method pooled_chain --patch-px 4 --last 6",
        "a plan made by hand",
    ),
    (
        "edgetune train --model mobilenet_v2 --data photos --val-fraction 0.2 --last 4 --cache disk --cache-views 2",
        "only the last layers learn: what lies in front of them is computed twice a picture, and kept",
    ),
    (
        "edgetune train --model mobilenet_v2 --data photos --val-fraction 0.2 --last 4 --frozen-bits 8",
        "the frozen layers in integers: their weights take a quarter of the room",
    ),
    (
        "edgetune train --model resnet18 --data photos --val-fraction 0.2 --method exact --hold comet",
        "every layer learns, and what is kept for that is compressed",
    ),
    ("edgetune train --resume runs/mobilenet_v2-photos-1", "go on after an interruption"),
)

PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan", metavar="FILE", show_default=False, help=("Train by this plan, as `edgetune plan` writes it.")
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option(
        "--epochs", metavar="N", min=1, show_default="10; 5 for the demo", help="Passes over the training pictures."
    ),
]
LearningRate = Annotated[float, typer.Option("--learning-rate", metavar="X", help="The highest of the schedule.")]
Resume = Annotated[
    Path | None,
    typer.Option(
        "--resume",
        metavar="RUN",
        show_default=False,
        help=("Go on with an interrupted run; everything else is as it was then."),
    ),
]
Baseline = Annotated[
    bool, typer.Option("--baseline/--no-baseline", help=("Also train by plain full back-propagation, to compare."))
]
UpdateAsItComes = Annotated[
    bool,
    typer.Option(
        "--update-as-it-comes",
        help="Use each gradient as soon as it is there, and drop it: less memory, and gradients are not clipped.",
    ),
]


def train(
    model: Model = None,
    weights: options.Weights = None,
    data: Data = None,
    memory: options.Memory = None,
    step_ms: options.StepMs = None,
    epochs: Epochs = None,
    batch_size: options.BatchSize = 32,
    learning_rate: LearningRate = 0.01,
    update_as_it_comes: UpdateAsItComes = False,
    seed: options.Seed = 0,
    out: Out = None,
    resume: Resume = None,
    baseline: Baseline = True,
    plan: PlanFile = None,
    method: options.Method = None,
    patch_px: options.PatchPx = None,
    taps: options.Taps = None,
    last: options.Last = None,
    last_blocks: options.LastBlocks = None,
    kept: options.Kept = None,
    hold: options.Hold = None,
    val_fraction: options.ValFraction = None,
    size: options.Size = None,
    limit: options.Limit = None,
    cache: caching.Place = "off",
    cache_codec: caching.Codec = None,
    cache_size: caching.Size = None,
    cache_views: caching.Views = None,
    cache_folder: caching.Folder = None,
    frozen_bits: options.FrozenBits = None,
    skip_bad_images: options.SkipBadImages = False,
    trust_pickle: options.TrustPickle = False,
    allow_partial: options.AllowPartial = False,
    json: options.Json = None,
) -> None:
    """Adapt a pretrained network to your pictures under a memory budget, and compare with plain back-propagation.

    Without arguments this is a demo: a small network that knows handwritten digits meets them through another camera.
    Without --memory and --step-ms training may take a quarter of what plain back-propagation takes. The run folder
    holds run.json, plan.json, the weights and report.html: all that `eval`, `predict`, `compare` and --resume need.
    """
    if resume is not None:
        tell(resume, _resume(resume), json)
        return
    from edgetune.run import Settings

    order = Order(
        *names(model, data),
        weights=weights,
        size=size,
        trust_pickle=trust_pickle,
        allow_partial=allow_partial,
        val_fraction=val_fraction,
        limit=limit,
        skip_bad_images=skip_bad_images,
        seed=seed,
    )
    wish = Wish(
        memory=memory,
        step_ms=step_ms,
        method=method,
        patch_px=patch_px,
        taps=taps,
        last=last,
        last_blocks=last_blocks,
        file=plan,
        kept=kept,
        hold=hold,
    )
    settings = {
        "epochs": epochs or (5 if (order.model, order.data) == (DEMO_MODEL, DEMO_DATA) else 10),
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "update_as_it_comes": update_as_it_comes,
        "clip_norm": None if update_as_it_comes else Settings.model_fields["clip_norm"].default,
        "baseline": baseline,
        "cache": caching.cache_asked(cache, cache_codec, cache_size, cache_views, cache_folder),
        "frozen_bits": options.checked_bits(frozen_bits),
    }
    folder = run_folder(out, order)
    tell(folder, _train(order, wish, settings, folder), json)


def _train(order: Order, wish: Wish, settings: dict[str, Any], folder: Path) -> Run:
    from edgetune.costs import costs_of
    from edgetune.train import train as run_training

    wish.check()
    network, pictures = order.open()
    x, y = one_batch(pictures, settings["batch_size"], order.seed)
    plan, budget = make_plan(network.model, x, y, wish)
    costs = costs_of(
        network.model,
        plan,
        x,
        y,
        plain_measured=settings["baseline"],
        update_as_it_comes=settings["update_as_it_comes"],
        memory_budget_bytes=budget.memory_bytes,
        step_budget_ms=budget.step_ms,
    )
    noted = {**order.written_down(network), "costs": costs, "out": folder, **settings}
    return watched(folder, settings["epochs"], partial(run_training, network.model, pictures, plan, **noted))


def _resume(folder: Path) -> Run:
    from edgetune.run import read_run
    from edgetune.train import resume

    return watched(folder, read_run(folder).settings.epochs, partial(resume, folder))
