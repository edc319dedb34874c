"""How tensors are written as bytes: one interface, one file a codec."""

from edgetune.codecs.bounded import Bounded, used_bound
from edgetune.codecs.codec import Codec
from edgetune.codecs.grouped import Grouped
from edgetune.codecs.plain import PLAIN, Float16, Float32, Int8
from edgetune.codecs.slotted import Slotted

FIXED: dict[str, Codec] = {**PLAIN, "int4": Grouped(4, stochastic=False), "bounded": Slotted()}
"""Codecs of fixed size that give the same bytes every time: what a store of many samples takes, by name."""

__all__ = ["FIXED", "PLAIN", "Bounded", "Codec", "Float16", "Float32", "Grouped", "Int8", "Slotted", "used_bound"]
