"""The cut lies where the frozen part ends, and both sides together are the network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgetune.apply import apply
from edgetune.cache.cut import find_cut
from edgetune.contract import Plan
from edgetune.errors import Refusal
from edgetune.graph import trace
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.models import load_model
from edgetune.plan import last_layers
from nets import Branching, Inverted, Opaque, Residual, Untraceable, block, scramble

SHAPE = (3, 12, 12)


def ready(model: nn.Module, last: int, method: object = None, shape: tuple[int, ...] = SHAPE) -> nn.Module:
    """The network as it trains: the last convolutions learn."""
    scramble(model)
    graph = trace(model, torch.zeros(2, *shape))
    apply(model, last_layers(graph, last, method or Exact()), graph)  # type: ignore[arg-type]
    return model.train()


def learning(model: nn.Module, *names: str, shape: tuple[int, ...] = SHAPE) -> nn.Module:
    learns = {name: ("weight",) for name in names}
    apply(model, Plan(input_shape=(2, *shape), learns=learns))
    return model.train()


def assert_whole(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> None:
    """Output and gradients of both sides are those of the network, bit for bit."""
    cut = find_cut(model, shape)
    x, learned = torch.randn(4, *shape), [p for p in model.parameters() if p.requires_grad]
    gradients = []
    for run in (model, lambda x: cut.suffix(model, *cut.prefix(model, x))):
        torch.manual_seed(3)
        y = run(x.clone())
        gradients.append([y, *torch.autograd.grad(y.square().sum(), learned)])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)
    assert all(not value.requires_grad for value in cut.prefix(model, x.clone()))


class TestWhere:
    @pytest.mark.parametrize(
        ("net", "last", "layers"),
        [
            (Residual, 1, ("relu",)),  # the shortcut learns, the other branch reads the same map
            (Residual, 3, ("relu",)),
            (Inverted, 1, ("add",)),
            (Inverted, 2, ("stem.2", "mul")),
            (Branching, 1, ("c.2",)),
            (Branching, 2, ("cat",)),
            (Opaque, 1, ("middle",)),
        ],
    )
    def test_is_in_front_of_the_first_layer_that_learns(
        self, net: type[nn.Module], last: int, layers: tuple[str, ...]
    ) -> None:
        torch.manual_seed(0)
        for method in (Exact(), PooledChain(patch_px=2)):
            model = ready(net(), last, method)
            cut = find_cut(model, SHAPE)
            assert cut.layers == layers
            first = next(name for name, p in model.named_parameters() if p.requires_grad)
            assert first not in cut.held
            assert_whole(model)

    @pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "mcunet", "mobilenet_v3_small"])
    def test_one_value_crosses_in_the_networks_of_the_field(self, name: str) -> None:
        torch.manual_seed(0)
        shape = (3, 64, 64)
        model = ready(load_model(name), 3, PooledChain(patch_px=2), shape)
        assert len(find_cut(model, shape).values) == 1
        assert_whole(model, shape)

    def test_a_head_alone_reads_what_lies_in_front_of_dropout(self) -> None:
        model = ready(load_model("mobilenet_v2"), 0, shape=(3, 64, 64))
        assert [value.shape for value in find_cut(model, (3, 64, 64)).values] == [(1280,)]
        assert_whole(model, (3, 64, 64))

    def test_dropout_ends_the_frozen_part(self) -> None:
        model = nn.Sequential(block(3, 4), nn.Dropout(0.5), block(4, 4), nn.Flatten(), nn.Linear(576, 5))
        cut = find_cut(learning(model, "4"), SHAPE)
        assert cut.layers == ("0.2",)
        assert_whole(model)

    def test_dropout_hidden_in_a_function_does_too(self) -> None:
        class Hidden(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.head = block(3, 4), block(4, 4), nn.Linear(4, 5)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.head(self.b(F.dropout2d(self.a(x), 0.3)).mean((2, 3)))

        model = learning(Hidden(), "head")
        assert find_cut(model, SHAPE).layers == ("a.2",)
        assert_whole(model)

    def test_what_changes_its_state_ends_the_frozen_part_and_is_left_as_it_was(self) -> None:
        norm = nn.InstanceNorm2d(4, track_running_stats=True)
        model = learning(nn.Sequential(block(3, 4), norm, block(4, 4), nn.Flatten(), nn.Linear(576, 5)), "4")
        state, before = torch.get_rng_state(), norm.running_mean.clone()
        assert find_cut(model, SHAPE).layers == ("0.2",)
        assert torch.equal(norm.running_mean, before) and torch.equal(torch.get_rng_state(), state)

    def test_hooks_end_the_frozen_part(self) -> None:
        model = nn.Sequential(block(3, 4), block(4, 4), nn.Flatten(), nn.Linear(576, 5))
        model[1][0].register_forward_hook(lambda *_: None)
        assert find_cut(learning(model, "3"), SHAPE).layers == ("0.2",)


class Skips(nn.Module):
    """The picture itself is read again at the end, so that one value alone never crosses but at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 3), block(3, 3), block(6, 4), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.b(self.a(x))
        return self.head(self.c(torch.cat([y * 1.5, x], 1)).mean((2, 3)))


