"""Blocks are found by what they compute: known networks, and the cases that are none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import edgetune as et
from edgetune.blocks import as_block, blocks, calls_of
from edgetune.models import load_model
from nets import NETS, block

KNOWN = {
    "mobilenet_v2": [f"features.{n}" for n in range(1, 18)],
    "mobilenet_v3_small": [f"features.{n}" for n in range(1, 12)],
    "mobilenet_v1": [f"blocks.{n}" for n in range(1, 14)],
    "resnet18": [f"layer{stage}.{n}" for stage in range(1, 5) for n in range(2)],
    "resnet20": [f"layer{stage}.{n}" for stage in range(1, 4) for n in range(3)],
    "digits_net": ["features.1", "features.3"],
}


@pytest.mark.parametrize(("name", "expected"), KNOWN.items(), ids=KNOWN.keys())
def test_blocks_of_known_networks(name: str, expected: list[str]) -> None:
    channels = 1 if name == "digits_net" else 3
    graph = et.trace(load_model(name, num_classes=4), torch.zeros(1, channels, 64, 64))
    assert [found.name for found in blocks(graph)] == expected


def test_shapes_and_neighbours_of_a_block() -> None:
    model, x = NETS["Stacked"](), torch.zeros(2, 3, 18, 13)
    graph = et.trace(model, x)
    seen: dict[str, tuple[torch.Size, torch.Size]] = {}
    for name in ("stage.0", "stage.1"):
        model.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: (args[0].shape, out.shape)}))
    model(x)
    found = blocks(graph)
    assert [each.name for each in found] == ["stage.0", "stage.1"]
    for each in found:
        assert (each.in_shapes[0], each.out_shape) == seen[each.name]
        assert all(each.node in graph[reader].inputs for reader in each.consumers)
    assert found[1].inputs == (found[0].node,)
    assert [call.function for call in calls_of(graph, "stage.1")][-1] == "add"


class Twice(nn.Module):
    """One block, called two times."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(block(3, 3), block(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.body(x))


def test_what_is_no_block() -> None:
    plain = nn.Sequential(nn.Sequential(*(block(3, 3, stride=2) for _ in range(3))), nn.Flatten())
    graph = et.trace(plain, torch.zeros(1, 3, 32, 32))
    assert blocks(graph) == ()  # shrinks its map eight times
    assert as_block(graph, "0") is not None and as_block(graph, "1") is None
    assert as_block(graph, "0.0.0") is None  # a layer
    assert as_block(graph, "") is None and as_block(graph, "nowhere") is None
    assert blocks(et.trace(Twice(), torch.zeros(1, 3, 8, 8))) == ()
    opaque = et.trace(NETS["Opaque"](), torch.zeros(1, 3, 16, 16))
    assert as_block(opaque, "middle") is None and blocks(opaque) == ()


def test_what_follows_a_submodule_that_cannot_be_followed_has_its_own_scope() -> None:
    graph = et.trace(NETS["Opaque"](), torch.zeros(1, 3, 16, 16))
    scopes = {call.name: call.scope for call in graph.calls}
    assert scopes["last.0"] == "last" and scopes["middle"] == "" and scopes["mean"] == ""
