"""Checkpointing: the very gradients of plain autograd, nothing kept inside a stretch, and nothing left behind."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edgetune as et
from edgetune.contract import LayerMethod, Plan
from edgetune.errors import Refusal
from edgetune.hosts import pointwise
from edgetune.methods.backward.asi import ASI
from edgetune.methods.backward.checkpoint import Checkpoint
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.low_bit import LowBit
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.methods.backward.sparse_update import SparseUpdate
from edgetune.plan import last_layers
from edgetune.profile import predicted_peak
from nets import NETS, block, scramble

FOLLOWED = ("Residual", "Inverted", "Stacked", "Branching")


class Drawn(nn.Module):
    """A random network: groups, strides, residual adds (in place or not), dropout, pooling, two inputs of a block."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.draws = [int(torch.randint(0, 6, (1,), generator=g)) for _ in range(6)]
        self.stem = block(3, 8)
        self.layers = nn.ModuleList(self._layer(kind) for kind in self.draws)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(8, 16), nn.ReLU(),
                                  nn.Linear(16, 5))

    @staticmethod
    def _layer(kind: int) -> nn.Module:
        return [lambda: block(8, 8, act=None), lambda: block(8, 8, groups=4), lambda: block(8, 8, act=nn.Hardswish),
                lambda: nn.Sequential(block(8, 8), nn.Dropout2d(0.2)),
                lambda: nn.Sequential(block(8, 12, 1), block(12, 8)),
                lambda: nn.Sequential(nn.MaxPool2d(3, 1, 1), block(8, 8, 1))][kind]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for kind, layer in zip(self.draws, self.layers, strict=True):
            y = layer(x)
            if kind == 0:
                y += x
                x = F.relu(y, inplace=True)
            else:
                x = x + y if kind % 2 else y
        return self.head(x)


def everything(model: nn.Module, x: torch.Tensor, method: LayerMethod | None = None) -> Plan:
    return last_layers(et.trace(model, x), None, method or Exact(), scales=True)


def in_stretches(model: nn.Module, x: torch.Tensor, plan: Plan, size: int, last: int = 0) -> Plan:
    """Every `size` convolutions and linear layers are a stretch, but for the last ones."""
    names = list(dict.fromkeys(call.name for call in et.trace(model, x).layers("conv", "linear")))
    return marked(plan, [names[at:at + size] for at in range(0, len(names) - last, size)])


def marked(plan: Plan, stretches: Sequence[Sequence[str]]) -> Plan:
    layers = dict(plan.layers)
    for number, names in enumerate(stretches):
        for name in names:
            layers[name] = (*layers.get(name, ()), Checkpoint(stretch=number))
    return plan.model_copy(update={"layers": layers})


def plain(model: nn.Module, plan: Plan) -> nn.Module:
    """Stock autograd, the same parameters learning, statistics frozen."""
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name in plan.learned())
    return twin


def training(model: nn.Module) -> nn.Module:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    F.cross_entropy(model(x), torch.arange(len(x)) % 5).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("seed", range(6))
def test_gradients_are_those_of_plain_autograd(seed: int) -> None:
    torch.manual_seed(seed)
    model, x = training(scramble(Drawn(seed)).double()), torch.randn(4, 3, 11, 9, dtype=torch.double)
    plan = everything(model, x)
    expected = gradients(plain(model, plan), x)
    for size in (1, 2, 3, 20):
        ours = copy.deepcopy(model)
        et.apply(ours, in_stretches(model, x, plan, size))
        assert_near(gradients(training(ours), x), expected)


@pytest.mark.parametrize("net", FOLLOWED)
@pytest.mark.parametrize("size", [1, 3])
def test_a_stretch_changes_no_bit(net: str, size: int, one_thread: None) -> None:
    torch.manual_seed(1)
    model, x = scramble(NETS[net]()).eval(), torch.randn(3, 3, 17, 17)
    plan, found = everything(model, x), []
    for each in (plan, in_stretches(model, x, plan, size)):
        ours = copy.deepcopy(model)
        et.apply(ours, each)
        found.append(gradients(ours, x))
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


