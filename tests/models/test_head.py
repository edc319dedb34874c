"""Finding and replacing the classifier."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgetune.errors import ModelError
from edgetune.models import find_head, head_classes, load_model, replace_head


class Misordered(nn.Module):
    """Registers its classifier before the body: only tracing finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 4)
        self.body = nn.Linear(3, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.body(x).relu())


class Branching(nn.Module):
    """Cannot be traced: its path depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Linear(3, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        return self.out(y if y.sum() > 0 else -y)


@pytest.mark.parametrize("model", [Misordered(), Branching()], ids=["misordered", "untraceable"])
def test_head_is_what_the_output_comes_from(model: nn.Module) -> None:
    assert find_head(model) == "out"


def test_a_pointwise_convolution_is_a_head() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    assert replace_head(model, 9) == "2"
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 9)
    assert head_classes(model) == 9


@pytest.mark.parametrize(
    "name", ["mobilenet_v2_tf_0.35", "mobilenet_v3_small", "resnet18", "resnet8", "mcunet"]
)
def test_replacing_changes_only_the_head(name: str) -> None:
    model = load_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    head = replace_head(model, 5, seed=3)
    x = torch.randn(2, 3, 64, 64)
    assert model(x).shape == (2, 5)
    for key, value in model.state_dict().items():
        assert key.startswith(f"{head}.") or torch.equal(value, before[key])


def test_the_new_head_depends_on_its_seed_alone() -> None:
    def head(seed: int) -> torch.Tensor:
        model = load_model("resnet20")
        state = torch.get_rng_state()
        replace_head(model, 5, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return model.linear.weight.detach()  # type: ignore[union-attr, operator, return-value]

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)),
        nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Conv2d(8, 4, 3)),
        nn.Sequential(nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 8, 1, groups=2)),
    ],
    ids=["norm last", "3x3 last", "nothing learned", "grouped"],
)
def test_a_network_without_classifier_is_refused(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="must end in a Linear or a 1x1 convolution"):
        replace_head(model, 5)
