"""Maps that a training forward pass of a pretrained network makes, by what kind of layer made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from edgetune.bench.cases import IMAGENET_V2, Start, pupil
from edgetune.bench.photos import flowers
from edgetune.bench.pretrain import Lesson

NETWORKS: Mapping[str, Start] = {
    "resnet18": pupil(Lesson(network="resnet18", size=32), flowers),
    "mobilenet_v2": IMAGENET_V2,
}
"""ResNet-18 has been taught CIFAR-10, MobileNetV2 ImageNet; both see flowers."""

KINDS = ("ReLU", "convolution", "norm before ReLU", "norm alone", "input")
_ACTIVATIONS = (nn.ReLU, nn.ReLU6)
_NORMS = (nn.BatchNorm2d,)


def maps(network: str, data: Path, batch: int, size_px: int, each: int) -> dict[str, list[Tensor]]:
    """At most `each` maps a kind, spread over the depth of the network: (n c h w), contiguous, float32.

    The network is in training mode, its norms following the batch. "norm alone" is what no activation comes behind:
    in front of an addition, and a linear bottleneck. Raises DataError where photos are not below `data`.
    """
    start = NETWORKS[network]
    photos = start.photos(data, start.preprocess(size_px), 4 * batch)
    x = photos.seen(list(range(0, 4 * batch, 4)), epoch=0)
    found: dict[str, list[Tensor]] = {"input": [x.contiguous()]}
    made = _recorded(start.model(data, seed=0).train(), x)
    for (layer, y), behind in zip(made, [*[layer for layer, _ in made[1:]], None]):
        kind = _kind(layer, behind)
        if kind is not None and y.dim() == 4:
            found.setdefault(kind, []).append(y)
    return {kind: _spread(found[kind], each) for kind in KINDS if kind in found}


def _recorded(model: nn.Module, x: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """Every layer in the order of calls, with its output as it was before the next one ran."""
    made: list[tuple[nn.Module, Tensor]] = []

    def record(layer: nn.Module, _: tuple[Tensor, ...], y: Tensor) -> None:
        made.append((layer, y.detach().clone(memory_format=torch.contiguous_format)))

    hooks = [layer.register_forward_hook(record) for layer in model.modules() if not list(layer.children())]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return made


def _kind(layer: nn.Module, behind: nn.Module | None) -> str | None:
    if isinstance(layer, _ACTIVATIONS):
        return "ReLU"
    if isinstance(layer, nn.Conv2d):
        return "convolution"
    if isinstance(layer, _NORMS):
        return "norm before ReLU" if isinstance(behind, _ACTIVATIONS) else "norm alone"
    return None


def _spread(maps: Sequence[Tensor], each: int) -> list[Tensor]:
    """`each` of them, from the first to the last."""
    count = min(each, len(maps))
    return [maps[round(i * (len(maps) - 1) / max(count - 1, 1))] for i in range(count)]
