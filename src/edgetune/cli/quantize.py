"""`edgetune quantize`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetune.cli import options
from edgetune.cli.output import console, emit, facts, table
from edgetune.units import format_bytes

if TYPE_CHECKING:
    from edgetune.quantize import Quantized
    from edgetune.run import Score

EXAMPLES = (
    ("edgetune quantize runs/flowers", "the run's network in integers, beside its weights"),
    ("edgetune quantize runs/flowers --keep-percent 99.99 --out net.safetensors", "rare outliers are clipped"),
)
FILE = "quantized.safetensors"

Pictures = Annotated[
    int, typer.Option("--pictures", metavar="N", min=1, help="Training pictures that the ranges are taken from.")
]
KeepPercent = Annotated[
    float | None,
    typer.Option(
        "--keep-percent",
        metavar="0..100",
        show_default=False,
        help="Share of a map's values that its range holds; all of them when left out.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="FILE", show_default=f"RUN/{FILE}", help="Where the network is written."),
]


def quantize(
    run: options.RunFolder,
    pictures: Pictures = 256,
    keep_percent: KeepPercent = None,
    batch_size: options.BatchSize = 32,
    out: Out = None,
    json: options.Json = None,
) -> None:
    """Turn a trained network into integers, as a microcontroller runs it, and tell what that costs in accuracy.

    Weights and maps become int8, biases int32; the head stays in float. Ranges come from the run's own training
    pictures, accuracies from its validation pictures. What has no integer step is refused by name.
    """
    from edgetune.data import batches
    from edgetune.quantize import MinMax, Percentile, QuantizedNetwork
    from edgetune.quantize import quantize as to_integers
    from edgetune.run import evaluate, load_run, open_data

    ranges = MinMax() if keep_percent is None else Percentile(keep_percent=_percent(keep_percent))
    loaded = load_run(run)
    data = open_data(loaded.run)
    count = min(pictures, len(data.train))
    # a batch may go over the number asked for, so the last one is cut
    seen = (x for x, _ in batches(data.train, min(batch_size, count), shuffle=False))
    quantized = to_integers(loaded.model, _first(seen, count), ranges)
    path = out if out is not None else run / FILE
    quantized.save(path)
    before, after = (
        evaluate(model, data.val, len(loaded.classes), batch_size)
        for model in (loaded.model, QuantizedNetwork(quantized))
    )
    emit(
        json,
        lambda: _as_json(str(run), path, count, quantized, before, after),
        lambda: _show(path, count, quantized, before, after),
    )


def _percent(value: float) -> float:
    from edgetune.errors import DataError

    if not 0 < value <= 100:
        raise DataError(f"--keep-percent {value:g} is no share: give a number above 0 and up to 100, such as 99.99")
    return value


def _first(batches: Any, count: int) -> list[Any]:
    """Whole batches up to `count` pictures, the last one cut."""
    taken: list[Any] = []
    for x in batches:
        taken.append(x[:count])
        count -= len(taken[-1])
        if count <= 0:
            break
    return taken


def _bytes(quantized: Quantized) -> tuple[int, int]:
    """What weights and biases take in float32, and as they are now."""
    tensors = [tensor for key, tensor in quantized.tensors.items() if not key.endswith(("weight_scale", "gain"))]
    return 4 * sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)


def _as_json(run: str, path: Path, count: int, quantized: Quantized, before: Score, after: Score) -> dict[str, Any]:
    float_bytes, int_bytes = _bytes(quantized)
    return {
        "run": run,
        "file": str(path),
        "pictures": count,
        "float": {"accuracy": before.accuracy, "loss": before.loss, "weight_bytes": float_bytes},
        "int8": {"accuracy": after.accuracy, "loss": after.loss, "weight_bytes": int_bytes},
        "layers": [{"name": layer.name, "op": layer.op} for layer in quantized.graph.layers],
    }


def _show(path: Path, count: int, quantized: Quantized, before: Score, after: Score) -> None:
    rows = [
        (name, f"{100 * score.accuracy:.1f} %", f"{score.loss:.3f}", format_bytes(size))
        for name, score, size in zip(("float", "int8"), (before, after), _bytes(quantized), strict=True)
    ]
    console().print(table("validation pictures", ("network", "accuracy", "loss", "weights and biases"), rows))
    steps = len(quantized.graph.layers)
    console().print(facts(str(path), [("layers", str(steps)), ("ranges from", f"{count} training pictures")]))
