"""Integer networks: quantize a float network, run it to the bit as a microcontroller does, and train it there."""

from __future__ import annotations

from edgetune.quantize.arena import added_bytes, extra_bytes, flash_bytes, training_arena
from edgetune.quantize.network import QuantizedNetwork, last_layers
from edgetune.quantize.ptq import quantize
from edgetune.quantize.qas import StochasticSGD, scale_gradients
from edgetune.quantize.ranges import MinMax, Percentile
from edgetune.quantize.record import Quantized, QuantizedGraph
from edgetune.quantize.weights import Rounded, Stepped

__all__ = [
    "quantize",
    "MinMax",
    "Percentile",
    "Quantized",
    "QuantizedGraph",
    "QuantizedNetwork",
    "last_layers",
    "Rounded",
    "Stepped",
    "scale_gradients",
    "StochasticSGD",
    "training_arena",
    "extra_bytes",
    "added_bytes",
    "flash_bytes",
]
