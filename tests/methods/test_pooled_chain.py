"""The pooled chain equals gradient filtering layer by layer, on every network, to float64 precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import edgetune as et
from edgetune.contract import Method, Needs, Plan
from edgetune.hosts.chain import ChainRule
from edgetune.hosts.schedule import Schedule
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.gradient_filter import GradientFilter
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.models import load_model
from nets import NETS, scramble

Gradients = dict[str, torch.Tensor]


def everything(graph: et.Graph, method: Method, scales: bool = False) -> Plan:
    """All convolutions by one method, all shifts and heads learn, and with `scales` the norms' scales."""
    layers = {call.name: (method,) for call in graph.layers("conv")}
    learns = {call.name: tuple(role for role in call.params if role in ("weight", "bias"))
              for call in graph.layers("conv", "linear")}
    roles = ("weight", "bias") if scales else ("bias",)
    learns |= {call.name: tuple(role for role in roles if role in call.params) for call in graph.layers("norm")}
    return Plan(input_shape=graph.input_shape, layers=layers, learns=learns)


def run(model: nn.Module, x: torch.Tensor,
        plan: Plan | None) -> tuple[torch.Tensor, Gradients, torch.Tensor, list[str]]:
    """Output, gradients of parameters, gradient of the input, segment names; the model is left without gradients."""
    undo = et.apply(model, plan) if plan else None
    model.eval()
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    names = [segment.name for segment in undo.segments] if undo else []
    model.zero_grad(set_to_none=True)
    if undo:
        undo()
    return y.detach(), grads, x.grad, names


def close(a: Gradients, b: Gradients) -> None:
    assert a.keys() == b.keys() and a
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-9, atol=1e-9 * float(b[name].abs().max() + 1)), name