class TestSeveralValues:
    def test_all_that_cross_are_taken_where_one_alone_would_save_little(self) -> None:
        class Later(Skips):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = self.b(self.a(x))
                return self.head(self.c(torch.cat([self.b(y), x], 1)).mean((2, 3)))

        model = learning(Later(), "b.0", "c.0")
        assert_whole(model)
        assert find_cut(model, SHAPE).values and len(find_cut(model, SHAPE).values) == 2

    def test_a_later_single_value_is_preferred(self) -> None:
        assert len(find_cut(learning(Skips(), "c.0"), SHAPE).values) == 1
        assert_whole(learning(Skips(), "c.0"))

    def test_two_names_of_one_memory_never_cross_together(self) -> None:
        class Alias(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.head = block(3, 4), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = self.a(x)
                z = y.view(y.shape)
                z = z.add_(self.b(z))  # changes y, too
                return self.head((y + z).mean((2, 3)))

        model = learning(Alias(), "b")
        assert len(find_cut(model, SHAPE).values) == 1
        cut, x = find_cut(model, SHAPE), torch.randn(2, *SHAPE)
        with torch.no_grad():
            assert torch.equal(cut.suffix(model, *cut.prefix(model, x)), model(x))

    def test_channels_last_maps_are_noted(self) -> None:
        for layout, noted in ((torch.channels_last, True), (torch.contiguous_format, False)):
            model = ready(Residual().to(memory_format=layout), 1)
            assert [value.channels_last for value in find_cut(model, SHAPE).values] == [noted]


class TestRefusals:
    def refused(self, model: nn.Module) -> str:
        with pytest.raises(Refusal) as refusal:
            find_cut(model, SHAPE)
        return str(refusal.value)

    def test_a_stem_that_learns(self) -> None:
        told = self.refused(ready(Residual(), 6))
        assert told.startswith("layer 'stem.0' learns, and nothing worth keeping lies in front of it: ")

    def test_a_network_that_cannot_be_followed(self) -> None:
        assert "layer 'Untraceable' cannot be followed (" in self.refused(ready(Untraceable(), 1))

    def test_pictures_that_see_each_other(self) -> None:
        mixing = nn.Sequential(block(3, 4), nn.BatchNorm2d(4, track_running_stats=False), block(4, 4), nn.Flatten(),
                               nn.Linear(576, 5))  # fmt: skip
        told = self.refused(learning(mixing, "4"))
        assert "depends on the other pictures of a batch" in told and told.endswith("train without a cache")

    def test_hooks_on_the_network_itself(self) -> None:
        model = ready(Residual(), 1)
        model.register_forward_hook(lambda *_: None)
        assert "layer 'Residual' carries hooks" in self.refused(model)

    def test_a_forward_of_its_own(self) -> None:
        model = nn.Sequential(block(3, 4), nn.Flatten(), nn.Linear(576, 5))
        model.requires_grad_(False)
        model[2].requires_grad_(True)
        model.forward = lambda x: x  # type: ignore[method-assign]
        assert "its forward was replaced" in self.refused(model)

