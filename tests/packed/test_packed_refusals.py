"""What has no packed form is refused by name, with the reason and a way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from binary_nets import NETS, rewritten
from edgetune.apply import rewrite
from edgetune.contract import ArithmeticMethod, Plan
from edgetune.errors import ModelError, Refusal
from edgetune.graph import trace
from edgetune.hosts.arithmetic import ArithmeticConv2d
from edgetune.methods.arithmetic.addernet import AdderNet
from edgetune.methods.arithmetic.quantized_adder import QuantizedAdder
from edgetune.methods.arithmetic.xnor import XNOR
from edgetune.models import load_model
from edgetune.overlap import ConvGeometry
from edgetune.packed import pack

SHAPE = (1, 3, 12, 12)
After = Callable[[Any, torch.Tensor], Any]


class Net(nn.Module):
    """A binary layer, then `after` of its answer."""

    def __init__(self, after: After) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.bn, self.up, self.norm = nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 8, 2, 2), nn.GroupNorm(2, 8)
        self.act = nn.ReLU(inplace=True)
        self.after = after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self, self.conv(self.stem(x)))


def by_value(net: Net, x: torch.Tensor) -> torch.Tensor:
    return x if float(x.sum()) > 0 else -x


def overwritten(net: Net, x: torch.Tensor) -> torch.Tensor:
    y = net.bn(x)
    return net.act(y) + y


@pytest.mark.parametrize(("after", "told"), [
    (lambda net, x: net.up(x), "layer 'up' is a ConvTranspose2d, which has no step in a packed network: replace"),
    (lambda net, x: net.norm(x), "layer 'norm' is a GroupNorm"), (lambda net, x: torch.sort(x, 1)[0], "is a sort"),
    (lambda net, x: x * 2, "layer 'mul' is a mul"), (overwritten, "layer 'act' changes in place what is read again"),
    (lambda net, x: torch.flatten(x), r"layer 'flatten' makes \(1152,\) of"), (by_value, "cannot be followed"),
    (lambda net, x: (x, net.bn(x)), "is not the way from one picture to one result")])
def test_refused_by_name(after: After, told: str) -> None:
    model = Net(after).eval()
    geometry = ConvGeometry(in_channels=8, out_channels=8, groups=1, in_hw=(12, 12), kernel=(3, 3), stride=(1, 1),
                            dilation=(1, 1), pads=(1, 1, 1, 1))
    model.conv = ArithmeticConv2d(XNOR(), model.conv, geometry)
    with pytest.raises(Refusal, match=told):
        pack(model, SHAPE)


def test_a_network_without_layers_of_few_bits() -> None:
    with pytest.raises(ModelError, match="no layer of few bits: rewrite it by xnor, dir_net or quantized_adder first"):
        pack(load_model("digits_net"), (1, 1, 32, 32))


@pytest.mark.parametrize(("method", "told"), [
    (AdderNet(), "addernet, which subtracts numbers in float: let it compute in few bits, `edgetune.compress.quan"),
    (QuantizedAdder(), "quantized_adder, which takes the range of every batch anew: fit it to pictures, `edgetune.")])
def test_a_layer_without_a_packed_form(method: ArithmeticMethod, told: str) -> None:
    build, layers = NETS["residual"]
    model = build()
    plan = {layers[0]: (XNOR(),), layers[1]: (method,)}
    rewrite(model, Plan(input_shape=SHAPE, layers=plan), trace(model, torch.zeros(SHAPE)))
    with pytest.raises(Refusal, match=rf"layer 'body\.1\.conv2' computes by {told}"):
        pack(model, SHAPE)


def test_numbers_that_cannot_be_packed() -> None:
    build, layers = NETS["residual"]
    model = rewritten(build(), layers, XNOR(), SHAPE)
    with pytest.raises(ModelError, match=r"is torch\.float64 on cpu: pack the network as `model\.float\(\)\.cpu\(\)`"):
        pack(model.double(), SHAPE)
    model.float().get_parameter("head.bias").data[0] = float("nan")
    with pytest.raises(ModelError, match=r"'head\.bias' has a value that is not finite"):
        pack(model, SHAPE)
