"""Networks by name: sizes that the papers state, tracing, refusals."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from edgetune.data import Preprocess
from edgetune.errors import ModelError
from edgetune.models import InputSpec, find_head, head_classes, list_models, load_model, model_card

NAMES = [card.name for card in list_models()]

KNOWN_PARAMETERS = {
    "mobilenet_v2": 3_504_872,
    "mobilenet_v2_tf": 3_504_872 + 1281,
    "mobilenet_v1": 4_231_976,
    "mobilenet_v3_small": 2_542_856,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet20": 269_722,
    "mobilenet_v2_0.5": 1_968_680,
}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def small_picture(name: str) -> torch.Tensor:
    """A picture as small as the network bears, so that tests stay quick: (2 c h w), of at most 64 px."""
    card = model_card(name).input
    return torch.randn(2, card.channels, *(min(64, side) for side in card.size))


@pytest.mark.parametrize("name", KNOWN_PARAMETERS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    assert parameters(load_model(name)) == KNOWN_PARAMETERS[name]


def test_small_networks_have_the_size_of_their_class() -> None:
    def body(name: str) -> int:
        model = load_model(name)
        return parameters(model) - parameters(model.get_submodule(find_head(model)))

    assert 0.45e6 < body("mcunet") < 0.51e6
    assert 0.25e6 < body("proxyless_0.3") < 0.37e6
    assert 50_000 < body("digits_net") < 80_000
    assert sum(isinstance(layer, nn.Conv2d) for layer in load_model("mcunet").modules()) == 42
    kernels = {
        layer.kernel_size[0] for layer in load_model("mcunet").modules() if isinstance(layer, nn.Conv2d)
    }
    assert kernels == {1, 3, 5, 7}


@pytest.mark.parametrize("name", NAMES)
def test_every_network_traces_and_answers_alike(name: str) -> None:
    model, x = load_model(name, 7), small_picture(name)
    traced = fx.symbolic_trace(model)
    with torch.no_grad():
        assert model(x).shape == (2, 7)
        assert torch.equal(traced(x), model(x))
    assert head_classes(model) == 7


@pytest.mark.parametrize("name", ["mobilenet_v2_tf", "mobilenet_v3_small", "resnet20"])
def test_every_parameter_learns(name: str) -> None:
    model, x = load_model(name, 3).train(), small_picture(name)
    model(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())


def test_cards_state_their_own_defaults() -> None:
    for card in list_models():
        assert card.description
        assert head_classes(load_model(card.name)) == card.classes
    assert model_card("mobilenet_v2_0.35").name == "mobilenet_v2_0.35"


def test_a_card_states_what_preprocessing_takes() -> None:
    assert InputSpec.model_fields.keys() == Preprocess.model_fields.keys()
    for card in list_models():
        assert Preprocess.from_input(card.input).shape[0] == card.input.channels


def test_width_scales_and_options_reach_the_builder() -> None:
    assert parameters(load_model("mobilenet_v2_0.35")) < parameters(load_model("mobilenet_v2")) / 2
    same = load_model("mobilenet_v2", width=0.35)
    assert parameters(same) == parameters(load_model("mobilenet_v2_0.35"))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("mobilnet_v2", {}, ["mobilnet_v2", "did you mean", "mobilenet_v2"]),
        ("zzzz", {}, ["zzzz", "known are", "resnet18"]),
        ("resnet20_0.5", {}, ["resnet20", "no width"]),
        ("resnet18", {"colour": 1}, ["colour", "blocks"]),
        ("mobilenet_v2", {"padding": "mirror"}, ["mirror"]),
        ("torch.nn:Linearr", {}, ["Linearr", "did you mean", "Linear"]),
        ("no_such_package.models:net", {}, ["no_such_package", "cannot be imported"]),
        ("math:pi", {}, ["math:pi", "not callable"]),
        ("math:floor", {"x": 1}, ["math:floor"]),
    ],
)
def test_refusals_name_the_model_and_the_way_out(
    name: str, options: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(ModelError) as refusal:
        load_model(name, **options)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_ones_own_callable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_nets.py").write_text(
        "from torch import nn\n"
        "def net(num_classes=4):\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),"
        " nn.Linear(8, num_classes))\n"
        "def not_a_net():\n"
        "    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert head_classes(load_model("my_own_nets:net", 6)) == 6
    assert head_classes(load_model("my_own_nets:net")) == 4
    assert model_card("my_own_nets:net").input == InputSpec()
    with pytest.raises(ModelError, match=r"torch\.nn\.Module"):
        load_model("my_own_nets:not_a_net")
    assert sys.path == before
    sys.modules.pop("my_own_nets")
