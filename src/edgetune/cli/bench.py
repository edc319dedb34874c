"""`edgetune bench`"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetune.cli import options
from edgetune.cli.output import console, emit, table
from edgetune.cli.program import say
from edgetune.units import format_bytes, format_ms

if TYPE_CHECKING:
    from types import ModuleType

    from edgetune.record import Record

SUITES = {
    "layers": "single convolutions",
    "steps": "whole training steps",
    "held": "whole training steps that hold what they keep in fewer bytes, or make it again",
    "cache": "epochs from cached features",
    "transfer": "accuracy after adapting",
    "training": "ways to train on a device side by side",
    "binary": "convolutions of one bit a weight",
    "adder": "convolutions by additions",
    "arithmetic": "accuracy of networks of bits and of additions beside the float network",
    "budgets": "the planner beside single methods in the same memory",
    "codec": "codecs on the maps of networks in training",
    "ladder": "the memory of a training step, rung by rung",
}
RESULTS = Path("bench/results")
SHOWN = (
    "case",
    "method",
    "depth",
    "patch_px",
    "taps",
    "codec",
    "bound",
    "threads",
    "ratio",
    "entropy_ratio",
    "encode_gb_s",
    "decode_gb_s",
    "error",
    "zeros_kept",
    "batch",
    "baseline_ms",
    "method_ms",
    "speedup",
    "macs_again",
    "backward_speedup",
    "grid_speedup",
    "method_speedup",
    "int8_speedup",
    "adder_speedup",
    "gmac_s",
    "sample_bytes",
    "kept_bytes",
    "peak_bytes",
    "arena_bytes",
    "streamed_bytes",
    "extra_bytes",
    "added_bytes",
    "published_bytes",
    "cosine",
    "scale",
    "accuracy_mean",
    "accuracy_sd",
    "accuracy_difference",
    "difference_low",
    "difference_high",
    "seeds",
)
"""Columns for people, where rows have them; JSON has all."""

EXAMPLES = (
    ("edgetune bench layers", "the published layers: exact backward against gradient filtering"),
    ("edgetune bench steps --device cuda --json -", "whole steps on a GPU, one JSON object"),
    ("edgetune bench steps --set models=resnet18 --set sizes_px=128", "only a part of the suite"),
    ("edgetune bench transfer --quick", "a small sample of the accuracy grid"),
)

Suite = Annotated[
    str,
    typer.Argument(
        metavar="SUITE", show_default=False, help=("; ".join(f"{name}: {what}" for name, what in SUITES.items()) + ".")
    ),
]
Device = Annotated[str | None, typer.Option("--device", metavar="NAME", show_default="cpu", help="Where to run.")]
Threads = Annotated[
    int | None, typer.Option("--threads", metavar="N", min=1, show_default=False, help="Threads to use.")
]
Quick = Annotated[bool, typer.Option("--quick", help="A small sample of the suite, to see that it runs.")]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        show_default=False,
        help=("Change any other option of the suite; commas separate several values."),
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE",
        show_default=f"{RESULTS}/SUITE.jsonl",
        help=("Where the rows are stored, one a line; without that folder they are only printed."),
    ),
]


def bench(
    suite: Suite,
    device: Device = None,
    threads: Threads = None,
    quick: Quick = False,
    change: Changes = None,
    out: Out = None,
    json: options.Json = None,
) -> None:
    """Measure method against baseline on this machine, interleaved in one process: the ratio is the result.

    The baseline is torch's own exact backward in its faster memory layout. Finished cells of the accuracy grid are
    stored at once and never run twice. docs/bench.md says what every column means.
    """
    module = _module(suite)
    target = out or (RESULTS / f"{suite}.jsonl" if RESULTS.is_dir() else None)
    given = {
        "device": device,
        "threads": threads,
        "quick": quick or None,
        "out": None if target is None else str(target),
    }
    wanted = _options(suite, module, {name: value for name, value in given.items() if value is not None}, change or [])
    takes_progress = "progress" in inspect.signature(module.run).parameters
    found = module.run(wanted, progress=_tell) if takes_progress else module.run(wanted)
    if target is not None and takes_progress:  # the others store their cells themselves, one by one
        from edgetune.bench.timing import save

        save(target, suite, found)
    emit(json, lambda: found, lambda: _show(suite, found))


def _module(suite: str) -> ModuleType:
    import difflib
    import importlib

    from edgetune.errors import EdgetuneError

    if suite not in SUITES:
        near = difflib.get_close_matches(suite, SUITES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(SUITES)}"
        raise EdgetuneError(f"suite '{suite}' is unknown: {hint}")
    return importlib.import_module(f"edgetune.bench.{suite}")


def _options(suite: str, module: ModuleType, given: dict[str, Any], changes: Sequence[str]) -> Record:
    """The suite's settings with what was asked for. Raises EdgetuneError for one that it does not have."""
    from pydantic import ValidationError

    from edgetune.errors import EdgetuneError

    kind = next(
        part for part in typing.get_args(typing.get_type_hints(module.run)["options"]) if part is not type(None)
    )
    if "out" not in kind.model_fields:
        given.pop("out", None)
    for change in changes:
        name, _, value = change.partition("=")
        several = typing.get_origin(_without_none(kind, name)) is tuple
        given[name] = tuple(value.split(",")) if several else value
    if strangers := sorted(set(given) - set(kind.model_fields)):
        raise EdgetuneError(f"suite '{suite}' has no option '{strangers[0]}': it has {', '.join(kind.model_fields)}")
    try:
        made: Record = kind(**given)
    except ValidationError as failure:
        first = failure.errors()[0]
        raise EdgetuneError(
            f"option '{first['loc'][0]}' of suite '{suite}' cannot be '{first['input']}' ({first['msg']}): "
            "give another value"
        ) from failure
    return made


def _without_none(kind: Any, name: str) -> Any:
    """The type of an option, `None` aside."""
    field = kind.model_fields.get(name)
    if field is None:
        return None
    parts = [part for part in typing.get_args(field.annotation) if part is not type(None)]
    return parts[0] if len(parts) == 1 else field.annotation


def _tell(row: Mapping[str, Any]) -> None:
    told = ("case", "method", "patch_px", "taps", "codec", "speedup", "backward_speedup", "grid_speedup")
    say(", ".join(f"{_title(name)} {_cell(name, row[name])}" for name in told if row.get(name) is not None))


def _show(suite: str, found: Mapping[str, Any]) -> None:
    rows = found["rows"]
    columns = [name for name in SHOWN if any(row.get(name) is not None for row in rows)]
    title = f"{suite}: {found['machine']}; torch {found['versions']['torch']}"
    cells = [[_cell(name, row.get(name)) for name in columns] for row in rows]
    console().print(table(title, [_title(name) for name in columns], cells))


def _title(name: str) -> str:
    """A row's field as a heading that can go over two lines."""
    return name.removesuffix("_ms").removesuffix("_bytes").replace("_", " ")


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name.endswith("_bytes"):
        return format_bytes(value)
    if name.endswith("_ms"):
        return format_ms(value)
    if name.endswith("speedup"):
        return f"{value:.1f}x"
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("_", " ")
