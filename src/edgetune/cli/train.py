"""`edgetune train`"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetune.cli import caching, options
from edgetune.cli.output import console, emit
from edgetune.cli.program import say, shortened
from edgetune.cli.progress import Bars
from edgetune.cli.setup import DEMO_DATA, DEMO_MODEL, Wish, make_plan, one_batch, open_network, preprocess_for
from edgetune.cli.tables import result_table

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

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        show_default=DEMO_MODEL,
        help=("Built-in name (see `edgetune list`), timm:NAME, torchvision:NAME, or package.module:callable."),
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="PATH|NAME",
        show_default=DEMO_DATA,
        help=("Image folder (train/<class>/*.jpg and val/..., or one folder per class), npz file, or built-in name."),
    ),
]
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
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FOLDER", show_default="runs/MODEL-DATA-1", help=("Where the run folder is made.")),
]
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
        _finish(resume, _resume(resume), json)
        return
    from edgetune.run import Settings

    order = Order(
        *_names(model, data),
        weights=weights,
        size=size,
        trust_pickle=trust_pickle,
        allow_partial=allow_partial,
        data_options={"val_fraction": val_fraction, "seed": seed, "limit": limit, "skip_bad_images": skip_bad_images},
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
        "seed": seed,
        "baseline": baseline,
        "cache": caching.cache_asked(cache, cache_codec, cache_size, cache_views, cache_folder),
        "frozen_bits": options.checked_bits(frozen_bits),
    }
    folder = _folder(out, order)
    _finish(folder, _train(order, wish, settings, folder), json)


@dataclass(frozen=True)
class Order:
    """Which network on which pictures."""

    model: str
    data: str
    weights: Path | None
    size: int | None
    trust_pickle: bool
    allow_partial: bool
    data_options: dict[str, Any]


def _names(model: str | None, data: str | None) -> tuple[str, str]:
    """Both names, or the demo's; one without the other says too little."""
    from edgetune.errors import DataError, ModelError

    if model is None and data not in (None, DEMO_DATA):
        raise ModelError(f"no network is named for data '{data}': choose one of `edgetune list` with --model")
    if data is None and model not in (None, DEMO_MODEL):
        raise DataError(
            f"no pictures are named for model '{model}': give a folder, an npz file or a built-in name with --data"
        )
    return model or DEMO_MODEL, data or DEMO_DATA


def _folder(out: Path | None, order: Order) -> Path:
    from edgetune.errors import RunError
    from edgetune.run import RUN, fresh_folder

    if out is None:
        stem = f"{order.model}-{Path(order.data).stem if Path(order.data).exists() else order.data}"
        return fresh_folder("runs", re.sub(r"[^\w.-]+", "-", stem).strip("-"))
    if (out / RUN).exists():
        raise RunError(f"'{out}' holds a run already: choose another folder with --out, or go on with --resume {out}")
    return out


def _train(order: Order, wish: Wish, settings: dict[str, Any], folder: Path) -> Run:
    from edgetune.costs import costs_of
    from edgetune.data import load_data
    from edgetune.errors import EdgetuneError
    from edgetune.run import RUN
    from edgetune.train import train as run_training

    wish.check()
    seed = settings["seed"]
    recipe = preprocess_for(order.model, order.size)
    pictures = load_data(order.data, recipe, **order.data_options)
    network = open_network(
        order.model,
        order.weights,
        len(pictures.classes),
        trust_pickle=order.trust_pickle,
        allow_partial=order.allow_partial,
        seed=seed,
    )
    say(network.story)
    say(_pictures_told(order.data, pictures.counts, pictures.skipped))
    x, y = one_batch(pictures, settings["batch_size"], seed)
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
    new = not folder.exists()
    try:
        with Bars(settings["epochs"]) as bars:
            return run_training(
                network.model,
                pictures,
                plan,
                out=folder,
                model_name=order.model,
                weights=network.weights,
                data_options=order.data_options,
                costs=costs,
                progress=bars,
                on_finish=_write_report,
                **settings,
            )
    except EdgetuneError:
        if new and folder.is_dir() and not (folder / RUN).exists():  # refused before the first step: leave no trace
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
        raise


def _resume(folder: Path) -> Run:
    from edgetune.run import read_run
    from edgetune.train import resume

    with Bars(read_run(folder).settings.epochs) as bars:
        return resume(folder, progress=bars, on_finish=_write_report)


def _write_report(folder: Path, run: Run) -> None:
    from edgetune.report import report

    report(folder)


def _pictures_told(source: str, counts: dict[str, int], skipped: tuple[str, ...]) -> str:
    told = f"{source}: {', '.join(f'{count} pictures to {split}' for split, count in counts.items())}"
    told = told.replace("to val", "to validate")
    if skipped:
        told += f"; {len(skipped)} unreadable left out ({shortened(skipped)})"
    return told


def _finish(folder: Path, run: Run, json: str | None) -> None:
    def show() -> None:
        console().print(result_table(run))
        say(f"the run is in '{folder}': open '{folder / 'report.html'}', or try `edgetune predict {folder} PHOTO`")

    emit(json, lambda: {"folder": str(folder), **run.model_dump(mode="json")}, show)
