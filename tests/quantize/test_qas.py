"""Quantization-aware scaling gives float SGD's steps; steps rounded by chance keep their mean."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgetune.quantize import (
    QuantizedNetwork,
    Rounded,
    Stepped,
    StochasticSGD,
    integer,
    last_layers,
    quantize,
    scale_gradients,
    weights,
)
from edgetune.quantize.qas import factors
from integer_nets import odd


def linear_network() -> tuple[nn.Module, torch.Tensor]:
    """Without clamps that cut, so that its gradient is the float network's whatever the rounding."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3, 2, groups=3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    model[0].weight.data *= torch.logspace(-3, 1, 6).view(-1, 1, 1, 1)  # very unlike scales
    return model.eval(), torch.randn(5, 3, 9, 8)


class TestScaling:
    def test_a_step_on_integers_is_a_step_of_float_sgd(self) -> None:
        model, x = linear_network()
        quantized = quantize(model, [x, 1.5 * x])  # wide enough that no rounding meets the clamp
        network = QuantizedNetwork(quantized, last_layers(quantized.graph, 9)).double()
        cotangent = torch.randn(5, 4, dtype=torch.float64)
        network(x.double()).backward(cotangent)
        scale_gradients(network)
        seen = integer.dequantize(integer.quantize(x.double(), quantized.graph.input), quantized.graph.input)
        twin = model.double()
        twin(seen).backward(cotangent)
        conv, weight_scale = next(network.convs()), quantized.tensors["0.weight_scale"]
        in_float = conv.weight.value.grad * weight_scale.view(-1, 1, 1, 1)
        torch.testing.assert_close(in_float, twin[0].weight.grad, rtol=1e-6, atol=0)
        bias_scale = weight_scale * quantized.graph.input.scale
        torch.testing.assert_close(conv.bias.value.grad * bias_scale, twin[0].bias.grad, rtol=1e-6, atol=0)

    def test_with_the_gain_it_is_a_step_on_the_filter_in_front_of_its_norm(self) -> None:
        conv, x = nn.Conv2d(3, 6, 3, bias=False), torch.randn(5, 3, 9, 8)
        norm = nn.BatchNorm2d(6)
        norm.weight.data, norm.running_var = torch.tensor([2.0, -0.5, 0.1, 1, 3, -1]), torch.rand(6) + 0.1
        model = nn.Sequential(conv, norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()
        quantized = quantize(model, [x, 1.5 * x])
        network = QuantizedNetwork(quantized, last_layers(quantized.graph, 9)).double()
        cotangent = torch.randn(5, 4, dtype=torch.float64)
        found = {}
        for gains in (True, False):
            network.zero_grad()
            network(x.double()).backward(cotangent)
            scale_gradients(network, gains=gains)
            found[gains] = next(network.convs()).weight.value.grad
        seen = integer.dequantize(integer.quantize(x.double(), quantized.graph.input), quantized.graph.input)
        model.double()(seen).backward(cotangent)
        gain = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
        scale = quantized.tensors["0.weight_scale"]
        torch.testing.assert_close(quantized.tensors["0.gain"], gain, rtol=1e-6, atol=0)
        # a step on the integers, through scale and gain, is what the filter itself would have gone
        step = found[True] * (scale / gain).view(-1, 1, 1, 1)
        torch.testing.assert_close(step, conv.weight.grad, rtol=1e-6, atol=1e-12)
        folded = found[False] * (scale * gain).view(-1, 1, 1, 1)
        torch.testing.assert_close(folded, conv.weight.grad, rtol=1e-6, atol=1e-12)

    def test_factors(self) -> None:
        weight, bias = factors(torch.tensor([0.5, 0.1]), 0.2, torch.tensor([1.0, -3.0]))
        assert weight.tolist() == pytest.approx([4, 900])
        assert bias.tolist() == pytest.approx([100, 2500])

    def test_leaves_the_head_and_frozen_layers_alone(self) -> None:
        _, quantized, x = odd()
        network = QuantizedNetwork(quantized, last_layers(quantized.graph, 1))
        network(x).sum().backward()
        before = network.steps[-1].weight.grad.clone()
        scale_gradients(network)
        assert torch.equal(network.steps[-1].weight.grad, before)
        assert all(p.grad is None for conv in list(network.convs())[:-1] for p in conv.parameters())


class TestStepped:
    def test_is_int8_and_its_handle_has_one_element(self) -> None:
        held = Stepped(torch.ones(4, 3, 3, 3, dtype=torch.int8), 127)
        assert held.value.dtype == torch.int8
        assert held.handle.untyped_storage().nbytes() == 4
        held.handle.square().sum().backward()
        assert held.handle.grad.shape == (4, 3, 3, 3)

    def test_steps_keep_their_mean_and_stay_within_one(self) -> None:
        held = Stepped(torch.zeros(200_000, dtype=torch.int8), 127)
        held.move(torch.full((200_000,), -1.3), torch.Generator().manual_seed(0))
        assert set(held.value.tolist()) == {-2, -1}
        # five standard errors of the mean of so many chances
        assert float(held.value.double().mean()) == pytest.approx(-1.3, abs=5 * (0.21 / 200_000) ** 0.5)

    def test_whole_steps_are_not_left_to_chance(self) -> None:
        held = Stepped(torch.tensor([5, -5], dtype=torch.int8), 127)
        held.move(torch.tensor([2.0, -3.0]))
        assert held.value.tolist() == [7, -8]

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_moves_the_same_in_parts(self, monkeypatch: pytest.MonkeyPatch, layout: torch.memory_format) -> None:
        moved = []
        for part in (10**6, 40):
            monkeypatch.setattr(weights, "PART", part)
            held = Stepped(torch.arange(-60, 60, dtype=torch.int8).view(6, 5, 2, 2), 127).to(memory_format=layout)
            held.move(torch.full((6, 5, 2, 2), 0.5), torch.Generator().manual_seed(0))
            moved.append(held.value.flatten().tolist())
        assert moved[0] == moved[1] != list(range(-60, 60))

    def test_clips(self) -> None:
        held = Stepped(torch.tensor([120, -120], dtype=torch.int8), 127)
        held.move(torch.tensor([1e9, -1e9]))
        assert held.value.tolist() == [127, -127]

    def test_biases_move_in_int32(self) -> None:
        held = Stepped(torch.tensor([2**24 - 1], dtype=torch.int32), 2**24)
        held.move(torch.tensor([-1.0]))
        assert (held.value.item(), held.value.dtype) == (2**24 - 2, torch.int32)


class TestStochasticSGD:
    def test_moves_whole_steps_as_sgd_with_momentum_and_decay(self) -> None:
        """Gradients and settings of whole numbers leave nothing to chance, so SGD on floats must agree."""
        held = Stepped(torch.tensor([4, -3, 0], dtype=torch.int8), 127)
        twin = nn.Parameter(held.value.float())
        ours = StochasticSGD(held, lr=1.0, momentum=2.0, weight_decay=1.0)
        theirs = torch.optim.SGD([twin], lr=1.0, momentum=2.0, weight_decay=1.0)
        for gradient in ([1.0, 2.0, 3.0], [-2.0, 0.0, 5.0], [1.0, 1.0, -1.0]):
            held.handle.grad, twin.grad = torch.tensor(gradient), torch.tensor(gradient)
            ours.step()
            theirs.step()
            assert held.value.tolist() == twin.tolist()

    def test_head_learns_as_with_sgd(self) -> None:
        _, quantized, x = odd()
        learns, heads = last_layers(quantized.graph, 2), []
        for state, make in ((Rounded, lambda n: torch.optim.SGD(n.parameters(), 0.1)),
                            (Stepped, lambda n: StochasticSGD(n, 0.1))):  # fmt: skip
            network = QuantizedNetwork(quantized, learns, state)
            optimizer = make(network)
            F.cross_entropy(network(x), torch.tensor([1, 3])).backward()
            optimizer.step()
            heads.append(network.steps[-1].weight.detach())
        assert torch.equal(*heads)

    def test_same_seed_same_chances(self) -> None:
        def run(seed: int) -> torch.Tensor:
            held = Stepped(torch.zeros(64, dtype=torch.int8), 127)
            optimizer = StochasticSGD(held, lr=1.0, seed=seed)
            held.handle.grad = torch.full((64,), 0.5)
            optimizer.step()
            return held.value

        assert torch.equal(run(0), run(0))
        assert not torch.equal(run(0), run(1))


@pytest.mark.parametrize("state", [Rounded, Stepped])
def test_learns_pictures_by_heart(state: type[Rounded]) -> None:
    _, quantized, _ = odd()
    network = QuantizedNetwork(quantized, last_layers(quantized.graph, 9), state)
    learning = [p for p in network.parameters() if p.requires_grad]
    optimizer = StochasticSGD(network, 0.1) if state is Stepped else torch.optim.SGD(learning, 0.1)
    x, y = torch.randn(10, 3, 11, 9), torch.arange(10) % 5
    losses = []
    for _ in range(200):
        loss = F.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        scale_gradients(network)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(conv.weight.integers().dtype == torch.int8 for conv in network.convs())