@pytest.mark.parametrize("method", [PooledChain(patch_px=2), SparseUpdate(ratio=1 / 2)], ids=["chain", "sparse"])
def test_stands_around_other_methods(method: LayerMethod, one_thread: None) -> None:
    torch.manual_seed(2)
    model, x = scramble(NETS["Stacked"]()).eval(), torch.randn(3, 3, 24, 24)
    plan = everything(model, x)
    layers = {name: (method if "stage" in name else Exact(),) for name in plan.layers}
    plan = plan.model_copy(update={"layers": layers})
    stage = [name for name in plan.layers if "stage" in name]
    found = []
    for each in (plan, marked(plan, [["stem.0"], stage])):
        ours = copy.deepcopy(model)
        et.apply(ours, each)
        found.append(gradients(ours, x))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


@pytest.mark.parametrize("net", FOLLOWED)
def test_kept_bytes_are_predicted_to_the_byte_by_layer(net: str) -> None:
    model, x = scramble(NETS[net]()), torch.randn(4, 3, 33, 33)
    plan = in_stretches(model, x, everything(model, x), 2)
    predicted = et.profile(model, x, plan)
    et.apply(model, plan)
    measured = et.measure(model, x, repeats=1)
    assert predicted.layers == measured.layers


@pytest.mark.parametrize(("name", "size_px"), [("resnet18", 96), ("mobilenet_v2", 64), ("resnet20", 32)])
def test_the_peak_is_the_allocators(name: str, size_px: int) -> None:
    model, x = et.load_model(name), torch.randn(2, 3, size_px, size_px)
    graph = et.trace(model, x)
    plan = in_stretches(model, x, last_layers(graph, None, Exact(), scales=True), 4, last=4)
    before = et.profile(model, x, last_layers(graph, None, Exact(), scales=True), graph=graph)
    predicted = et.profile(model, x, plan, graph=graph)
    et.apply(model, plan, graph)
    measured = et.measure(model, x, repeats=1)
    assert predicted.layers == measured.layers
    assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.02)
    assert predicted.kept_bytes < before.kept_bytes / 2 and predicted.peak_bytes < before.peak_bytes


def test_only_inputs_are_kept_and_products_are_counted_twice() -> None:
    model, x = scramble(NETS["Residual"]()), torch.randn(4, 3, 32, 32)
    plan = everything(model, x)
    whole = et.profile(model, x, marked(plan, [list(plan.layers)]))
    rows, once = ({row.name: row for row in et.profile(model, x, each).layers} for each in
                  (marked(plan, [list(plan.layers)[1:]]), plan))
    assert sum(row.kept_bytes for row in whole.layers if row.kind == "conv") == 0  # the batch itself is no cost
    first, *others = list(plan.layers)[1:]
    assert rows[first].kept_bytes == 4 * 6 * 32 * 32 * 4
    for name in others:
        assert rows[name].kept_bytes == 0
        assert rows[name].backward_macs == once[name].backward_macs + once[name].forward_macs
        assert rows[name].forward_macs == once[name].forward_macs


def test_nothing_runs_again_where_nothing_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = scramble(NETS["Residual"]()), torch.randn(2, 3, 16, 16)
    plan = last_layers(et.trace(model, x), 1, Exact())
    convs = [call.name for call in et.trace(model, x).layers("conv")]
    et.apply(model, marked(plan, [convs[:3], convs[3:]]))
    calls = {name: counted(model.get_submodule(name), monkeypatch) for name in convs[:-1]}
    gradients(model, x)
    assert all(len(count) == 1 for count in calls.values())


