"""The classifier at the end of a network: finding it in any model, and giving it other classes."""

from __future__ import annotations

import torch
from torch import fx, nn

from edgetune.errors import ModelError


def find_head(model: nn.Module) -> str:
    """The qualified name of the classifier: the last Linear or 1x1 convolution, nothing learned after it.

    The network is traced and walked back from its output; where it cannot be traced, the last layer with
    parameters in order of registration is taken. Raises ModelError when that layer is no classifier.
    """
    name = _last_by_tracing(model) or _last_registered(model)
    layer = model.get_submodule(name) if name else None
    if layer is None or not is_classifier(layer):
        what = (
            f"its last layer with parameters, '{name}', is a {type(layer).__name__}"
            if name
            else "it has no learned parts"
        )
        raise ModelError(
            f"no classifier was found at the end of {type(model).__name__} ({what}): the network must end "
            "in a Linear or a 1x1 convolution"
        )
    return name


def is_classifier(layer: nn.Module) -> bool:
    """Whether a layer can be a head: Linear, or an ungrouped 1x1 convolution."""
    return isinstance(layer, nn.Linear) or (
        isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1
    )


def head_classes(model: nn.Module) -> int:
    """How many classes the network tells apart."""
    layer = model.get_submodule(find_head(model))
    return layer.out_features if isinstance(layer, nn.Linear) else int(layer.out_channels)  # type: ignore[arg-type]


def replace_head(model: nn.Module, num_classes: int, *, seed: int = 0) -> str:
    """Swap the classifier for a fresh one with `num_classes` outputs, in place; return its qualified name.

    The new weights are normal with deviation 0.01, drawn from `seed` alone, and the bias is zero.
    Raises ModelError when no classifier is found.
    """
    name = find_head(model)
    old = model.get_submodule(name)
    fresh: nn.Linear | nn.Conv2d
    with torch.random.fork_rng(devices=[]):  # a layer draws its default start from the global generator
        if isinstance(old, nn.Linear):
            fresh = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
        else:
            assert isinstance(old, nn.Conv2d)
            fresh = nn.Conv2d(old.in_channels, num_classes, 1, bias=old.bias is not None)
            fresh.stride = old.stride
    with torch.no_grad():
        fresh.weight.normal_(std=0.01, generator=torch.Generator().manual_seed(seed))
        if fresh.bias is not None:
            fresh.bias.zero_()
    assert isinstance(old.weight, torch.Tensor)
    parent, _, attribute = name.rpartition(".")
    model.get_submodule(parent)._modules[attribute] = fresh.to(old.weight.device, old.weight.dtype).train(
        old.training
    )
    for counter in ("num_classes", "n_classes"):
        if isinstance(getattr(model, counter, None), int):
            setattr(model, counter, num_classes)
    return name


def _last_registered(model: nn.Module) -> str:
    learned = [
        name for name, layer in model.named_modules() if any(True for _ in layer.parameters(recurse=False))
    ]
    return learned[-1] if learned else ""


def _last_by_tracing(model: nn.Module) -> str:
    try:
        graph = fx.Tracer().trace(model)
    except Exception:  # a tracer runs the user's forward on proxies, which may raise anything
        return ""
    output = next(node for node in graph.nodes if node.op == "output")
    waiting, seen = list(output.all_input_nodes), set()
    while waiting:
        node = waiting.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if node.op == "get_attr":
            return ""
        if node.op == "call_module" and any(True for _ in model.get_submodule(str(node.target)).parameters()):
            return str(node.target)
        waiting += node.all_input_nodes
    return ""
