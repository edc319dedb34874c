"""Any network with what it keeps written by a codec: what a slow reference says, and plain autograd without loss."""

from __future__ import annotations

import gc
import importlib
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import edgetune as et
from edgetune.codecs import Bounded, Codec, Float32, Grouped, Int8
from edgetune.contract import CodedMethod
from edgetune.errors import EdgetuneError
from edgetune.hold import SMALL_BYTES, Held, hold
from edgetune.methods.backward.comet import COMET
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.low_bit import LowBit
from edgetune.models import load_model
from edgetune.plan import last_layers
from nets import NETS, scramble

ROOM = importlib.import_module("edgetune.hold")  # as an attribute it is the function
pytestmark = pytest.mark.usefixtures("one_thread")


class Attending(nn.Module):
    """A small vision transformer: patches, a token for the class, attention, layer norms, GELU."""

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, width, 4, 4), nn.Linear(width, 10)
        self.token, self.place = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 65, width))
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(width), nn.MultiheadAttention(width, 4, batch_first=True), nn.LayerNorm(width),
                           nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))])
            for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place[:, : x.shape[1] + 1]
        for first, attention, second, mix in self.blocks:
            y = first(x)
            x = x + attention(y, y, y, need_weights=False)[0]
            x = x + mix(second(x))
        return self.head(x[:, 0])


class Odd(nn.Module):
    """Views, gaps, expanded and transposed values, in-place changes, a function of its own, an empty batch of rows."""

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, x[:, :, ::2])
            return x**3

        @staticmethod
        def backward(ctx: Any, gy: torch.Tensor) -> torch.Tensor:
            x, half = ctx.saved_tensors
            assert half.shape == x[:, :, ::2].shape and torch.allclose(half, x[:, :, ::2], atol=2)
            return 3 * gy * x * x

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(48, 66), nn.Linear(22, 48), nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2).reshape(len(x), -1, 48)
        x = self.first(x)
        a, b, c = x[..., :22], x[..., 22:44], x[..., 44:]
        y = F.relu(c.transpose(1, 2), inplace=True).transpose(1, 2) + torch.tanh(a) * b.sigmoid()
        y = Odd.Cube.apply(y) * y[:, :1].expand_as(y) + y[:, 1::3].mean(1, keepdim=True)
        z = torch.tanh(self.second(y))
        z = z.mul(2).exp_() * torch.sin(z)[:, :, :1] + z.new_empty(0, 48).square().sum()
        return self.head(z.softmax(-1).max(1).values)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **NETS, "Attending": Attending, "Odd": Odd, "resnet20": lambda: load_model("resnet20")}