def counted(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    count, forward = list[int](), module.forward

    def once(*args: torch.Tensor) -> torch.Tensor:
        count.append(1)
        return forward(*args)

    monkeypatch.setattr(module, "forward", once)
    return count


def test_deepcopy_inference_undo_and_micro_batches() -> None:
    model, x = scramble(NETS["Residual"]()).double().eval(), torch.randn(4, 3, 16, 16, dtype=torch.double)
    plan, names = everything(model, x), {id(m): set(m.__dict__) for m in model.modules()}
    expected, answer = gradients(plain(model, plan), x), model(x).detach()
    undo = et.apply(model, in_stretches(model, x, plan, 2))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(model(x), answer)
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert_near(gradients(twin, x), expected)  # the copy computes with its own parameters, forward and again
    for part in x.split(1):
        model.zero_grad()
        twin(part).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    twin.zero_grad()
    for at, part in enumerate(x.split(1)):
        (F.cross_entropy(twin(part), torch.tensor([at])) / 4).backward()
    assert_near({name: p.grad for name, p in twin.named_parameters() if p.grad is not None}, expected)
    undo()
    assert {id(m): set(m.__dict__) for m in model.modules()} == names


def test_two_backward_passes_need_retain_graph() -> None:
    model, x = scramble(NETS["Residual"]()), torch.randn(2, 3, 16, 16)
    et.apply(model, in_stretches(model, x, everything(model, x), 2))
    once = gradients(model, x)
    loss = F.cross_entropy(model(x), torch.arange(2))
    model.zero_grad()
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(dict((n, p.grad) for n, p in model.named_parameters() if n in once),
                               {name: 2 * gradient for name, gradient in once.items()})
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()
    with pytest.raises(Refusal, match="create_graph"):
        torch.autograd.grad(model(x).sum(), next(iter(model.parameters())), create_graph=True)


def test_a_failure_in_backward_leaves_nothing_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = scramble(NETS["Residual"]()), torch.randn(2, 3, 16, 16)
    et.apply(model, in_stretches(model, x, everything(model, x), 2))
    alive: list[weakref.ref[torch.UntypedStorage]] = []
    real: Callable[..., torch.Tensor] = pointwise.activate

    def watched(function: str, given: torch.Tensor, in_place: bool = False) -> torch.Tensor:
        y = real(function, given, in_place)
        alive.append(weakref.ref(y.untyped_storage()))
        if len(alive) == 8:  # six in forward, the seventh is made again
            raise MemoryError("no more")
        return y

    monkeypatch.setattr(pointwise, "activate", watched)
    out = model(x)
    with pytest.raises(MemoryError):
        out.sum().backward()
    del out
    gc.collect()
    assert len(alive) == 8 and all(ref() is None for ref in alive)


@pytest.mark.parametrize("case", ["apart", "crossed", "remembers", "kept twice", "unfollowed", "hooks", "overwritten"])
def test_refuses_by_name(case: str) -> None:
    net = {"unfollowed": "Opaque", "overwritten": "Branching"}.get(case, "Residual")
    model, x = scramble(NETS[net]()), torch.randn(2, 3, 32, 32)
    if case == "hooks":
        model.one[0][2].register_forward_hook(lambda *_: None)
    stretches, method, extra = [["one.0.0", "one.1.0"]], Exact(), ()
    if case == "apart":
        stretches, words = [["stem.0", "one.1.0"]], r"'one\.1\.0' has the same `stretch`, 0, as 'stem\.0'"
    elif case == "crossed":
        method, words = PooledChain(patch_px=2), r"'one\.0\.0' begins a stretch .* border lies inside of stem\.0"
    elif case == "remembers":
        method, words = ASI(), r"remembers something of its input.*'one\.0\.0'"
    elif case == "kept twice":
        extra, words = (LowBit(),), r"two kept methods, low_bit and checkpoint"
    elif case == "unfollowed":
        stretches, words = [["middle.conv"]], r"'middle\.conv' is called inside of what could not be followed"
    elif case == "hooks":
        words = r"'one\.0\.2' carries hooks, which would be called twice"
    else:
        stretches, words = [["d"]], "'relu' changes a value that others read"
        model = Overwriting()
    plan = everything(model, x, method)
    plan = plan.model_copy(update={"layers": {name: (*stack, *extra) for name, stack in plan.layers.items()}})
    with pytest.raises(Refusal, match=words):
        et.apply(model, marked(plan, stretches))


class Overwriting(nn.Module):
    """A value that one call overwrites, and another reads behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.d, self.relu, self.head = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True), \
            nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.c(x) * 2
        y = self.d(self.relu(z))
        return self.head((y + z).mean((2, 3)))


def test_stretches_travel_in_a_plan() -> None:
    model, x = scramble(NETS["Residual"]()), torch.randn(2, 3, 16, 16)
    plan = in_stretches(model, x, everything(model, x), 3)
    again = Plan.model_validate_json(plan.model_dump_json())
    assert again == plan
    graph = et.trace(model, x)
    assert predicted_peak(model, x, again, graph) == predicted_peak(model, x, plan, graph)
