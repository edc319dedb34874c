"""A whole binary network, packed, against its float original: eager in both memory orders, and compiled.

Numbers are random, norms estimated on random pictures: time does not depend on them. The packed network's answers are
compared with those of the simulated one in the same run.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from edgetune.apply import rewrite
from edgetune.bench import timing
from edgetune.compress import estimate_norms, recipe
from edgetune.contract import ArithmeticMethod
from edgetune.graph import trace
from edgetune.models import load_model
from edgetune.packed import Packed, PackedNetwork, pack, rounded
from edgetune.record import Record

CLOSE = 1e-4
"""Largest difference of logits that counts as the same answer."""


class Network(Record):
    """A network by name, on square pictures of `size` px."""

    name: str
    size: int


def measure(network: Network, method: ArithmeticMethod, *, batch: int, threads: int, rounds: int, clock: timing.Clock,
            seed: int, compiles: bool = True) -> timing.Row:
    """One row: the packed network beside the fastest of its float forms."""
    torch.manual_seed(seed)
    x = torch.randn(batch, 3, network.size, network.size)
    with timing.threads(threads), torch.no_grad():
        model = load_model(network.name).eval()
        estimate_norms(model, [torch.randn_like(x)])
        floats = _floats(model, x, compiles)
        binary = copy.deepcopy(model)
        rewrite(binary, recipe(trace(binary, x[:1]), method).plan)
        estimate_norms(binary, [torch.randn(8, *x.shape[1:])])
        packed = pack(binary, (1, *x.shape[1:]))
        runs = PackedNetwork(packed)
        timed = timing.interleave({**floats, "packed": lambda: runs(x)}, rounds=rounds, clock=clock)
        apart = float((runs(x) - rounded(binary)(x)).abs().max())
    baseline = min(floats, key=timed.ms.__getitem__)
    return {
        "case": f"{network.name}@{network.size} whole", "method": f"packed {method.label}", "batch": batch,
        "threads": threads, "baseline": baseline, "baseline_ms": timed.ms[baseline], "method_ms": timed.ms["packed"],
        "speedup": timed.ms[baseline] / timed.ms["packed"], "ratio": len(save(_state(model))) / _file_bytes(packed),
        **{f"{name.replace(' ', '_')}_ms": timed.ms[name] for name in floats},
        "exact": apart <= CLOSE, "error": apart, "others": timed.others, "clock": clock, "quick": False,
    }  # fmt: skip


def _floats(model: nn.Module, x: torch.Tensor, compiles: bool) -> dict[str, Callable[[], Any]]:
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x_last = x.contiguous(memory_format=torch.channels_last)
    made: dict[str, Callable[[], Any]] = {"contiguous": lambda: model(x), "channels last": lambda: last(x_last)}
    if compiles:
        frozen: Any = torch.compile(last, options={"freezing": True})
        made["compiled"] = lambda: frozen(x_last)
    return made


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def _file_bytes(packed: Packed) -> int:
    with tempfile.TemporaryDirectory() as folder:
        packed.save(Path(folder) / "packed")
        return (Path(folder) / "packed").stat().st_size
