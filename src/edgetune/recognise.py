"""What a traced call is: a table from torch's modules and functions to the kinds that methods speak of.

Each describer returns the fields of a `Call` that the layer itself determines: kind, function, parameter names,
geometry, attributes, whether it writes into its input. A subclass that overrides `forward` is not stock, and is
followed instead of believed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from edgetune.overlap import ConvGeometry, same_pads

Facts = dict[str, Any]

MASKS: dict[str, tuple[float, float]] = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0), "hardtanh": (-1.0, 1.0)}
"""Activations whose slope is one bit: 1 strictly between the bounds, 0 elsewhere."""

SMOOTH: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "hardswish": F.hardswish, "silu": F.silu, "gelu": F.gelu, "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid, "tanh": torch.tanh, "mish": F.mish, "elu": F.elu}
"""Pointwise activations without settings, whose slope is a number."""

_ACTIVATION_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish", nn.SiLU: "silu", nn.GELU: "gelu",
    nn.Sigmoid: "sigmoid", nn.Hardsigmoid: "hardsigmoid", nn.Tanh: "tanh", nn.Mish: "mish", nn.Hardtanh: "hardtanh"}

_ACTIVATION_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu6: "relu6", F.hardswish: "hardswish",
    F.silu: "silu", F.sigmoid: "sigmoid", torch.sigmoid: "sigmoid", F.hardsigmoid: "hardsigmoid",
    torch.tanh: "tanh", F.mish: "mish", F.hardtanh: "hardtanh"}

_ADDS = {operator.add, operator.iadd, torch.add}
_MULTIPLIES = {operator.mul, operator.imul, torch.mul}


INTEGERS = "integers"
"""The kind of a module that is a whole network in integers."""


class IntegerLayer(nn.Module):
    """The base of modules that compute in integers: one call, with nothing to follow inside."""


ARITHMETIC = "arithmetic"
"""The kind of a convolution whose numbers a method changes; the call's function is the method's name."""


class ArithmeticLayer(nn.Module):
    """The base of such convolutions (see `edgetune.hosts.arithmetic`): one call, with nothing to follow inside.

    `method_name` is the method's, `same` whether pads follow the map as TensorFlow's do, `remembers` the buffers.
    """

    method_name: str
    same: bool
    remembers: tuple[str, ...]


def is_layer(module: nn.Module) -> bool:
    """Whether a module is one call, not to be followed further."""
    return type(module) in _MODULES or _is_same_conv(module) or isinstance(module, (IntegerLayer, ArithmeticLayer))


def describe_module(module: nn.Module, name: str, given: list[torch.Tensor]) -> Facts:
    """The facts of a module's call on the tensors `given`."""
    describe = _conv if _is_same_conv(module) else _MODULES.get(type(module), _other)
    facts = {"name": name, **describe(module, given)}
    if isinstance(module, ArithmeticLayer):
        facts["state"] = {role: f"{name}.{role}" for role in module.remembers}
    held = {role: f"{name}.{role}" if name else role for role, _ in module.named_parameters(recurse=False)}
    if facts["kind"] == "norm":
        held |= {role: f"{name}.{role}" for role in ("running_mean", "running_var")
                 if getattr(module, role, None) is not None}
    return {"params": held, **facts}


def describe_function(node: fx.Node, given: list[torch.Tensor]) -> Facts:
    """The facts of a call of a function, such as a residual add or a functional normalisation."""
    target: Any = node.target
    name = getattr(target, "__name__", str(target))
    if target in _ADDS and len(given) == 2 and given[0].shape == given[1].shape and _plain(node):
        return {"kind": "add", "function": "add", "in_place": target is operator.iadd}
    if target in _MULTIPLIES and len(given) == 2 and _is_gate(given) and _plain(node):
        return {"kind": "scale", "function": "mul", "in_place": target is operator.imul}
    if target in _ACTIVATION_FUNCTIONS and (target is not F.hardtanh or _only_clips(node)):
        in_place = target is torch.relu_ or bool(node.kwargs.get("inplace", False))
        return {"kind": "activation", "function": _ACTIVATION_FUNCTIONS[target], "in_place": in_place}
    if target is torch.flatten:
        return {"kind": "flatten", "function": "flatten"}
    if target is F.adaptive_avg_pool2d and node.args[1:] in ((1,), ((1, 1),)):
        return {"kind": "mean", "function": "adaptive_avg_pool2d", "attributes": {"keepdim": True}}
    if target is F.batch_norm and len(node.args) >= 5:
        return _functional_norm(node)
    if target is operator.getitem and (strides := _strides(node)) is not None:
        return {"kind": "subsample", "function": name, "attributes": dict(zip(("stride_h", "stride_w"), strides))}
    if target is F.pad and (channels := _channel_pad(node)) is not None:
        return {"kind": "pad", "function": name, "attributes": dict(zip(("before", "after"), channels))}
    return {"kind": "other", "function": name}


