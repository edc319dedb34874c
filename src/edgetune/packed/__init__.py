"""Packed networks: a network of few bits on kernels for them, with the answer that it had in training, in one small
file."""

from __future__ import annotations

from edgetune.packed.coding import rounded
from edgetune.packed.network import PackedNetwork
from edgetune.packed.pack import pack
from edgetune.packed.record import Packed, PackedGraph

__all__ = ["pack", "rounded", "Packed", "PackedGraph", "PackedNetwork"]