def network(name: str, batch: int = 3) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A network in training mode, a batch and its labels."""
    torch.manual_seed(5)
    return scramble(NETWORKS[name]()).train(), torch.randn(batch, 3, 32, 32), torch.arange(batch) % 5


def gradients(model: nn.Module, x: torch.Tensor, y: torch.Tensor, around: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    with around:
        out = model(x)
    F.cross_entropy(out, y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def slowly(model: nn.Module, x: torch.Tensor, codec: Codec) -> saved_tensors_hooks:
    """Every saved tensor for itself, as a copy that went through the codec."""
    given = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}

    def pack(t: torch.Tensor) -> torch.Tensor:
        core = t[tuple(slice(1) if stride == 0 else slice(None) for stride in t.stride())]
        small = core.numel() * t.element_size() <= SMALL_BYTES
        if small or not t.is_floating_point() or t.untyped_storage().data_ptr() in given:
            return t.detach().clone()
        copy = t.detach().clone()
        return copy.copy_(codec.decode(codec.encode(copy.contiguous()), copy.shape))

    return saved_tensors_hooks(pack, lambda t: t)


def naively(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> int:
    """Bytes of the memories that plain autograd keeps of the forward pass."""
    kept: dict[int, torch.Tensor] = {}
    given = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.setdefault(t.untyped_storage().data_ptr(), t.detach())
        return t.detach()

    with saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in given)


def cosine(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    one, two = (torch.cat([g.flatten() for g in each.values()]).double() for each in (found, expected))
    return float(one @ two / one.norm() / two.norm())


def agree(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:  # another memory order sums in another order
        assert float((found[name] - expected[name]).norm()) <= 2e-6 * float(expected[name].norm()) + 1e-9, name


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
class TestGradients:
    def test_are_those_of_autograd_where_nothing_is_lost(self, name: str, batch: int) -> None:
        model, x, y = network(name, batch)
        expected = gradients(model, x, y, torch.enable_grad())
        for codec in (Float32(), Bounded(0.0)):
            agree(gradients(model, x, y, hold(model, codec)), expected)

    def test_are_those_of_a_slow_reference(self, name: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ROOM, "STATISTIC", 1 << 60)
        model, x, y = network(name, batch)
        expected = gradients(model, x, y, slowly(model, x, Bounded(0.05)))
        agree(gradients(model, x, y, hold(model, Bounded(0.05))), expected)
        assert cosine(expected, gradients(model, x, y, torch.enable_grad())) < 1 - 1e-7  # something was lost


@pytest.mark.parametrize("name", NETWORKS)
def test_bytes_are_counted_by_memory_and_freed_by_backward(name: str) -> None:
    model, x, y = network(name)
    with hold(model, LowBit(bits=4)) as held:
        out = model(x)
    assert held.plain_bytes == naively(model, x, y)
    assert 0 < held.kept_bytes < held.plain_bytes
    F.cross_entropy(out, y).backward()
    del out
    assert (held.kept_bytes, held.plain_bytes) == (0, 0)


def turned(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


STEPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu, "relu_": lambda x: torch.relu_(x * 1.5), "gelu": F.gelu, "tanh": torch.tanh, "turned": turned,
    "square": lambda x: x * x.flip(1) / 3, "softmax": lambda x: 9 * x.softmax(1),
    "norm": lambda x: F.layer_norm(x, x.shape[1:]), "views": lambda x: x.sin() * x.view(-1).cos().view(x.shape),
    "chunks": lambda x: torch.cat([a * b.sin() for a, b in zip(x.chunk(3, -1), x.chunk(3, -1)[::-1])], -1),
    "gaps": lambda x: x + (x[:, ::2].cos() * x[:, :1]).mean(1, keepdim=True),
    "spread": lambda x: x * x[:, :, :1].expand(x.shape) * torch.tanh(x.mean()),
    "windows": lambda x: F.pad(x.unfold(2, 2, 1).square().mean(-1), (1, 0)),
    "product": lambda x: x @ (x.transpose(1, 2) @ x) / x.shape[1] / 9, "sigmoid_": lambda x: (x * 2).sigmoid_() * x,
    "filled": lambda x: x.masked_fill(x > 1, 0.5) * (x < 0.7), "half": lambda x: (x.half().square() / 2).float(),
}  # fmt: skip


class Steps(nn.Module):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.first, self.steps = nn.Linear(36, 36), [STEPS[name] for name in names]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for step in self.steps:
            x = step(x)
        return x.tanh().mean((1, 2))


@given(names=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=7), batch=st.integers(1, 3),
       rows=st.sampled_from([1, 20]), bound=st.sampled_from([None, 0.0, 0.03]))
@settings(max_examples=80)
def test_random_networks(names: list[str], batch: int, rows: int, bound: float | None) -> None:
    torch.manual_seed(len(names))
    model, x, found = Steps(names), torch.randn(batch, rows, 36), []
    codec = Float32() if bound is None else Bounded(bound)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ROOM, "STATISTIC", 1 << 60)
        for around in (slowly(model, x, codec), hold(model, codec), torch.enable_grad()):
            model.zero_grad()
            with around:
                out = model(x)
            out.square().sum().backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    agree(found[1], found[0])
    if not bound:
        agree(found[1], found[2])


MEASURED = [  # network, how, times fewer bytes, cosine
    ("Attending", COMET(), 4.0, 0.998), ("Attending", LowBit(bits=8), 3.5, 0.999), ("Attending", Int8(), 3.5, 0.999),
    ("resnet20", COMET(), 5.0, 0.999), ("resnet20", LowBit(bits=4), 6.0, 0.998), ("resnet20", LowBit(), 11.0, 0.98),
]  # fmt: skip


@pytest.mark.parametrize(("name", "how", "times", "close"), MEASURED)
def test_fewer_bytes_at_nearly_the_same_gradient(name: str, how: CodedMethod | Codec, times: float,
                                                 close: float) -> None:
    model, x, y = network(name, 16)
    expected = gradients(model, x, y, torch.enable_grad())
    around = hold(model, how)
    with around as held:
        out = model(x)
    assert held.plain_bytes > times * held.kept_bytes
    model.zero_grad()
    F.cross_entropy(out, y).backward()
    found = {n: p.grad for n, p in model.named_parameters()}
    assert cosine(found, expected) > close


def held_by(codec: Codec | CodedMethod) -> Held:
    return Held(nn.Identity(), codec)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda x: x, "slice": lambda x: x[2:], "columns": lambda x: x[:, 1:9], "steps": lambda x: x[::2, :, ::3],
    "turned": lambda x: x.transpose(0, 2), "channels_last": lambda x: x[None].permute(0, 3, 1, 2),
    "expanded": lambda x: x[:, None, :, None].expand(-1, 3, -1, 2, -1), "one": lambda x: x[1:2],
    "spread": lambda x: x[:, 2:3].expand(-1, 40, -1), "rows": lambda x: x[::2, None, :, :5].expand(2, -1, 7, -1, -1),
    "bent": lambda x: x.permute(1, 2, 0)[3:, ::2], "windows": lambda x: x.unfold(1, 5, 1), "few": lambda x: x[0, :4],
    "flat": lambda x: x.flatten()[7:901], "none": lambda x: x[:0],
}  # fmt: skip


class TestViews:
    @given(names=st.lists(st.sampled_from(sorted(VIEWS)), min_size=1, max_size=5), exact=st.booleans(),
           dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    @settings(max_examples=60)
    def test_come_back_as_they_were(self, names: list[str], exact: bool, dtype: torch.dtype) -> None:
        base = torch.randn(9, 11, 24).to(dtype)
        views = [VIEWS[name](base) for name in names]
        held = held_by(Bounded(0.0 if exact else 0.1))
        kept = [held.pack(view) for view in views]
        for view, each in zip(views, kept):
            back = held.unpack(each)
            assert (back.shape, back.dtype) == (view.shape, dtype)
            assert float((back.float() - view.float()).abs().amax() if view.numel() else 0) <= (0 if exact else 0.12)

    @pytest.mark.parametrize("name", ["whole", "slice", "turned", "channels_last", "flat"])
    def test_without_gaps_lie_as_before(self, name: str) -> None:
        held, view = held_by(Grouped(8)), VIEWS[name](torch.randn(9, 11, 24))
        kept = held.pack(view)
        assert held.kept_bytes < view.nbytes / 3 and held.unpack(kept).stride() == view.stride()

    def test_share_what_was_written(self) -> None:
        held, base = held_by(Float32()), torch.randn(8, 64, 16)
        kept = [held.pack(view) for view in (base, base.transpose(0, 1), base[4:], base.flatten(), base.detach())]
        assert held.kept_bytes == held.plain_bytes == base.nbytes
        kept.append(held.pack(base[:1]))  # a small part is written for itself
        assert held.kept_bytes == base.nbytes + base[0].nbytes
        del kept

    def test_of_few_values_do_not_keep_the_whole(self) -> None:
        for view in (VIEWS["few"], VIEWS["steps"], lambda x: x[:3], lambda x: x[0, 0, 0].expand(500, 500)):
            held, base = held_by(Int8()), torch.randn(90, 11, 24)
            kept, memory = held.pack(view(base)), weakref.ref(base.untyped_storage())
            expected, few = view(base).clone(), view(base).unique().nbytes
            del base
            assert memory() is None and held.kept_bytes <= few < held.plain_bytes
            assert torch.allclose(held.unpack(kept), expected, atol=0.05)


class TestMemory:
    def test_changed_in_place_is_written_again(self) -> None:
        held, x = held_by(Float32()), torch.randn(1000)
        first, before = held.pack(x), x.clone()
        x.mul_(2)
        second = held.pack(x)
        assert torch.equal(held.unpack(first), before) and torch.equal(held.unpack(second), 2 * before)

    def test_at_a_used_address_is_another(self) -> None:
        held, kept = held_by(Float32()), []
        for number in range(50):
            x = torch.full((1000,), float(number))
            kept.append(held.pack(x))
        assert [float(held.unpack(each)[0]) for each in kept] == list(range(50))

    def test_of_the_values_is_not_held(self) -> None:
        seen = []

        def look(module: nn.Module, args: Any, out: torch.Tensor) -> None:
            seen.append(weakref.ref(out.untyped_storage()))

        model, x, _ = network("Attending")
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | nn.GELU):
                module.register_forward_hook(look)
        with hold(model, LowBit()):
            out = model(x)
        assert len(seen) == 9 and all(memory() is None for memory in seen) and out.requires_grad

    def test_what_is_kept_as_it_is_must_not_change(self) -> None:
        model, x = nn.Linear(4, 4), torch.randn(2, 4)
        with hold(model, Int8()):
            out = model(model(x))
        with torch.no_grad():
            model.weight.mul_(2)
        with pytest.raises(EdgetuneError, match=r"shape \(4, 4\).*changed in place"):
            out.sum().backward()

    @pytest.mark.parametrize("count", [10, 1000])
    def test_of_a_result_that_is_saved_goes_with_the_graph(self, count: int) -> None:
        with hold(nn.Identity(), Int8()):
            y = torch.tanh(torch.randn(count, requires_grad=True) * 2)
        memory = weakref.ref(y.untyped_storage())
        del y
        assert memory() is None

    def test_of_earlier_inputs_is_forgotten(self) -> None:
        model = nn.Linear(4, 4)
        with hold(model, Int8()) as held:
            for _ in range(9):
                model(torch.randn(3, 4)).sum().backward()
        assert len(held._left) == len(held._memories) == 3  # weight, bias and the last input

    @pytest.mark.parametrize("where", ["forward", "backward"])
    def test_is_let_go_of_after_an_error(self, where: str) -> None:
        class Failing(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                if where == "forward":
                    raise ZeroDivisionError
                return x.clone()

            @staticmethod
            def backward(ctx: Any, gy: torch.Tensor) -> torch.Tensor:
                raise ZeroDivisionError

        model, x, _ = network("Attending")
        model.blocks[1][2].register_forward_hook(lambda module, args, out: Failing.apply(out))
        gc.disable()  # by counting references alone, without a search for cycles
        try:
            with pytest.raises(ZeroDivisionError), hold(model, COMET()) as held:
                out = model(x)
                assert held.kept_bytes > 0
                out.sum().backward()
            del out
        except UnboundLocalError:
            pass
        finally:
            gc.enable()
        assert (held.kept_bytes, held.plain_bytes) == (0, 0)
        assert not model._forward_pre_hooks and torch._C._autograd._top_saved_tensors_default_hooks(True) is None


class Counted(Float32):
    """Counts what is read."""

    def __init__(self) -> None:
        self.read = 0

    def decode(self, packed: torch.Tensor, shape: Any) -> torch.Tensor:
        self.read += 1
        return super().decode(packed, shape)


class TestReading:
    def test_once_for_those_that_follow(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        codec = Counted()
        with hold(model, codec) as held:
            out = model(torch.randn(2, 3, 16, 16))
        out.sum().backward(retain_graph=True)
        assert codec.read == 1 and all(each.open is None for each in held._written)
        out.sum().backward()
        assert codec.read == 2

    def test_one_value_at_a_time_stays_open(self) -> None:
        held, codec = held_by(Counted()), torch.randn(4, 500)
        one, two = codec.clone(), codec.clone()
        kept = [held.pack(t) for t in (one, one.detach(), two)]
        memory = weakref.ref(held.unpack(kept[0]).untyped_storage())
        assert memory() is not None
        held.unpack(kept[2])
        assert memory() is None and torch.equal(held.unpack(kept[1]), one)

    def test_what_a_function_wrote_into_is_read_anew(self) -> None:
        held, x = held_by(Float32()), torch.randn(2000)
        kept = [held.pack(x), held.pack(x.view(2, 1000)), held.pack(x.view(4, 500))]
        held.unpack(kept[0]).zero_()
        assert torch.equal(held.unpack(kept[1]), x.view(2, 1000))


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