def describe_method(node: fx.Node, given: list[torch.Tensor]) -> Facts:
    """The facts of a tensor's own method, such as `x.mean([2, 3])`."""
    name = str(node.target)
    if name == "mean" and given and given[0].dim() == 4:
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if isinstance(dims, (list, tuple)) and sorted(int(d) % 4 for d in dims) == [2, 3]:  # type: ignore[arg-type]
            return {"kind": "mean", "function": "mean", "attributes": {"keepdim": bool(node.kwargs.get("keepdim"))}}
    if name in ("add", "add_") and len(given) == 2 and given[0].shape == given[1].shape and _plain(node):
        return {"kind": "add", "function": "add", "in_place": name == "add_"}
    if name in ("flatten", "view", "reshape"):
        return {"kind": "flatten", "function": name}
    return {"kind": "other", "function": name, "in_place": name.endswith("_") and not name.startswith("__")}


def _plain(node: fx.Node) -> bool:
    """Two operands and nothing else: `torch.add(x, y, alpha=2)` is another function."""
    return len(node.args) == 2 and not node.kwargs


def _only_clips(node: fx.Node) -> bool:
    """A hardtanh of its own bounds, -1 and 1."""
    return len(node.args) == 1 and not node.kwargs.keys() - {"inplace"}


def _strides(node: fx.Node) -> tuple[int, int] | None:
    """The strides of `x[:, :, ::a, ::b]`, which takes every a-th row and b-th column, or None."""
    index = node.args[1]
    if not isinstance(index, tuple) or len(index) != 4 or not all(isinstance(part, slice) for part in index):
        return None
    n, c, rows, columns = (part for part in index if isinstance(part, slice))
    if n != slice(None) or c != slice(None) or any(part.start or part.stop is not None for part in (rows, columns)):
        return None
    return int(rows.step or 1), int(columns.step or 1)


def _channel_pad(node: fx.Node) -> tuple[int, int] | None:
    """The zero channels that `F.pad` puts before and after a map (n c h w) and nothing else, or None."""
    pads = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad")
    constant = node.kwargs.get("mode", "constant") == "constant" and not node.kwargs.get("value")
    if len(node.args) > 2 or not constant or not isinstance(pads, (tuple, list)) or len(pads) != 6:
        return None
    numbers = [pad for pad in pads if isinstance(pad, int) and pad >= 0]
    return (numbers[4], numbers[5]) if numbers[:4] == [0, 0, 0, 0] and len(numbers) == 6 else None


def _is_gate(given: list[torch.Tensor]) -> bool:
    """One factor is a map (n c h w), the other one number a channel (n c 1 1), as squeeze-excite makes."""
    shapes = sorted((tuple(x.shape) for x in given), key=lambda shape: shape[2:] == (1, 1))
    return (all(len(shape) == 4 for shape in shapes) and shapes[0][:2] == shapes[1][:2]
            and shapes[1][2:] == (1, 1) and shapes[0][2:] != (1, 1))


def _is_same_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and type(module).__name__ == "Conv2dSame"


def _conv(module: nn.Module, given: list[torch.Tensor]) -> Facts:
    assert isinstance(module, nn.Conv2d)
    if module.padding_mode != "zeros" or given[0].dim() != 4:
        return {"kind": "other", "function": f"conv2d with {module.padding_mode} padding"}
    height, width = int(given[0].shape[2]), int(given[0].shape[3])
    kernel, stride, dilation = _two(module.kernel_size), _two(module.stride), _two(module.dilation)
    same = _is_same_conv(module) or (isinstance(module, ArithmeticLayer) and module.same)
    if same:
        pads = same_pads((height, width), kernel, stride, dilation)
    else:
        # torch keeps the resolved pads of 'same' and 'valid' here, last axis first
        left, right, top, bottom = module._reversed_padding_repeated_twice
        pads = (top, bottom, left, right)
    return {"kind": "conv", "function": "conv2d",
            "geometry": ConvGeometry(in_channels=module.in_channels, out_channels=module.out_channels,
                                     groups=module.groups, in_hw=(height, width), kernel=kernel, stride=stride,
                                     dilation=dilation, pads=pads, same=same)}


