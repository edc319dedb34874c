"""Going backward through a block by hidden channel gives the gradients of the whole block."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.grad import conv2d_input, conv2d_weight

from edgetune import kernels
from edgetune.contract import Needs
from edgetune.quantize import Quantized, QuantizedNetwork, integer, last_layers, quantize
from edgetune.quantize.record import Conv
from edgetune.quantize.rules import ConvRule, handle


class Block(nn.Module):
    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU6())
        self.b = nn.Sequential(nn.Conv2d(6, 6, kernel, stride, kernel // 2, groups=6), nn.ReLU6())
        self.c = nn.Conv2d(6, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x)))


class Step:
    """One convolution of the block: what it reads, its mask as 0 and 1, its weight and scale, float64."""

    def __init__(self, quantized: Quantized, layer: Conv, x: torch.Tensor) -> None:
        source, tensors = quantized.graph.quantization(layer.sources[0]), quantized.tensors
        self.weight, bias = tensors[f"{layer.name}.weight"], tensors[f"{layer.name}.bias"]
        self.scale = source.scale * tensors[f"{layer.name}.weight_scale"] / layer.out.scale
        multiplier, shift = integer.fixed_point(self.scale)
        params = {"weight": self.weight, "bias": bias, "weight_scale": tensors[f"{layer.name}.weight_scale"],
                  "multiplier": multiplier, "shift": shift}  # fmt: skip
        (_, self.y), kept = ConvRule(layer, source).forward(
            None, [handle(x.shape, torch.zeros((), dtype=torch.float64)), x], params, Needs((True, False), frozenset())
        )
        self.mask = kernels.mask_apply(torch.ones(self.y.shape, dtype=torch.float64), kept["mask"])
        self.x, self.weight = x.double() - source.zero_point, self.weight.double()
        self.how = {"stride": layer.geometry.stride, "padding": layer.geometry.pads[::2]}


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (1, 1)])
def test_by_hidden_channel(kernel: int, stride: int) -> None:
    torch.manual_seed(kernel + stride)
    model, x = Block(kernel, stride).eval(), 2 * torch.randn(1, 4, 9, 7, dtype=torch.float64)
    quantized = quantize(model.float(), [x.float() / 2])  # wider pictures meet the clamps
    network = QuantizedNetwork(quantized, last_layers(quantized.graph, 9)).double()
    y = network(x)
    gy = torch.randn_like(y)
    y.backward(gy)
    maps, steps = integer.quantize(x, quantized.graph.input).to(torch.int8), []
    for layer in quantized.graph.convs:
        steps.append(Step(quantized, layer, maps))
        maps = steps[-1].y
    a, b, c = steps
    assert all(0 < step.mask.mean() < 1 for step in (a, b))
    g = gy * quantized.graph.layers[-1].out.scale * c.mask * c.scale.view(1, -1, 1, 1)
    gw = [torch.zeros_like(step.weight) for step in steps]
    for channel in range(6):
        own = slice(channel, channel + 1)
        gw[2][:, own] = conv2d_weight(c.x[:, own], (5, 1, 1, 1), g)
        inner = conv2d_input(b.y[:, own].shape, c.weight[:, own], g) * b.mask[:, own] * b.scale[channel]
        gw[1][own] = conv2d_weight(b.x[:, own], b.weight[own].shape, inner, **b.how)
        inner = conv2d_input(a.y[:, own].shape, b.weight[own], inner, **b.how) * a.mask[:, own] * a.scale[channel]
        gw[0][own] = conv2d_weight(a.x, a.weight[own].shape, inner)
    for conv, found in zip(network.convs(), gw, strict=True):
        torch.testing.assert_close(conv.weight.value.grad, found, rtol=1e-9, atol=1e-12 * float(found.abs().max()))
