"""The options of the cache: where features stay, how they are written, how many."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgetune.units import parse_bytes

if TYPE_CHECKING:
    from edgetune.cache import Cache

PLACES = ("off", "memory", "disk")

Place = Annotated[
    str,
    typer.Option(
        "--cache",
        metavar="|".join(PLACES),
        help="Compute the frozen part once a picture and view, and keep what it gives; later epochs run the rest.",
    ),
]
Codec = Annotated[
    str | None,
    typer.Option(
        "--cache-codec",
        metavar="float32|float16|int8|int4|bounded",
        show_default="float32",
        help="How features are kept: exactly, in half, a quarter or an eighth of the room.",
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        "--cache-size", metavar="BYTES", show_default="1GiB", help="The most it takes; what does not fit is computed."
    ),
]
Views = Annotated[
    int | None,
    typer.Option(
        "--cache-views",
        metavar="N",
        min=1,
        show_default="4",
        help="Random views of a picture that are kept: epoch e shows view e modulo N.",
    ),
]
Folder = Annotated[
    Path | None,
    typer.Option(
        "--cache-folder",
        metavar="FOLDER",
        show_default="the run's own, until it has finished",
        help="Where --cache disk keeps its files, for other runs with the same frozen part, pictures and seed.",
    ),
]


def cache_asked(
    place: str, codec: str | None, size: str | None, views: int | None, folder: Path | None
) -> Cache | None:
    """The cache that the options ask for. Raises RunError for options that make no sense together."""
    from pydantic import ValidationError

    from edgetune.cache import Cache
    from edgetune.errors import RunError

    given = {"codec": codec, "size_bytes": size, "views": views, "folder": folder}
    given = {name: value for name, value in given.items() if value is not None}
    if place not in PLACES:
        raise RunError(f"--cache cannot be '{place}': choose one of {', '.join(PLACES)}")
    if place == "off":
        if given:
            option = "--cache-" + next(iter(given)).removesuffix("_bytes")
            raise RunError(f"{option} says how to cache, but nothing is cached: add --cache memory or --cache disk")
        return None
    if folder is not None and place == "memory":
        raise RunError("--cache-folder is for features on disk: use it with --cache disk")
    try:
        return Cache.model_validate({
            **given, "keep": place,
            **({"size_bytes": parse_bytes(size)} if size is not None else {}),
            **({"folder": str(folder)} if folder is not None else {}),
        })  # fmt: skip
    except ValidationError as failure:
        first = failure.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        raise RunError(f"--cache-{first['loc'][0]} cannot be '{first['input']}': {message}") from failure
