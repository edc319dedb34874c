"""Options that several verbs share, spelt once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="[-|FILE.json]",
        help=("Print one JSON object instead of tables, or write it to a file."),
        show_default=False,
    ),
]

Model = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="NAME",
        help=("Built-in name (see `edgetune list`), timm:NAME, torchvision:NAME, or package.module:callable."),
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        show_default=False,
        help=("Pretrained weights, safetensors; weights that ship with the network are used otherwise."),
    ),
]
TrustPickle = Annotated[
    bool, typer.Option("--trust-pickle", help=("Open a pickled weights file too, for its tensors alone."))
]
AllowPartial = Annotated[
    bool,
    typer.Option(
        "--allow-partial", help=("Load what fits of the weights file, even where keys are missing or left over.")
    ),
]

Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="PATH|NAME",
        help=("Image folder (train/<class>/*.jpg and val/..., or one folder per class), npz file, or built-in name."),
    ),
]
ValFraction = Annotated[
    float | None,
    typer.Option(
        "--val-fraction",
        metavar="0..1",
        show_default=False,
        help=("Share of the pictures to validate on, where the data has no validation part."),
    ),
]
SkipBadImages = Annotated[
    bool,
    typer.Option(
        "--skip-bad-images", help=("Leave unreadable pictures out and count them, instead of stopping at the first.")
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit", metavar="N", min=1, show_default=False, help=("Use at most so many pictures of each part.")
    ),
]
Size = Annotated[
    int | None,
    typer.Option(
        "--size",
        metavar="PX",
        min=1,
        show_default=False,
        help=("Height and width of the pictures; the network's own otherwise."),
    ),
]

BatchSize = Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Pictures in a step.")]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="BYTES",
        show_default=False,
        help=("What training may take beside the parameters, such as 24MiB or 256KiB."),
    ),
]
StepMs = Annotated[
    float | None,
    typer.Option("--step-ms", metavar="MS", min=0.0, show_default=False, help=("How long one step may take.")),
]
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="NAME",
        show_default=False,
        help=("Make the plan by hand: one method for every layer that learns (see --last)."),
    ),
]
PatchPx = Annotated[
    int | None,
    typer.Option(
        "--patch-px",
        metavar="R",
        min=1,
        show_default=False,
        help=("Patch size of the plan made by hand, in pixels of a layer's output."),
    ),
]
Taps = Annotated[
    str | None,
    typer.Option(
        "--taps", metavar="mean|grid", show_default=False, help=("One gradient for all taps of a kernel, or one a tap.")
    ),
]
Last = Annotated[
    int | None,
    typer.Option(
        "--last",
        metavar="N",
        min=0,
        show_default=False,
        help=("How many of the last convolutions learn in the plan made by hand; all when left out."),
    ),
]
Kept = Annotated[
    str | None,
    typer.Option(
        "--kept",
        metavar="BYTES",
        show_default=False,
        help="With --method asi: the inputs of all layers that learn may keep so much; their ranks are chosen by that.",
    ),
]
Hold = Annotated[
    str | None,
    typer.Option(
        "--hold",
        metavar="NAME",
        show_default=False,
        help=(
            "How what is kept for backward may be held in fewer bytes: comet or low_bit; or checkpoint, to compute it "
            "again. The planner weighs it."
        ),
    ),
]
FrozenBits = Annotated[
    int | None,
    typer.Option(
        "--frozen-bits",
        metavar="8",
        show_default=False,
        help=("Run what is in front of the first layer that learns in integers; a weight of it takes a byte."),
    ),
]
LastBlocks = Annotated[
    int | None,
    typer.Option(
        "--last-blocks",
        metavar="N",
        min=1,
        show_default=False,
        help=("How many of the last blocks learn, by mobiletl unless --method says otherwise; tinytl takes all."),
    ),
]
Seed = Annotated[
    int,
    typer.Option("--seed", metavar="N", help=("Decides the order of pictures, their random views and the new head.")),
]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="A folder that `edgetune train` left.", show_default=False)
]


def checked_bits(asked: int | None) -> int | None:
    """What --frozen-bits says. Raises RunError unless that is 8."""
    from edgetune.errors import RunError

    if asked not in (None, 8):
        raise RunError(f"--frozen-bits cannot be {asked}: say 8, or leave it out to keep the frozen part in float")
    return asked
