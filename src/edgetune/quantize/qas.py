"""Quantization-aware scaling: gradients of integers in proportion to the integers, so that one rate fits all layers.

What it does
    A weight is W = s_w * W_q, so its integer's gradient is G_Wq = s_w * G_W: with a small s_w the integers are large
    and their gradients small. |W_q| / |G_Wq| is s_w**-2 times what it is in float, other for every layer and channel,
    and plain SGD hardly moves the integers. Multiplying by s_w**-2 gives back the float network's proportions: a step
    on W_q is then exactly a step of float SGD on W, counted in units of s_w. There is nothing to tune.

    W, however, is not what a float network trains: it is gain * V, the filter V with its norm folded in. A step on W
    moves V by gain**-2 times as much, so that filters with a small gain leave the range in which the rate is stable.
    Multiplying by gain**2 as well makes a step on W_q the step of float SGD on V, at the rate that suits V.

Shapes
    gw (o i u v) times (gain / s_w)**2 (o), gb (o) times (s_w * s_x)**-2 (o), s_x the scale of the layer's input. The
    float head is left as it is.

What is kept (bytes)
    Nothing of its own. Of the integer network: one bit an output of every convolution, add and mean behind the first
    layer that learns, one byte a value of the inputs of convolutions whose weight learns; 4 bytes a feature of the
    head. Float weights (`Rounded`) are 4 bytes each, integer ones (`Stepped`) 1.

What changes in the gradient or the answer
    The gradient's length by layer and channel, never its sign. Call it after `backward` and before clipping and the
    optimizer. With `Rounded` the weights are floats that the forward pass rounds, so that steps below one integer add
    up. With `Stepped` they are int8 between steps: rounding to the nearest would lose such steps, so `StochasticSGD`
    rounds by chance and keeps their mean.

When not to use
    With optimizers that scale by gradient size themselves (Adam): the factor cancels. Momentum and weight decay work,
    but with a momentum buffer `Stepped` saves less. Biases move by (s_w * s_x)**-2: where an input's scale is tiny,
    clip.

Reference
    Lin, Zhu, Chen, Wang, Gan, Han: On-Device Training Under 256KB Memory, NeurIPS 2022, section 3.1, eqs. 2-4. The
    factors are by output channel; the first version's equation 4 has another exponent. The paper states int8 weights
    and its experiments round floats; both are here. The gain and stochastic rounding are ours; `gains=False` leaves
    the gain out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from edgetune.quantize.network import QuantizedConv, QuantizedNetwork
from edgetune.quantize.weights import Held, Stepped


def factors(weight_scale: torch.Tensor, input_scale: float, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What gradients of weight and bias are multiplied by, each (o) in the type of `weight_scale`."""
    return (gain / weight_scale) ** 2, (weight_scale * input_scale) ** -2


@torch.no_grad()
def scale_gradients(network: QuantizedNetwork, *, gains: bool = True) -> None:
    """Multiply the gradients of all learning integers in place; once after every backward pass.

    Without `gains` as published: a step is then one of float SGD on filters that their norms are folded into.
    """
    for conv in network.convs():
        gain = conv.gain if gains else torch.ones_like(conv.gain)
        _scale(conv, factors(conv.weight_scale, conv.input_scale, gain))


def _scale(conv: QuantizedConv, by: tuple[torch.Tensor, torch.Tensor]) -> None:
    for held, factor in zip((conv.weight, conv.bias), by, strict=True):
        grad = next((p.grad for p in held.parameters()), None)
        if grad is not None:
            grad.mul_(held.learning(factor).to(grad.dtype).view(-1, *[1] * (grad.ndim - 1)))


class StochasticSGD(torch.optim.SGD):
    """SGD for a network with `Stepped` integers: their steps are rounded by chance; all else learns as with SGD.

    Takes SGD's settings but `nesterov`, `dampening` and `maximize`. `seed` decides the chances, those of each tensor by
    themselves, so that the order in which tensors take their step is no matter.
    """

    def __init__(self, network: nn.Module, lr: float, momentum: float = 0.0, weight_decay: float = 0.0,
                 seed: int = 0) -> None:
        learning: Iterable[nn.Parameter] = [p for p in network.parameters() if p.requires_grad]
        super().__init__(learning, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.held: dict[nn.Parameter, Held] = {m.handle: m for m in network.modules() if isinstance(m, Stepped)}
        self.chances = {handle: torch.Generator().manual_seed(seed + place) for place, handle in enumerate(self.held)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step. Integers move first, and their gradients are then dropped, so that SGD passes over them."""
        for group in self.param_groups:
            for parameter in group["params"]:
                held = self.held.get(parameter)
                if isinstance(held, Stepped) and parameter.grad is not None:
                    held.move(-group["lr"] * self._direction(parameter, held, group), self.chances[parameter])
                    parameter.grad = None
        return super().step(closure)

    def _direction(self, parameter: nn.Parameter, held: Stepped, group: dict[str, Any]) -> torch.Tensor:
        assert parameter.grad is not None
        direction = parameter.grad
        if group["weight_decay"]:
            direction = direction + group["weight_decay"] * held.value
        if group["momentum"]:
            state = self.state[parameter]
            before = state.get("momentum_buffer")
            direction = direction if before is None else group["momentum"] * before + direction
            state["momentum_buffer"] = direction.clone()
        return direction
