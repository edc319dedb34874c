"""What `edgetune.hold` keeps: views once for all, nothing after a failure, each value read when it is needed."""

from __future__ import annotations

import gc
import importlib
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgetune.codecs import Bounded, Float32, Grouped, Int8
from edgetune.errors import EdgetuneError
from edgetune.hold import hold
from edgetune.methods.backward.comet import COMET
from edgetune.methods.backward.low_bit import LowBit
from held import VIEWS, held_by, network

ROOM = importlib.import_module("edgetune.hold")  # as an attribute it is the function
pytestmark = pytest.mark.usefixtures("one_thread")


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
