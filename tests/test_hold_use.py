"""How `edgetune.hold` is used: nested, checkpointed, with methods and codecs, and what it refuses."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import edgetune as et
from edgetune.codecs import Bounded, Codec, Float32, Grouped, Int8
from edgetune.contract import CodedMethod
from edgetune.hold import SMALL_BYTES, hold
from edgetune.methods.backward.comet import COMET
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.low_bit import LowBit
from edgetune.plan import last_layers
from held import agree, cosine, gradients, held_by, naively, network

ROOM = importlib.import_module("edgetune.hold")  # as an attribute it is the function
pytestmark = pytest.mark.usefixtures("one_thread")


class TestUse:
    def test_backward_twice(self) -> None:
        model, x, y = network("Attending")
        expected = gradients(model, x, y, torch.enable_grad())
        model.zero_grad()
        with hold(model, Float32()):
            loss = F.cross_entropy(model(x), y)
        loss.backward(retain_graph=True)
        loss.backward()
        agree({n: p.grad / 2 for n, p in model.named_parameters()}, expected)

    def test_several_forward_passes_before_backward(self) -> None:
        model, x, y = network("resnet20", 4)  # norms move their running statistics in between
        found = []
        for around in (torch.enable_grad(), hold(model, Float32())):
            model.zero_grad()
            with around:
                losses = [F.cross_entropy(model(part), y[:2]) for part in x.split(2)]
            sum(losses).backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters()})
        agree(found[1], found[0])

    @pytest.mark.parametrize("inside", [False, True])
    def test_backward_of_backward(self, inside: bool) -> None:
        model = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 40), nn.Softplus(), nn.Linear(40, 1))
        x, found = torch.randn(20, 30), []

        def second(values: torch.Tensor, x: torch.Tensor) -> None:
            (gx,) = torch.autograd.grad(values.sum(), x, create_graph=True)
            gx.square().sum().backward()

        for around in (torch.enable_grad(), hold(model, Float32())):
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            with around:
                values = model(leaf * 1)
                if inside:
                    second(values, leaf)
            if not inside:
                second(values, leaf)
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        agree(found[1], found[0])

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_with_checkpoints(self, reentrant: bool) -> None:
        model, x, y = network("Attending")
        expected = gradients(model, x, y, torch.enable_grad())
        for block in model.blocks:
            mix = block[3]
            block[3] = Checkpointed(mix, reentrant)
        with hold(model, Float32()) as held:
            out = model(x)
        assert held.plain_bytes < naively(network("Attending")[0], x, y)
        model.zero_grad()
        F.cross_entropy(out, y).backward()
        found = {n.replace("inner.", ""): p.grad for n, p in model.named_parameters()}
        agree(found, expected)

    def test_one_inside_another(self) -> None:
        model, x, y = network("resnet20")
        expected, inner = gradients(model, x, y, torch.enable_grad()), []
        part = next(module for module in model.modules() if type(module).__name__ == "Block")
        forward = part.forward

        def held_inside(x: torch.Tensor) -> torch.Tensor:
            with hold(part, Float32()) as held:
                out = forward(x)
            inner.append(held)
            return out

        part.forward = held_inside
        with hold(model, Float32()) as outer:
            out = model(x)
        assert inner[0].kept_bytes > 0 and outer.kept_bytes > 0
        model.zero_grad()
        F.cross_entropy(out, y).backward()
        agree({n: p.grad for n, p in model.named_parameters()}, expected)

    def test_beside_a_plan(self) -> None:
        model, x, y = network("Residual")
        et.apply(model, last_layers(et.trace(model, x), None, LowBit()))
        with hold(model, Int8()) as held:
            out = model(x)
        assert 0.9 * held.plain_bytes < held.kept_bytes <= held.plain_bytes  # codes and masks stay as they are
        F.cross_entropy(out, y).backward()
        et_exact, x, y = network("Residual")
        et.apply(et_exact, last_layers(et.trace(et_exact, x), None, Exact()))
        expected = gradients(et_exact, x, y, torch.enable_grad())
        assert cosine(gradients(et_exact, x, y, hold(et_exact, LowBit(bits=8))), expected) > 0.999


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class TestValues:
    @pytest.mark.parametrize("how", [COMET(), LowBit(), Int8(), Bounded(0.1), Bounded(0.1, 4)])
    @pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf, 3e38])
    def test_that_are_not_finite_come_back_exactly(self, how: CodedMethod | Codec, odd: float) -> None:
        x, held = torch.randn(40, 50), held_by(how)
        x[3, 7] = odd
        back = held.unpack(held.pack(x))
        assert torch.equal(back[3].nan_to_num(7, 8, 9), x[3].nan_to_num(7, 8, 9)) or isinstance(how, Bounded)
        assert torch.equal(back[3, 7].nan_to_num(7, 8, 9), x[3, 7].nan_to_num(7, 8, 9))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float64])
    def test_of_other_types_stay(self, dtype: torch.dtype) -> None:
        x, held = (torch.randn(40, 50) * 9).abs().to(dtype), held_by(LowBit())
        kept = held.pack(x)
        assert torch.equal(held.unpack(kept), x) and held.kept_bytes == held.plain_bytes == x.nbytes

    def test_that_would_not_become_smaller_stay(self) -> None:
        x, held = torch.randn(40, 50).half(), held_by(Float32())
        kept = held.pack(x)
        assert held.unpack(kept).data_ptr() == x.data_ptr() and held.kept_bytes == x.nbytes

    @pytest.mark.parametrize("codec", [Grouped(2), Grouped(8), Int8()], ids=lambda codec: codec.name)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_behind_a_relu_keep_their_mask(self, codec: Codec, dtype: torch.dtype) -> None:
        x, held = torch.randn(30, 100).mul(3).relu().to(dtype), held_by(codec)
        x[:, 0] = 100
        back = held.unpack(held.pack(x))
        assert torch.equal(back > 0, x > 0) and torch.equal(back == 0, x == 0)

    def test_beside_others_that_stay_cost_nothing(self) -> None:
        x, held = torch.randn(40, 50), held_by(COMET())
        x[0, 0] = torch.nan
        kept = [held.pack(x), held.pack(x[1:])]
        assert held.kept_bytes == x.nbytes and torch.equal(held.unpack(kept[1]), x[1:])

    def test_reach_the_codec_sample_by_sample(self) -> None:
        values = torch.randn(8, 9, 20, 1) * torch.arange(1, 9).view(8, 1, 1, 1)
        for x in (values.permute(3, 0, 1, 2), values, values[None, ..., 0].repeat(2, 1, 1, 1)):
            held = held_by(Int8())
            assert torch.equal(held.unpack(held.pack(x)), Int8().decode(Int8().encode(x.contiguous()), x.shape))

    def test_statistics_stay(self) -> None:
        held, x = held_by(LowBit()), torch.randn(40, 10, 32)
        mean = x.mean(-1, keepdim=True)
        kept = [held.pack(t) for t in (x, mean)]
        assert mean.nbytes > SMALL_BYTES and torch.equal(held.unpack(kept[1]), mean)

    def test_of_real_and_imaginary_parts(self) -> None:
        held, x = held_by(Float32()), torch.randn(40, 50, dtype=torch.complex64)
        parts = (x.imag, x.conj().imag, x.real, torch.view_as_real(x))
        kept = [held.pack(part) for part in parts]
        assert all(torch.equal(held.unpack(each), part) for each, part in zip(kept, parts))


class TestGiven:
    @pytest.mark.parametrize("frozen", [False, True])
    def test_weights_stay_exact_under_autocast(self, frozen: bool) -> None:
        model, x = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 40)).requires_grad_(not frozen), torch.randn(8, 64)
        found = []
        for around in (torch.enable_grad(), hold(model, LowBit())):
            leaf = x.clone().requires_grad_()
            with around, torch.autocast("cpu", torch.bfloat16):
                out = model(leaf)
            out.float().square().sum().backward()
            found.append(leaf.grad)
        assert torch.equal(*found)

    def test_parameters_buffers_and_inputs_stay(self) -> None:
        class Table(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(40, 50))
                self.register_buffer("scale", torch.randn(50, 40))

            def forward(self, x: torch.Tensor, more: dict[str, torch.Tensor]) -> torch.Tensor:
                return x * self.weight[1:].t().sum() * self.scale.t() + more["x"] * self.weight * torch.ones(1)

        model, x, other = Table(), torch.randn(40, 50), torch.randn(40, 50)
        with hold(model, LowBit()) as held:
            out = model(x, more={"x": other})
        assert held.plain_bytes < x.nbytes * 1.2  # x times a sum is the only value of its own
        out.sum().backward()

    def test_leaves_that_learn_stay_wherever_they_belong(self) -> None:
        scale = torch.randn(40, 50, requires_grad=True)
        with hold(nn.Identity(), LowBit()) as held:
            out = (scale * torch.randn(40, 50, requires_grad=True)).sum()
        assert held.kept_bytes == 0
        out.backward()


def test_the_documented_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "train.md").read_text()
    (block,) = (each for each in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "et.hold" in each)
    model, x, y = network("Attending")
    exec(block, {"model": model, "x": x, "y": y})
    kept, plain = map(int, re.findall(r"\d+", capsys.readouterr().out))
    assert 3 * kept < plain and model.patch.weight.grad is not None
