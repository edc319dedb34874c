"""`edgetune eval`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetune.cli import options
from edgetune.cli.output import console, emit, table
from edgetune.cli.program import say, shortened

if TYPE_CHECKING:
    from torch import nn

    from edgetune.run import Score

EXAMPLES = (
    ("edgetune eval runs/flowers", "the run's own validation pictures"),
    ("edgetune eval runs/signs --packed", "the packed network of `edgetune compress`, on kernels of few bits"),
    ("edgetune eval runs/flowers --data more_photos --skip-bad-images", "other pictures of the same classes"),
)

Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="PATH|NAME",
        show_default=False,
        help=("Image folder, npz file or built-in name; the run's own validation pictures when left out."),
    ),
]


Packed = Annotated[
    bool, typer.Option("--packed", help="Ask the packed network that `edgetune compress` left, not the trained one.")
]


def evaluate(
    run: options.RunFolder,
    data: Data = None,
    packed: Packed = False,
    batch_size: options.BatchSize = 32,
    skip_bad_images: options.SkipBadImages = False,
    limit: options.Limit = None,
    json: options.Json = None,
) -> None:
    """Tell how well a trained network knows a set of pictures, class by class.

    Preprocessing and class names are the run's own. The validation part of the data is used where it has one, all of it
    otherwise; its classes are matched by name and may be fewer than the network's.
    """
    from edgetune.data import load_eval
    from edgetune.run import evaluate as score_of
    from edgetune.run import load_run, open_data

    loaded = load_run(run)
    skipped: tuple[str, ...]
    if data is None:
        whole = open_data(loaded.run)
        pictures, skipped, source = whole.val, whole.skipped, loaded.run.data.source
    else:
        pictures, skipped = load_eval(
            data, loaded.preprocess, loaded.classes, skip_bad_images=skip_bad_images, limit=limit
        )
        source = data
    model = _packed(run) if packed else loaded.model
    score = score_of(model, pictures, len(loaded.classes), batch_size)
    if skipped:
        say(f"{len(skipped)} unreadable pictures were left out: {shortened(skipped)}")
    emit(
        json,
        lambda: _as_json(str(run), source, loaded.classes, score, skipped),
        lambda: _show(source, loaded.classes, score),
    )


def _packed(run: Path) -> nn.Module:
    from edgetune.errors import RunError
    from edgetune.packed import Packed, PackedNetwork
    from edgetune.run import PACKED

    if not (run / PACKED).is_file():
        raise RunError(f"'{run}' has no {PACKED}: only networks with layers of few bits have one, see "
                       "`edgetune compress`")
    return PackedNetwork(Packed.load(run / PACKED))


def _as_json(run: str, source: str, classes: tuple[str, ...], score: Score, skipped: tuple[str, ...]) -> dict[str, Any]:
    rows = [
        {"class": name, "seen": seen, "right": right} for name, seen, right in zip(classes, score.seen, score.right)
    ]
    return {
        "run": run,
        "data": source,
        "accuracy": score.accuracy,
        "loss": score.loss,
        "rows": rows,
        "skipped": list(skipped),
    }


def _show(source: str, classes: tuple[str, ...], score: Score) -> None:
    rows = [
        (name, str(seen), str(right), f"{100 * right / seen:.1f} %" if seen else "-")
        for name, seen, right in zip(classes, score.seen, score.right)
    ]
    total = ("all", str(sum(score.seen)), str(sum(score.right)), f"{100 * score.accuracy:.1f} %")
    console().print(table(f"{source}", ("class", "pictures", "right", "accuracy"), rows, last=total))
