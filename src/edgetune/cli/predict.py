"""`edgetune predict`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgetune.cli import options
from edgetune.cli.output import console, emit, table
from edgetune.cli.program import say

EXAMPLES = (
    ("edgetune predict runs/flowers photo.jpg", "the three likeliest classes"),
    ("edgetune predict runs/flowers *.jpg --top 1 --json -", "one class a photo, for a program"),
)

Photos = Annotated[
    list[Path], typer.Argument(metavar="PHOTO...", help="Pictures of any common format.", show_default=False)
]
Top = Annotated[int, typer.Option("--top", metavar="N", min=1, help="How many classes to tell, likeliest first.")]
Answer = tuple[str, float]


def predict(
    run: options.RunFolder,
    photos: Photos,
    top: Top = 3,
    skip_bad_images: options.SkipBadImages = False,
    json: options.Json = None,
) -> None:
    """Tell what is on photos, with a network that `edgetune train` left.

    Preprocessing and class names travel with the weights, so nothing else need be said.
    """
    from edgetune.errors import DataError
    from edgetune.run import load_run
    from edgetune.run import predict as ask

    loaded = load_run(run)
    answers: dict[str, list[Answer]] = {}
    for photo in photos:
        try:
            answers[str(photo)] = ask(loaded, [photo], top)[0]
        except DataError as failure:
            if not skip_bad_images:
                raise
            say(str(failure).partition(": ")[0] + ": left out")
    emit(
        json,
        lambda: {
            "run": str(run),
            "rows": [
                {"photo": photo, "classes": [{"class": name, "probability": share} for name, share in told]}
                for photo, told in answers.items()
            ],
        },
        lambda: _show(answers),
    )


def _show(answers: dict[str, list[Answer]]) -> None:
    most = max((len(told) for told in answers.values()), default=1)
    columns = ("photo", "class", "probability", *("next" for _ in range(most - 1)))
    rows = [
        (photo, told[0][0], f"{told[0][1]:.3f}", *(f"{name} {share:.3f}" for name, share in told[1:]))
        for photo, told in answers.items()
    ]
    console().print(table("", columns, rows))
