"""How tensors are written as bytes: one interface, one file a codec."""

from edgetune.codecs.codec import Codec
from edgetune.codecs.plain import PLAIN, Float16, Float32, Int8

__all__ = ["PLAIN", "Codec", "Float16", "Float32", "Int8"]
