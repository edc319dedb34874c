"""`edgetune bench binary`: convolutions of one bit a weight, layer by layer and as whole networks.

A whole network is packed (`bench.whole`). A layer reads packed signs, as it does inside one. "bits to floats" gives the
affine float answer that a shortcut needs, "bits to bits" the packed signs that the next layer reads, "floats to floats"
packs a float map first. "8 bits to floats" reads 8-bit activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from edgetune import kernels
from edgetune.bench import timing, whole
from edgetune.bench.convolutions import Candidate, Drawn, measure
from edgetune.hosts.binary import layer_of, signs_of
from edgetune.methods.arithmetic.xnor import XNOR

SPEEDUPS = ("speedup", "int8_speedup", "gmac_s")


class Options(whole.WholeOptions):
    """Which layers and which whole networks, how set, how long."""

    networks: tuple[whole.Network, ...] = (whole.Network(name="resnet18", size=224),
                                           whole.Network(name="vgg_small", size=32),
                                           whole.Network(name="resnet20_bireal", size=32))


def candidates(drawn: Drawn) -> Sequence[Candidate]:
    """The layer with packed filters, in the ways that a packed network computes it."""
    geometry, x = drawn.shape.geometry, drawn.x.contiguous(memory_format=torch.channels_last)
    layer, groups, channels = layer_of(geometry, 1), geometry.groups, geometry.in_channels
    filters = kernels.arrange_filters(kernels.sign_pack(drawn.weight), channels, groups)
    bits, o = kernels.sign_pack(x), geometry.out_channels
    scale, shift = torch.rand(o) + 0.5, torch.randn(o)
    limits = torch.randint(-3, 4, (o,), dtype=torch.int32)
    bytes_, eight = (x.relu() * 40).clamp(max=255).to(torch.uint8), layer._replace(pad_value=0)

    def slow(read: torch.Tensor, border: float) -> torch.Tensor:
        top, bottom, left, right = geometry.pads
        return F.conv2d(F.pad(read.double(), (left, right, top, bottom), value=border), signs_of(drawn.weight).double(),
                        None, geometry.stride, 0, 1, groups)

    def affine(sums: torch.Tensor) -> torch.Tensor:
        return sums * scale.view(-1, 1, 1).double() + shift.view(-1, 1, 1).double()

    def close(found: torch.Tensor | None, sums: torch.Tensor) -> bool:
        return found is not None and torch.allclose(found.double(), affine(sums), rtol=1e-5, atol=1e-4)

    def norm(read: torch.Tensor) -> torch.Tensor | None:
        return kernels.binary_conv_clip(read, filters, layer, None, scale, shift)[0]

    def floats() -> torch.Tensor | None:
        return norm(bits)

    def packed() -> torch.Tensor:
        return kernels.binary_conv_sign(bits, filters, layer, limits)

    def both() -> torch.Tensor | None:
        return norm(kernels.sign_pack(x))

    def eights() -> torch.Tensor:
        return kernels.bit_weight_conv(bytes_, filters, eight, scale, shift)

    def signs_agree() -> bool:
        sums = slow(signs_of(x), 1.0)
        return torch.equal(packed(), kernels.sign_pack((sums - limits.view(-1, 1, 1)).float()))

    return (Candidate("bits to floats", floats, lambda: close(floats(), slow(signs_of(x), 1.0))),
            Candidate("bits to bits", packed, signs_agree),
            Candidate("floats to floats", both, lambda: close(both(), slow(signs_of(x), 1.0))),
            Candidate("8 bits to floats", eights, lambda: close(eights(), slow(bytes_, 0.0))))


def run(options: Options | None = None, progress: Callable[[timing.Row], None] | None = None) -> timing.Result:
    """Measure every network and every layer; `progress` sees each row as soon as it is there."""
    options = options or Options()
    return timing.result([*whole.rows((XNOR(),), options, progress), *measure(candidates, options, progress)])


def summarise(path: str) -> list[timing.Row]:
    """The medians over the layers, one row a machine, method, batch and number of threads."""
    return timing.medians(timing.read(path), SPEEDUPS, ("machine", "method", "batch", "threads"))
