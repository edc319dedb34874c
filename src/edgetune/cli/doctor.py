"""`edgetune doctor`"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgetune.cli import options
from edgetune.cli.output import console, emit, facts

if TYPE_CHECKING:
    from edgetune.doctor import Health

EXAMPLES = (
    ("edgetune doctor", "versions, processor, memory, threads and kernels"),
    ("edgetune doctor --json doctor.json", "the same to attach to a report of a problem"),
)


def doctor(json: options.Json = None) -> None:
    """Say what this machine offers: versions, processor, compiler, native kernels, threads and memory.

    Kernels are compiled for this processor when they are first needed; without a compiler the same operations run in
    plain torch, only slower, and this is where that shows.
    """
    from edgetune.doctor import examine

    health = examine()
    emit(json, lambda: health.model_dump(mode="json"), lambda: _show(health))


def _show(health: Health) -> None:
    from edgetune.units import format_bytes

    kernels = health.kernels
    native = [name for name, how in kernels.ops.items() if how == "native"]
    memory = (
        "unknown"
        if health.memory_bytes is None or health.memory_available_bytes is None
        else f"{format_bytes(health.memory_bytes)}, of which {format_bytes(health.memory_available_bytes)} are free"
    )
    rows = [
        ("system", f"{health.system}, Python {health.python}"),
        ("processor", health.cpu),
        ("features", " ".join(health.cpu_features) or "none that matter here"),
        ("threads", f"{health.threads} on {health.cores} cores"),
        ("memory", memory),
        ("CUDA", ", ".join(health.cuda) or "no device"),
        ("compiler", kernels.compiler or "none"),
        ("kernels", f"{len(native)} of {len(kernels.ops)} native: {kernels.reason}"),
        ("library", kernels.library or "none"),
    ]
    console().print(facts("machine", rows))
    console().print(
        facts("packages", [(name, version or "not installed") for name, version in health.packages.items()])
    )
    console().print(facts("kernels", list(kernels.ops.items())))
    for sentence in health.advice:
        console().print(f"[yellow]{sentence}[/yellow]")
