"""Which network learns from which pictures, and where its run is left: what every verb that trains has in common."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from edgetune.cli.output import console, emit
from edgetune.cli.program import say, shortened
from edgetune.cli.progress import Bars
from edgetune.cli.setup import DEMO_DATA, DEMO_MODEL, Network, open_network, preprocess_for
from edgetune.cli.tables import result_table

if TYPE_CHECKING:
    from edgetune.data import Dataset
    from edgetune.run import Run

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
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FOLDER", show_default="runs/MODEL-DATA-1", help=("Where the run folder is made.")),
]


@dataclass(frozen=True)
class Order:
    """Which network on which pictures."""

    model: str
    data: str
    weights: Path | None
    size: int | None
    trust_pickle: bool
    allow_partial: bool
    val_fraction: float | None
    limit: int | None
    skip_bad_images: bool
    seed: int

    @property
    def data_options(self) -> dict[str, Any]:
        """What `load_data` is given beside the source."""
        return {"val_fraction": self.val_fraction, "seed": self.seed, "limit": self.limit,
                "skip_bad_images": self.skip_bad_images}

    def open(self) -> tuple[Network, Dataset]:
        """The network, with a head for the classes of its pictures, and these; a line of each is told."""
        from edgetune.data import load_data

        pictures = load_data(self.data, preprocess_for(self.model, self.size), **self.data_options)
        network = open_network(
            self.model,
            self.weights,
            len(pictures.classes),
            trust_pickle=self.trust_pickle,
            allow_partial=self.allow_partial,
            seed=self.seed,
        )
        say(network.story)
        say(_pictures_told(self.data, pictures.counts, pictures.skipped))
        return network, pictures

    def written_down(self, network: Network) -> dict[str, Any]:
        """What a run notes of all this, so that it can be loaded and resumed by itself."""
        return {"model_name": self.model, "weights": network.weights, "data_options": self.data_options,
                "seed": self.seed}


def names(model: str | None, data: str | None) -> tuple[str, str]:
    """Both names, or the demo's; one without the other says too little."""
    from edgetune.errors import DataError, ModelError

    if model is None and data not in (None, DEMO_DATA):
        raise ModelError(f"no network is named for data '{data}': choose one of `edgetune list` with --model")
    if data is None and model not in (None, DEMO_MODEL):
        raise DataError(
            f"no pictures are named for model '{model}': give a folder, an npz file or a built-in name with --data"
        )
    return model or DEMO_MODEL, data or DEMO_DATA


def run_folder(out: Path | None, order: Order) -> Path:
    """The folder asked for, or the next free one below runs/. Raises RunError for one that holds a run."""
    from edgetune.errors import RunError
    from edgetune.run import RUN, fresh_folder

    if out is None:
        stem = f"{order.model}-{Path(order.data).stem if Path(order.data).exists() else order.data}"
        return fresh_folder("runs", re.sub(r"[^\w.-]+", "-", stem).strip("-"))
    if (out / RUN).exists():
        raise RunError(f"'{out}' holds a run already: choose another folder with --out, or go on with --resume {out}")
    return out


def watched(folder: Path, epochs: int, training: Callable[..., Run]) -> Run:
    """The run that `training` leaves in the folder, with bars; refused before its first step it leaves no trace."""
    from edgetune.errors import EdgetuneError
    from edgetune.run import RUN

    new = not folder.exists()
    try:
        with Bars(epochs) as bars:
            return training(progress=bars, on_finish=complete)
    except EdgetuneError:
        if new and folder.is_dir() and not (folder / RUN).exists():
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
        raise


def complete(folder: Path, run: Run) -> None:
    """Write what a finished run has beside its weights, whether it was resumed or not: its page."""
    from edgetune.report import report

    report(folder)


def tell(
    folder: Path, run: Run, json: str | None, *, more: Mapping[str, Any] | None = None, first: Table | None = None
) -> None:
    """The result of a run, with tables for people; `more` is for programs beside the record, `first` a table."""

    def show() -> None:
        if first is not None:
            console().print(first)
        console().print(result_table(run))
        say(f"the run is in '{folder}': open '{folder / 'report.html'}', or try `edgetune predict {folder} PHOTO`")

    emit(json, lambda: {"folder": str(folder), **(more or {}), **run.model_dump(mode="json")}, show)


def _pictures_told(source: str, counts: dict[str, int], skipped: tuple[str, ...]) -> str:
    told = f"{source}: {', '.join(f'{count} pictures to {split}' for split, count in counts.items())}"
    told = told.replace("to val", "to validate")
    if skipped:
        told += f"; {len(skipped)} unreadable left out ({shortened(skipped)})"
    return told