def _norm(module: nn.Module, given: list[torch.Tensor]) -> Facts:
    assert isinstance(module, nn.BatchNorm2d)
    if module.running_mean is None:
        return {"kind": "other", "function": "batch_norm without running statistics"}
    return {"kind": "norm", "function": "batch_norm", "attributes": {"eps": module.eps, "momentum": module.momentum}}


def _functional_norm(node: fx.Node) -> Facts:
    roles = ("running_mean", "running_var", "weight", "bias")
    parts = [part for part in node.args[1:5]]
    training = node.args[5] if len(node.args) > 5 else node.kwargs.get("training", False)
    eps = node.args[7] if len(node.args) > 7 else node.kwargs.get("eps", 1e-5)
    named = all(part is None or (isinstance(part, fx.Node) and part.op == "get_attr") for part in parts)
    if not named or training or parts[0] is None or parts[1] is None:
        return {"kind": "other", "function": "batch_norm"}
    params = {role: str(part.target) for role, part in zip(roles, parts, strict=True) if isinstance(part, fx.Node)}
    return {"kind": "norm", "function": "batch_norm", "params": params, "attributes": {"eps": eps},
            "name": params["running_mean"].rpartition(".")[0]}


def _activation(module: nn.Module, given: list[torch.Tensor]) -> Facts:
    function = _ACTIVATION_MODULES[type(module)]
    if isinstance(module, nn.Hardtanh) and function == "hardtanh" and (module.min_val, module.max_val) != (-1, 1):
        return {"kind": "other", "function": f"hardtanh from {module.min_val:g} to {module.max_val:g}"}
    if getattr(module, "approximate", "none") != "none":
        return {"kind": "other", "function": f"{function} (approximate)"}
    return {"kind": "activation", "function": function, "in_place": bool(getattr(module, "inplace", False))}


def _max_pool(module: nn.Module, given: list[torch.Tensor]) -> Facts:
    assert isinstance(module, nn.MaxPool2d)
    if module.return_indices:
        return {"kind": "other", "function": "max_pool2d with indices"}
    kernel, stride = _two(module.kernel_size), _two(module.stride or module.kernel_size)
    padding, dilation = _two(module.padding), _two(module.dilation)
    names = ("kernel", "stride", "pad", "dilation")
    facts: dict[str, Any] = {f"{name}_{axis}": size for name, pair in zip(names, (kernel, stride, padding, dilation),
                                                                         strict=True)
                             for axis, size in zip("hw", pair, strict=True)}
    return {"kind": "max_pool", "function": "max_pool2d", "attributes": {**facts, "ceil_mode": module.ceil_mode}}


def _global_mean(module: nn.Module, given: list[torch.Tensor]) -> Facts:
    assert isinstance(module, nn.AdaptiveAvgPool2d)
    if module.output_size not in (1, (1, 1)):
        return {"kind": "other", "function": "adaptive_avg_pool2d"}
    return {"kind": "mean", "function": "adaptive_avg_pool2d", "attributes": {"keepdim": True}}


def _linear(module: nn.Module, given: list[torch.Tensor]) -> Facts:
    return {"kind": "linear", "function": "linear"}


def _dropout(module: nn.Module, given: list[torch.Tensor]) -> Facts:
    return {"kind": "dropout", "function": "dropout", "in_place": bool(getattr(module, "inplace", False))}


def _identity(module: nn.Module, given: list[torch.Tensor]) -> Facts:
    return {"kind": "identity", "function": "identity"}


def _flatten(module: nn.Module, given: list[torch.Tensor]) -> Facts:
    return {"kind": "flatten", "function": "flatten"}


def _other(module: nn.Module, given: list[torch.Tensor]) -> Facts:
    if isinstance(module, ArithmeticLayer):
        return {**_conv(module, given), "kind": ARITHMETIC, "function": module.method_name}
    if isinstance(module, IntegerLayer):
        return {"kind": INTEGERS, "function": type(module).__name__}
    kind = "opaque" if any(True for _ in module.children()) else "other"
    return {"kind": kind, "function": type(module).__name__}


def _two(value: Any) -> tuple[int, int]:
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    return int(pair[0]), int(pair[1])


_MODULES: dict[type[nn.Module], Callable[[nn.Module, list[torch.Tensor]], Facts]] = {
    nn.Conv2d: _conv, nn.BatchNorm2d: _norm, nn.MaxPool2d: _max_pool,
    nn.AdaptiveAvgPool2d: _global_mean, nn.Linear: _linear, nn.Dropout: _dropout, nn.Dropout2d: _dropout,
    nn.Identity: _identity, nn.Flatten: _flatten, **{kind: _activation for kind in _ACTIVATION_MODULES}}
