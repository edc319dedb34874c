"""The exact method against finite differences and autograd, on random geometries."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from torch.autograd import gradcheck

from edgetune.contract import one_call
from edgetune.graph import Call
from edgetune.hosts.conv import ConvRule, convolve
from edgetune.hosts.segment import SegmentFunction
from edgetune.methods.backward._template import Rounded
from edgetune.methods.backward.exact import Exact
from edgetune.overlap import ConvGeometry
from geometries import geometries, operands


@settings(max_examples=60)
@given(geometries())
def test_gradients_are_autograds_on_every_geometry(geometry: ConvGeometry) -> None:
    x, w, gy = operands(geometry)
    x.requires_grad_()
    w.requires_grad_()
    expected = torch.autograd.grad(convolve(x, w, None, geometry), (x, w), gy)
    method = Exact()
    assert torch.allclose(method.grad_input(gy, w, geometry), expected[0], atol=1e-10)
    assert torch.allclose(method.grad_weight(method.save(x, geometry), gy, geometry), expected[1], atol=1e-10)


@settings(max_examples=10)
@given(geometries(max_size=3))
def test_the_hosted_layer_passes_finite_differences(geometry: ConvGeometry) -> None:
    x, w, _ = operands(geometry)
    bias = torch.randn(geometry.out_channels, dtype=torch.float64)
    call = Call(name="c", node="c", kind="conv", function="conv2d", inputs=("x",), geometry=geometry,
                params={"weight": "c.weight", "bias": "c.bias"})
    segment = one_call(ConvRule(Exact()), call)
    operand = [t.requires_grad_() for t in (x, w, bias)]
    assert gradcheck(lambda *tensors: SegmentFunction.apply(segment, *tensors), operand)


def test_nothing_is_computed_that_no_one_asked_for() -> None:
    """Frozen weight: nothing kept of x; first layer: no input gradient."""
    asked: list[str] = []

    class Watched(Exact):
        def grad_input(self, *args: object) -> torch.Tensor:
            asked.append("input")
            return super().grad_input(*args)  # type: ignore[arg-type]

        def grad_weight(self, *args: object) -> torch.Tensor:
            asked.append("weight")
            return super().grad_weight(*args)  # type: ignore[arg-type]

    geometry = ConvGeometry(in_channels=2, out_channels=2, groups=1, in_hw=(5, 5), kernel=(3, 3), stride=(1, 1),
                            dilation=(1, 1), pads=(1, 1, 1, 1))
    call = Call(name="c", node="c", kind="conv", function="conv2d", inputs=("x",), geometry=geometry,
                params={"weight": "c.weight"})
    segment = one_call(ConvRule(Watched()), call)
    for needs_x, needs_w in ((True, False), (False, True)):
        x, w, gy = operands(geometry)
        kept: list[int] = []

        def pack(tensor: torch.Tensor, kept: list[int] = kept, w: torch.Tensor = w) -> torch.Tensor:
            kept.append(0 if tensor.data_ptr() == w.data_ptr() else tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            (y,) = SegmentFunction.apply(segment, x.requires_grad_(needs_x), w.requires_grad_(needs_w))
        y.backward(gy)
        assert asked.pop() == ("input" if needs_x else "weight") and not asked
        assert sum(kept) == (0 if needs_x else x.numel())


def test_the_template_is_a_method_that_works() -> None:
    geometry = ConvGeometry(in_channels=2, out_channels=3, groups=1, in_hw=(6, 5), kernel=(3, 3), stride=(1, 1),
                            dilation=(1, 1), pads=(1, 1, 1, 1))
    x, w, gy = operands(geometry)
    template, exact = Rounded(step=1e-6), Exact()
    found = template.grad_weight(template.save(x, geometry), template.receive(gy, geometry), geometry)
    assert torch.allclose(found, exact.grad_weight(x, gy, geometry), atol=1e-4)
    assert torch.equal(template.grad_input(gy, w, geometry), exact.grad_input(gy, w, geometry))
