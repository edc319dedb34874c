"""Whole networks of few bits, packed, against their float original: eager in both memory orders, and compiled.

Numbers are random, norms and ranges estimated on random pictures: time does not depend on them. The packed network's
answers are compared with those of the simulated one in the same run.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from edgetune.apply import rewrite
from edgetune.bench import timing
from edgetune.bench.convolutions import ConvolutionOptions
from edgetune.compress import recipe
from edgetune.contract import ArithmeticMethod
from edgetune.fit import estimate_norms, fit
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


class WholeOptions(ConvolutionOptions):
    """Which layers and which whole networks, how set, how long; `quick` has no whole networks."""

    networks: tuple[Network, ...]


def rows(methods: Sequence[ArithmeticMethod], options: WholeOptions,
         progress: Callable[[timing.Row], None] | None = None) -> list[timing.Row]:
    """Every network by every method, batch and number of threads; `progress` sees each row when it is there."""
    made: list[timing.Row] = []
    for network in () if options.quick else options.networks:
        for threads in options.threads:
            for batch in options.batches:
                for row in measure(network, methods, batch=batch, threads=threads, rounds=options.rounds,
                                   clock=options.clock, seed=options.seed):
                    made.append(row)
                    if progress is not None:
                        progress(row)
    return made


def measure(network: Network, methods: Sequence[ArithmeticMethod], *, batch: int, threads: int, rounds: int,
            clock: timing.Clock, seed: int, compiles: bool = True) -> list[timing.Row]:
    """A row a method: the packed network beside the fastest of its float forms."""
    torch.manual_seed(seed)
    x = torch.randn(batch, 3, network.size, network.size)
    with timing.threads(threads), torch.no_grad():
        model = load_model(network.name).eval()
        estimate_norms(model, [torch.randn_like(x)])
        floats, few = _floats(model, x, compiles), {method.label: _Few.of(model, method, x) for method in methods}
        runs = {label: each.runs(x) for label, each in few.items()}
        timed = timing.interleave({**floats, **runs}, rounds=rounds, clock=clock)
        apart = {label: each.apart(x) for label, each in few.items()}
    baseline, float_bytes = min(floats, key=timed.ms.__getitem__), len(save(_state(model)))
    return [{
        "case": f"{network.name}@{network.size} whole", "method": f"packed {label}", "batch": batch,
        "threads": threads, "baseline": baseline, "baseline_ms": timed.ms[baseline], "method_ms": timed.ms[label],
        "speedup": timed.ms[baseline] / timed.ms[label], "ratio": float_bytes / _file_bytes(each.packed),
        **{f"{name.replace(' ', '_')}_ms": timed.ms[name] for name in floats},
        "exact": apart[label] <= CLOSE, "error": apart[label], "others": timed.others, "clock": clock, "quick": False,
    } for label, each in few.items()]  # fmt: skip


@dataclass(frozen=True)
class _Few:
    """A network of few bits: as it is simulated, and packed."""

    model: nn.Module
    packed: Packed
    network: PackedNetwork

    @classmethod
    def of(cls, model: nn.Module, method: ArithmeticMethod, x: torch.Tensor) -> _Few:
        few, sample = copy.deepcopy(model), [torch.randn(8, *x.shape[1:])]
        plan = recipe(trace(few, x[:1]), method).plan
        rewrite(few, plan)
        estimate_norms(few, sample)
        fit(few, plan, lambda: sample)
        packed = pack(few, (1, *x.shape[1:]))
        return cls(few, packed, PackedNetwork(packed))

    def runs(self, x: torch.Tensor) -> Callable[[], Any]:
        return lambda: self.network(x)

    def apart(self, x: torch.Tensor) -> float:
        """Largest difference of the two answers; of both on maps in the same order, in which floats are summed."""
        last = x.contiguous(memory_format=torch.channels_last)
        return float((self.network(last) - rounded(self.model)(last)).abs().max())


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
