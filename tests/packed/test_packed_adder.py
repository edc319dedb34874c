"""Packed layers of additions: the very answers of the trained ones, in as many bits a weight as were asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from binary_nets import NETS, rewritten, scattered
from edgetune.apply import rewrite
from edgetune.compress import quantize_layers
from edgetune.contract import Plan
from edgetune.errors import ModelError, WeightsError
from edgetune.graph import trace
from edgetune.hosts.arithmetic import arithmetic_layers
from edgetune.kernels import calls
from edgetune.methods.arithmetic.addernet import AdderNet
from edgetune.methods.arithmetic.quantized_adder import QuantizedAdder
from edgetune.methods.arithmetic.xnor import XNOR
from edgetune.packed import Packed, PackedNetwork, pack, rounded
from edgetune.packed.coding import dense_steps, plain_steps
from edgetune.packed.layers import Adder

SHAPE = (1, 3, 19, 16)
METHODS = [QuantizedAdder(bits=bits, exact=bits != 5, groups=1 + bits % 4) for bits in range(2, 9)]


def quantized(net: str, method: QuantizedAdder, layers: tuple[str, ...] | None = None) -> nn.Module:
    """A network of NETS whose layers without groups are quantized adder layers."""
    build, names = NETS[net]
    taken = layers or tuple(name for name in names if name != "body.two.0")
    model = rewritten(scattered(build()), taken, AdderNet(), SHAPE)
    quantize_layers(model, method, [torch.randn(4, *SHAPE[1:])])
    return model.eval()


def met(layers: dict[str, nn.Module], run: Callable[[], object]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What each layer reads and gives, by name."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = [layer.register_forward_hook(lambda _, given, made, name=name: seen.__setitem__(name, (given[0], made)))
               for name, layer in layers.items()]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return seen


def check(model: nn.Module, packed: Packed, x: torch.Tensor) -> None:
    """Every adder layer gives the same of the same map, to the bit; and the whole network but for sums in float."""
    network, x = PackedNetwork(packed), x.contiguous(memory_format=torch.channels_last)
    steps = {run[0].name: step for run, step in zip(network.runs, network.steps, strict=True)
             if isinstance(run[0], Adder)}
    layers = {name.replace(".", "_"): layer for name, layer in arithmetic_layers(model).items()
              if isinstance(layer.method, QuantizedAdder)}
    wanted = met(dict(layers), lambda: model(x))
    assert wanted.keys() == steps.keys() and wanted
    for name, (read, made) in wanted.items():
        assert torch.equal(steps[name](read)[name], made), name
    with torch.no_grad():
        torch.testing.assert_close(network(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.bits} bits")
@pytest.mark.parametrize("net", NETS)
def test_gives_the_same_answer(net: str, method: QuantizedAdder) -> None:
    model = quantized(net, method)
    as_float, as_int8 = pack(model, SHAPE, rest="float"), pack(model, SHAPE)
    for n, h, w in ((1, 19, 16), (0, 19, 16), (2, 30, 21)):
        x = torch.randn(n, 3, h, w)
        check(model, as_float, x)
        check(rounded(model), as_int8, x)


def test_without_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized("residual", QuantizedAdder(bits=4))
    monkeypatch.setattr(calls, "_functions", dict.fromkeys(
        [(name, dtype) for name in calls.ARGUMENTS for dtype in (torch.float32, torch.bfloat16)]))
    check(model, pack(model, SHAPE, rest="float"), torch.randn(2, *SHAPE[1:]))


def test_stands_beside_layers_of_signs() -> None:
    build, names = NETS["residual"]
    model, plan = scattered(build()), {name: (XNOR(),) if name.endswith("1") else (QuantizedAdder(bits=6, range=2.0),)
                                       for name in names}
    rewrite(model, Plan(input_shape=SHAPE, layers=plan), trace(model, torch.zeros(SHAPE)))
    packed = pack(model, SHAPE, rest="float")
    assert {"adder", "binary_map"} <= {layer.op for layer in packed.graph.layers}
    check(model, packed, torch.randn(3, *SHAPE[1:]))


@pytest.mark.parametrize("bits", range(2, 9))
def test_takes_its_bits_a_weight_in_the_file(bits: int, tmp_path: Path) -> None:
    packed = pack(quantized("residual", QuantizedAdder(bits=bits)), SHAPE)
    assert packed.tensors["body_1_conv1.weight"].shape == (8 * 8 * 9 * bits // 8,)
    packed.save(tmp_path / "net")
    again, x = Packed.load(tmp_path / "net"), torch.randn(2, *SHAPE[1:])
    assert again.graph == packed.graph
    assert torch.equal(PackedNetwork(again)(x), PackedNetwork(packed)(x))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 3, 2, 3), (4, 8, 1, 1), (0, 3, 1, 1)])
def test_steps_come_back_from_their_bits(bits: int, shape: tuple[int, ...]) -> None:
    steps = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    dense = dense_steps(steps, bits)
    assert len(dense) == -(-steps.numel() * bits // 8)
    assert torch.equal(plain_steps(dense, bits, shape), steps)
    flat = "".join(f"{byte:08b}"[::-1] for byte in dense.tolist())
    assert [int(flat[k * bits:(k + 1) * bits][::-1], 2) for k in range(steps.numel())] == steps.flatten().tolist()


@pytest.fixture(scope="module")
def packed() -> Packed:
    torch.manual_seed(0)
    return pack(quantized("residual", QuantizedAdder(bits=5, groups=3)), SHAPE)


def changed(packed: Packed, **tensors: torch.Tensor) -> Packed:
    return Packed(packed.graph, packed.tensors | {f"body_1_conv1.{role}": tensor for role, tensor in tensors.items()})


def test_refuses_tensors_that_do_not_fit(packed: Packed) -> None:
    group = packed.tensors["body_1_conv1.group"]
    for other in (group + 1, torch.zeros_like(group), torch.full_like(group, 255)):
        with pytest.raises(ModelError, match=r"layer 'body_1_conv1' cannot be run, as its filters are in groups \["):
            changed(packed, group=other)
    with pytest.raises(ModelError, match=r"'body_1_conv1\.step' is torch\.float32 \(4,\) where"):
        changed(packed, step=torch.ones(4))
    with pytest.raises(ModelError, match=r"where torch\.uint8 \(360,\) is meant"):
        changed(packed, weight=torch.zeros(359, dtype=torch.uint8))


@pytest.mark.parametrize("change", [{"bits": 1}, {"bits": 9}, {"bits": 4}, {"groups": 0}, {"groups": 257},
                                    {"groups": 2}, {"bias": True}])
def test_refuses_headers_that_cannot_be(packed: Packed, tmp_path: Path, change: dict[str, object]) -> None:
    changed_layers = [layer.model_copy(update=change) if layer.name == "body_1_conv1" else layer
                      for layer in packed.graph.layers]
    bad = object.__new__(Packed)
    object.__setattr__(bad, "graph", packed.graph.model_copy(update={"layers": tuple(changed_layers)}))
    object.__setattr__(bad, "tensors", packed.tensors)
    bad.save(tmp_path / "net")
    with pytest.raises(WeightsError, match="cannot be read as a packed network"):
        Packed.load(tmp_path / "net")
