"""Codecs on the maps of networks in training: bytes, speed, zeros and the error of every element, beside other codecs.

All codecs have the same maps, and take turns in one process. A bound is relative to the standard deviation of a map's
values other than zero; ratio and speed are those of all maps of a kind together. The speed is in bytes of float32,
which encoding reads and decoding writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from edgetune.bench import activations, codec_peers, timing
from edgetune.bench.codec_peers import Peer
from edgetune.codecs import Bounded, Codec, Grouped
from edgetune.errors import EdgetuneError
from edgetune.record import Record

GB = 1e9
GROUPED_BITS = (8, 4, 2)


def _several(threads: object) -> object:
    return (threads,) if isinstance(threads, int) else threads


class CodecOptions(Record):
    """Which maps at which relative bounds, by how many threads. `each` is how many maps of a kind there are;
    `quick` is one small map a kind, one round, and no other codecs.
    """

    data: str = os.environ.get("EDGETUNE_DATA", "../shared/data")
    networks: tuple[str, ...] = tuple(activations.NETWORKS)
    bounds: tuple[float, ...] = (1e-3, 1e-2, 5e-2)
    batch: int = Field(4, ge=1)
    size_px: int = Field(224, ge=32)
    each: int = Field(4, ge=1)
    threads: Annotated[tuple[int, ...], BeforeValidator(_several)] = (1, 2)
    clock: timing.Clock = "wall"
    rounds: int = Field(5, ge=1)
    peers: bool = True
    quick: bool = False


def run(options: CodecOptions | None = None, progress: Callable[[timing.Row], None] | None = None) -> timing.Result:
    """Measure every codec on every kind of map; `progress` sees each row as soon as it is there.

    Raises EdgetuneError for a network that is not among `activations.NETWORKS`.
    """
    options = options or CodecOptions()
    if options.quick:
        options = options.model_copy(update={"batch": 1, "size_px": 64, "each": 1, "rounds": 1, "peers": False})
    if strangers := sorted(set(options.networks) - set(activations.NETWORKS)):
        raise EdgetuneError(f"no maps of network '{strangers[0]}' are at hand: "
                            f"choose among {', '.join(activations.NETWORKS)}")
    peers, missing = codec_peers.available() if options.peers else ([], [])
    rows: list[timing.Row] = []
    for network in options.networks:
        found = activations.maps(network, Path(options.data), options.batch, options.size_px, options.each)
        for kind, maps in found.items():
            for row in _rows(f"{network}@{options.size_px} {kind}", maps, peers, options):
                row["not_installed"] = ", ".join(missing) or None
                rows.append(row)
                if progress is not None:
                    progress(row)
    return timing.result(rows)


def _rows(case: str, maps: Sequence[Tensor], peers: Sequence[Peer], options: CodecOptions) -> Iterator[timing.Row]:
    """All bounds, and then the codecs that take none."""
    bounded: list[_Ours | _Theirs] = [_Ours("bounded", Bounded), *(_Theirs(peer) for peer in peers)]
    grouped = [_Ours(f"{bits} bits in groups", partial(_grouped, bits)) for bits in GROUPED_BITS]
    for bound in (*options.bounds, None):
        facts = {"case": case, "bound": bound, "batch": options.batch, "clock": options.clock, "quick": options.quick}
        bounds = [(bound or 0) * _deviation(x) for x in maps]
        if bound is not None:
            entropy_bytes = sum(_entropy_bytes(x, e) for x, e in zip(maps, bounds))
            facts["entropy_ratio"] = 4 * sum(x.numel() for x in maps) / entropy_bytes
        for threads in options.threads:
            with timing.threads(threads), torch.no_grad():
                yield from _side_by_side(maps, bounds, grouped if bound is None else bounded, options.rounds,
                                         {**facts, "threads": threads})


def _grouped(bits: int, _: float) -> Codec:
    return Grouped(bits)


class _Theirs:
    """A peer, as the bench asks for codecs."""

    def __init__(self, peer: Peer) -> None:
        self.name, self.encode, self.decode, self.size = peer.name, peer.encode, peer.decode, peer.size

    def bound(self, x: Tensor, bound: float) -> float | Tensor:
        return bound


class _Ours:
    """A codec of this package, made for each bound."""

    def __init__(self, name: str, make: Callable[[float], Codec]) -> None:
        self.name, self.make = name, make

    def encode(self, x: Tensor, bound: float) -> Any:
        return self.make(bound).encode(x), bound

    def decode(self, packed: Any, x: Tensor) -> Tensor:
        return self.make(packed[1]).decode(packed[0], x.shape)

    def size(self, packed: Any) -> int:
        return int(packed[0].numel())

    def bound(self, x: Tensor, bound: float) -> float | Tensor:
        return self.make(bound).bound(x)


def _side_by_side(maps: Sequence[Tensor], bounds: Sequence[float], codecs: Sequence[_Ours | _Theirs], rounds: int,
                  facts: dict[str, Any]) -> Iterator[timing.Row]:
    """A row a codec, all of them timed in turns."""
    packed = {codec.name: [codec.encode(x, e) for x, e in zip(maps, bounds)] for codec in codecs}
    functions: dict[str, Callable[[], object]] = {}
    for codec in codecs:
        functions[f"encode {codec.name}"] = _encoding(codec, maps, bounds)
        functions[f"decode {codec.name}"] = _decoding(codec, packed[codec.name], maps)
    timed = timing.interleave(functions, rounds=rounds, clock=facts["clock"])
    read = 4 * sum(x.numel() for x in maps)
    for codec in codecs:
        own = packed[codec.name]
        yield {
            **facts,
            "codec": codec.name,
            "ratio": read / sum(codec.size(each) for each in own),
            "encode_gb_s": read / GB / (timed.ms[f"encode {codec.name}"] / 1e3),
            "decode_gb_s": read / GB / (timed.ms[f"decode {codec.name}"] / 1e3),
            **_errors(maps, [codec.decode(each, x) for each, x in zip(own, maps)],
                      [codec.bound(x, e) for x, e in zip(maps, bounds)]),
            "others": timed.others,
        }


def _encoding(codec: _Ours | _Theirs, maps: Sequence[Tensor], bounds: Sequence[float]) -> Callable[[], object]:
    def all_maps() -> None:
        for x, bound in zip(maps, bounds):
            codec.encode(x, bound)

    return all_maps


def _decoding(codec: _Ours | _Theirs, packed: Sequence[Any], maps: Sequence[Tensor]) -> Callable[[], object]:
    def all_maps() -> None:
        for each, x in zip(packed, maps):
            codec.decode(each, x)

    return all_maps


def _errors(maps: Sequence[Tensor], back: Sequence[Tensor], bounds: Sequence[float | Tensor]
            ) -> dict[str, float | None]:  # fmt: skip
    """`error`: the largest of all elements, as a share of the codec's bound there, and `deviations`, of the map's
    deviation. `zeros_kept`: the share of zeros that are zero again; `zeros_made`: of other values that became zero."""
    errors = [(x.double() - y).abs() for x, y in zip(maps, back)]
    zeros = sum(int((x == 0).sum()) for x in maps)
    kept = sum(int(((x == 0) & (y == 0)).sum()) for x, y in zip(maps, back))
    lost = sum(int(((x != 0) & (y == 0)).sum()) for x, y in zip(maps, back))
    return {
        "error": max(float((error / e).nan_to_num(nan=0.0).max()) for error, e in zip(errors, bounds)),  # 0 / 0 is none
        "deviations": max(float(error.max()) / _deviation(x) for error, x in zip(errors, maps)),
        "zeros_kept": kept / zeros if zeros else None,
        "zeros_made": lost / (sum(x.numel() for x in maps) - zeros),
    }


def _deviation(x: Tensor) -> float:
    return float(x[x != 0].double().std())


def _entropy_bytes(x: Tensor, bound: float) -> float:
    """What a code of single values needs at best: a bit that tells zeros, where there are any, and the entropy of the
    others' cells over the whole map."""
    values = x[x != 0].double()
    counts = torch.unique((values / (2 * bound)).floor(), return_counts=True)[1].double()
    bits = values.numel() * torch.log2(counts.sum()) - (counts * counts.log2()).sum()
    return (float(bits) + (x.numel() if values.numel() < x.numel() else 0)) / 8
