"""What the codec bench compares with: SZ3, zfp and blosc2, as their Python packages have them (the extra `peers`).

None of them knows a ReLU's zeros. blosc2 is lossless: values are rounded to multiples of twice the bound by torch, in
the narrowest integers that hold them, and its bit-shuffle goes before LZ4 or zstd.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Peer(NamedTuple):
    """A codec that is not ours: encode(x, bound) -> what decode takes; decode(that, x) -> float32 in the shape of x.

    `size` is the bytes of what encode gives, and `package` what has to be installed.
    """

    name: str
    package: str
    encode: Callable[[Tensor, float], Any]
    decode: Callable[[Any, Tensor], Tensor]
    size: Callable[[Any], int]


def available() -> tuple[list[Peer], list[str]]:
    """The peers that are installed, and the packages that are not."""
    missing = sorted({peer.package for peer in PEERS if importlib.util.find_spec(peer.package) is None})
    return [peer for peer in PEERS if peer.package not in missing], missing


def _rows(x: Tensor) -> Any:
    """All rows of all maps as one picture: SZ3 and zfp compress that better than three or four axes."""
    return x.flatten(0, -2).numpy()


def _sz(algorithm: str) -> Callable[[Tensor, float], Any]:
    def encode(x: Tensor, bound: float) -> Any:
        from pysz import sz, szAlgorithm, szConfig, szErrorBoundMode

        config = szConfig()
        config.cmprAlgo = getattr(szAlgorithm, algorithm)
        config.errorBoundMode = szErrorBoundMode.ABS
        config.absErrorBound = bound
        config.openmp = torch.get_num_threads() > 1
        return sz.compress(_rows(x), config)[0]

    return encode


def _from_sz(packed: Any, x: Tensor) -> Tensor:
    import numpy as np
    from pysz import sz

    return torch.from_numpy(sz.decompress(packed, np.float32, _rows(x).shape)[0]).view(x.shape)


def _zfp(x: Tensor, bound: float) -> Any:
    import zfpy

    return zfpy.compress_numpy(_rows(x), tolerance=bound)


def _from_zfp(packed: Any, x: Tensor) -> Tensor:
    import zfpy

    return torch.from_numpy(zfpy.decompress_numpy(packed)).view(x.shape)


def _blosc(codec: str) -> Callable[[Tensor, float], Any]:
    def encode(x: Tensor, bound: float) -> Any:
        import blosc2

        step = 2 * bound * (1 - 2.0**-9)  # rounding to float32 must not lead beyond the bound
        most = float(x.abs().max()) / step + 1
        dtype = torch.int8 if most < 2**7 else torch.int16 if most < 2**15 else torch.int32
        codes = (x * (1 / step)).round_().to(dtype).numpy()
        settings = {"codec": getattr(blosc2.Codec, codec), "clevel": 1 if codec == "ZSTD" else 5,
                    "filters": [blosc2.Filter.BITSHUFFLE], "nthreads": torch.get_num_threads()}  # fmt: skip
        return blosc2.compress2(codes, typesize=codes.itemsize, **settings), dtype, step

    return encode


def _from_blosc(packed: Any, x: Tensor) -> Tensor:
    import blosc2

    data, dtype, step = packed
    codes = torch.empty(x.shape, dtype=dtype)
    blosc2.decompress2(data, dst=codes.numpy(), nthreads=torch.get_num_threads())
    return codes * step


PEERS = (
    Peer("SZ3", "pysz", _sz("INTERP_LORENZO"), _from_sz, len),
    Peer("SZ3 without prediction", "pysz", _sz("NOPRED"), _from_sz, len),
    Peer("zfp", "zfpy", _zfp, _from_zfp, len),
    Peer("blosc2 LZ4", "blosc2", _blosc("LZ4"), _from_blosc, lambda packed: len(packed[0])),
    Peer("blosc2 zstd", "blosc2", _blosc("ZSTD"), _from_blosc, lambda packed: len(packed[0])),
)