@pytest.fixture(params=[*NETS, "mobilenet_v2", "resnet18", "mobilenet_v3_small", "resnet20"])
def net(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(3)
    if request.param in NETS:
        return scramble(NETS[request.param]()).double(), torch.randn(2, 3, 22, 19, dtype=torch.float64)
    model = scramble(load_model(request.param, num_classes=5)).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    size = (32, 32) if request.param == "resnet20" else (64, 50)
    return model, torch.randn(2, 3, *size, dtype=torch.float64)


@pytest.mark.parametrize("scales", [False, True], ids=["shifts", "scales"])
@pytest.mark.parametrize(("patch_px", "taps"), [(2, "mean"), (4, "mean"), (3, "grid")])
def test_chain_equals_layer_by_layer(net: tuple[nn.Module, torch.Tensor], patch_px: int, taps: str,
                                     scales: bool) -> None:
    model, x = net
    graph = et.trace(model, x)
    filtered, chain = (kind(patch_px=patch_px, taps=taps) for kind in (GradientFilter, PooledChain))
    y, expected, gx, _ = run(model, x, everything(graph, filtered, scales))
    y_chain, found, gx_chain, _ = run(model, x, everything(graph, chain, scales))
    assert torch.equal(y, y_chain)
    close(found, expected)
    assert torch.allclose(gx, gx_chain, rtol=1e-9, atol=1e-9 * float(gx.abs().max()))


@pytest.mark.parametrize("method", [Exact(), GradientFilter(patch_px=1, taps="grid"),
                                    PooledChain(patch_px=1, taps="grid")],
                         ids=["exact", "filter", "chain"])
def test_hosts_on_single_pixels_equal_autograd(net: tuple[nn.Module, torch.Tensor], method: Method) -> None:
    model, x = net
    y, expected, gx, _ = run(model, x, None)
    plan = everything(et.trace(model, x), method, scales=True)
    y_host, found, gx_host, _ = run(model, x, plan)
    assert torch.equal(y, y_host)
    close(found, {name: expected[name] for name in plan.learned()})
    assert torch.allclose(gx, gx_host, rtol=1e-9, atol=1e-9 * float(gx.abs().max()))


def test_mixed_patches_and_exact_layers_equal_layer_by_layer(net: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = net
    graph = et.trace(model, x)

    def mixed(kind: type[GradientFilter]) -> Plan:
        choices = [kind(patch_px=2), kind(patch_px=4), Exact(), kind(patch_px=7), kind(patch_px=2, taps="grid")]
        plan = everything(graph, Exact(), scales=True)
        return plan.model_copy(update={"layers": {name: (choices[i % 5],) for i, name in enumerate(plan.layers)}})

    _, expected, _, _ = run(model, x, mixed(GradientFilter))
    _, found, _, _ = run(model, x, mixed(PooledChain))
    close(found, expected)


def test_runs_span_whole_networks() -> None:
    """MobileNetV2 is one run from the stem to the global mean; ResNet-18 two, cut by its max-pool."""
    for name, spans in (("mobilenet_v2", 1), ("resnet18", 2)):
        model = load_model(name, num_classes=5)
        graph = et.trace(model, torch.zeros(1, 3, 64, 64))
        segments = PooledChain.claim(graph, everything(graph, PooledChain(), scales=True))
        assert len(segments) == spans
        assert {c.node for c in graph.layers("conv")} <= {c.node for s in segments for c in s.calls}


def test_masks_after_an_add_are_not_averaged_one_by_one() -> None:
    """Projecting at every ReLU of an identity run gives another gradient: the AND-ed bits are needed."""
    model = scramble(NETS["Residual"]()).double()
    graph = et.trace(model, torch.zeros(2, 3, 22, 19, dtype=torch.float64))
    (segment,) = PooledChain.claim(graph, everything(graph, PooledChain(patch_px=4)))
    assert isinstance(segment.rule, ChainRule)
    after_adds = {c.node for c in graph.layers("activation") if graph[c.inputs[0]].kind == "add"}
    assert len(after_adds) == 3 and not after_adds & segment.rule.schedule.counted.keys()
    between = {c.node for c in graph.layers("activation")} - after_adds
    assert between & segment.rule.schedule.counted.keys()


def scales_schedule(name: str, patch_px: int = 2) -> tuple[et.Graph, Schedule]:
    model = load_model(name, num_classes=5)
    graph = et.trace(model, torch.zeros(1, 3, 64, 64))
    segments = PooledChain.claim(graph, everything(graph, PooledChain(patch_px=patch_px), scales=True))
    assert isinstance(segments[-1].rule, ChainRule)
    return graph, segments[-1].rule.schedule


@pytest.mark.parametrize("patch_px", [2, 4])
@pytest.mark.parametrize(("name", "counted"), [("mobilenet_v2", {"relu6"}),
                                               ("mobilenet_v3_small", {"relu", "hardswish"})])
def test_scales_of_the_mobilenets_are_read_on_cells(name: str, counted: set[str], patch_px: int) -> None:
    """Bottlenecks at the norm itself; others behind a counted activation, or under its bits; none on the full map."""
    graph, made = scales_schedule(name, patch_px)
    assert made.moments.keys() == {call.node for call in graph.layers("norm")}
    for node, moment in made.moments.items():
        ((masks, cell),) = moment.cells.items()
        behind = graph[graph[node].consumers[0]]
        assert all(side >= min(patch_px, size) for side, size in zip(cell, moment.norm.out_shape[2:], strict=True))
        assert (moment.reader == behind) == (behind.node in made.counted)
        assert masks == ((behind.node,) if behind.kind == "activation" and moment.reader == moment.norm else ())
    functions = {m.reader.function for m in made.moments.values() if m.reader != m.norm}
    assert functions == (counted if patch_px == 4 else counted & {"hardswish"})


def test_scales_before_an_add_and_relu_are_read_under_each_run_of_masks() -> None:
    graph, made = scales_schedule("resnet18", 4)
    norms = {call.name: made.moments[call.node] for call in graph.layers("norm") if call.node in made.moments}
    first, second = norms["layer1.0.bn2"], norms["layer1.1.bn2"]
    relus = [graph[graph[second.norm.consumers[0]].consumers[0]].node]
    relus.append(graph[graph[first.norm.consumers[0]].consumers[0]].node)
    assert second.cells == {(relus[0],): (8, 8)}  # the next stage's strides make cells of eight
    assert first.cells == {(relus[1],): (4, 4), tuple(relus): (8, 8)}


def test_scales_whose_gradient_is_of_single_pixels_keep_the_full_input() -> None:
    model = load_model("resnet18", num_classes=5)
    graph = et.trace(model, torch.zeros(1, 3, 64, 64))
    stem, *_ = PooledChain.claim(graph, everything(graph, PooledChain(), scales=True))
    assert isinstance(stem.rule, ChainRule)
    assert [(m.norm.name, m.cells) for m in stem.rule.schedule.moments.values()] == [("bn1", {})]  # a max-pool behind


@pytest.mark.parametrize("name", ["Inverted", "Residual"])
def test_scales_of_nought_and_other_map_sizes(name: str) -> None:
    """What is kept does not go through a division by the scale, and fits a map that was not the traced one."""
    torch.manual_seed(4)
    model = scramble(NETS[name]()).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data[::2] = 0
    graph = et.trace(model, torch.zeros(1, 3, 22, 19, dtype=torch.float64))
    x = torch.randn(3, 3, 37, 26, dtype=torch.float64)
    _, expected, _, _ = run(model, x, everything(graph, GradientFilter(patch_px=4), scales=True))
    _, found, _, _ = run(model, x, everything(graph, PooledChain(patch_px=4), scales=True))
    close(found, expected)


def test_frozen_scales_keep_nothing() -> None:
    model = scramble(NETS["Inverted"]())
    x = torch.randn(2, 3, 22, 19)
    graph = et.trace(model, x)
    own = everything(graph, PooledChain(), scales=True)
    one = own.model_copy(update={"learns": {name: ("bias",) if graph_norm(graph, name) and name != "depth.1" else roles
                                            for name, roles in own.learns.items()}})
    (segment,) = PooledChain.claim(graph, one)
    params = {name: value for name, value in model.state_dict().items()}
    needs = Needs((False,) * len(segment.inputs), one.learned())
    _, kept = segment.rule.forward(segment, [x], params, needs)
    assert [name for name in kept if name.startswith("moment:")] == ["moment:depth_1"]
    assert kept["moment:depth_1"].shape == (2, 12, 6, 5)


def test_a_chain_with_scales_does_not_mind_the_memory_order() -> None:
    """In float32, where native kernels run: channels last against contiguous, on masks that are AND-ed."""
    torch.manual_seed(6)
    found = []
    model, x = scramble(NETS["Residual"]()), torch.randn(2, 3, 22, 19)
    for layout in (torch.contiguous_format, torch.channels_last):
        model = model.to(memory_format=layout)
        plan = everything(et.trace(model, x), PooledChain(patch_px=3), scales=True)
        found.append(run(model, x.contiguous(memory_format=layout), plan)[1])
    for name, grad in found[0].items():
        assert torch.allclose(grad, found[1][name], rtol=1e-3, atol=1e-4 * float(grad.abs().max())), name


def graph_norm(graph: et.Graph, name: str) -> bool:
    return any(call.name == name for call in graph.layers("norm"))


class Between(nn.Module):
    """An identity between norm and activation, two norms in a row, an activation without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_norm, self.a_drop, self.a_act = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Identity(), nn.SiLU()
        self.b, self.b_one, self.b_two = nn.Conv2d(6, 4, 3, 2), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.c, self.c_act, self.c_norm = nn.Conv2d(4, 4, 1), nn.Hardswish(), nn.BatchNorm2d(4)
        self.d, self.d_one, self.d_two = nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.BatchNorm2d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a_act(self.a_drop(self.a_norm(self.a(x))))
        x = torch.relu(self.b_two(self.b_one(self.b(x))))
        x = self.c_norm(self.c_act(self.c(x)))
        return self.d_two(self.d_one(self.d(x))).mean((2, 3))


@pytest.mark.parametrize("patch_px", [2, 3, 4])
def test_what_stands_between_convolutions_may_come_in_any_order(patch_px: int) -> None:
    torch.manual_seed(8)
    model, x = scramble(Between()).double(), torch.randn(2, 3, 23, 18, dtype=torch.float64)
    graph = et.trace(model, x)
    _, expected, _, _ = run(model, x, everything(graph, GradientFilter(patch_px=patch_px), scales=True))
    _, found, _, names = run(model, x, everything(graph, PooledChain(patch_px=patch_px), scales=True))
    close(found, expected)
    assert names == ["a ... mean"]  # one run
