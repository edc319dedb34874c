"""What every codec's test asks: that it gives back what it was given, within the bound that it states."""

from __future__ import annotations

import torch

from edgetune.codecs import Codec


def there_and_back(codec: Codec, x: torch.Tensor) -> torch.Tensor:
    """What comes back, after a look at the bytes between."""
    packed = codec.encode(x)
    assert (packed.dtype, tuple(packed.shape)) == (torch.uint8, (codec.size(x.shape),))
    return codec.decode(packed, x.shape)


def holds(codec: Codec, x: torch.Tensor) -> None:
    """The error of every element, in float64, against the bound."""
    back = there_and_back(codec, x)
    assert (back.dtype, back.shape) == (torch.float32, x.shape)
    error, bound = (back.double() - x.double()).abs(), codec.bound(x).double()
    assert bound.shape == x.shape
    assert bool((error <= bound).all()), (float((error - bound).max()), x)
