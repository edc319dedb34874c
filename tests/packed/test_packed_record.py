"""The file: small, whole or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from binary_nets import NETS, rewritten, scattered
from edgetune.apply import rewrite
from edgetune.compress import recipe
from edgetune.errors import EdgetuneError, ModelError, WeightsError
from edgetune.graph import trace
from edgetune.methods.arithmetic.xnor import XNOR
from edgetune.models import load_model
from edgetune.packed import Packed, PackedGraph, PackedNetwork, pack
from edgetune.packed.coding import decode, encode

SHAPE = (1, 3, 12, 12)
KEY = "edgetune.packed"


@pytest.fixture(scope="module")
def packed() -> Packed:
    torch.manual_seed(0)
    build, layers = NETS["residual"]
    return pack(rewritten(scattered(build()), layers, XNOR(), SHAPE), SHAPE)


def written(packed: Packed, path: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """Tensors and header of its file."""
    packed.save(path)
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()[KEY])  # noqa: SIM118


def test_goes_through_a_file(packed: Packed, tmp_path: Path) -> None:
    packed.save(tmp_path / "net")
    again = Packed.load(tmp_path / "net")
    assert again.graph == packed.graph
    x = torch.randn(2, *SHAPE[1:])
    assert torch.equal(PackedNetwork(again)(x), PackedNetwork(packed)(x))


@pytest.mark.parametrize("rest", ["float", "int8"])
def test_has_numbers_of_its_own(rest: Literal["float", "int8"]) -> None:
    build, layers = NETS["downsampled"]
    model = rewritten(scattered(build()), layers, XNOR(), SHAPE)
    packed = pack(model, SHAPE, rest)
    before = {key: tensor.clone() for key, tensor in packed.tensors.items()}
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    assert all(torch.equal(packed.tensors[key], tensor) for key, tensor in before.items())


def test_takes_a_bit_a_binary_weight(packed: Packed) -> None:
    assert packed.tensors["body_1_conv1.weight"].shape == (8 * 8 * 9 // 8,)
    assert packed.tensors["body_0_0.weight"].dtype == torch.int8


def test_resnet18_is_twenty_times_smaller(tmp_path: Path) -> None:
    model, shape = load_model("resnet18", num_classes=1000), (1, 3, 64, 64)
    before = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    graph = trace(model, torch.zeros(shape))
    rewrite(model, recipe(graph, XNOR()).plan, graph)
    pack(model.eval(), shape).save(tmp_path / "net")
    assert before / (tmp_path / "net").stat().st_size > 20


def test_refuses_other_files(packed: Packed, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nothing.*cannot be read as a packed network.*: give a file that edgetune"):
        Packed.load(tmp_path / "nothing")
    with pytest.raises(WeightsError, match="cannot be read"):
        Packed.load(tmp_path)
    (tmp_path / "garbled").write_bytes(b"xx")
    with pytest.raises(WeightsError, match="garbled"):
        Packed.load(tmp_path / "garbled")
    save_file({"a": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(WeightsError, match="it holds no packed network"):
        Packed.load(tmp_path / "other")
    packed.save(tmp_path / "short")
    (tmp_path / "short").write_bytes((tmp_path / "short").read_bytes()[:-7])
    with pytest.raises(WeightsError, match="short"):
        Packed.load(tmp_path / "short")


@pytest.mark.parametrize(("change", "told"), [
    ({"format": 2}, r"it has format 2, and 1 is read"), ({"more": 1}, "its header is not of a packed network"),
    ({"graph": {}}, "input_shape: Field required"), ({"graph": None}, "its header"), ({"graph": [[]]}, "its header")])
def test_refuses_other_headers(packed: Packed, tmp_path: Path, change: dict[str, Any], told: str) -> None:
    tensors, header = written(packed, tmp_path / "net")
    save_file(tensors, tmp_path / "net", {KEY: json.dumps(header | change)})
    with pytest.raises(WeightsError, match=told):
        Packed.load(tmp_path / "net")


@pytest.mark.parametrize(("layer", "change", "told"), [
    (0, {"colour": 1}, "Extra inputs are not permitted"), (0, {"op": "recurrent"}, "recurrent"),
    (0, {"name": "a:bits"}, "String should match"), (1, {"name": "body_0_0"}, "two layers are called 'body_0_0'"),
    (0, {"sources": ["later"]}, "reads 'later', which no layer before it makes"),
    (0, {"sources": []}, "reads 0 values"),
    (1, {"activation": "gelu"}, "'gelu' does not keep values between bounds"),
    (1, {"channels": 9}, "cannot be run"), (1, {"map": True, "bits": False}, "which no layer before it makes"),
    (2, {"sources": ["body_0_2_clip"]}, "cannot be run"), (-1, {"in_features": 15}, "cannot be run")])
def test_refuses_layers_that_cannot_be(packed: Packed, tmp_path: Path, layer: int, change: dict[str, Any],
                                       told: str) -> None:
    tensors, header = written(packed, tmp_path / "net")
    header["graph"]["layers"][layer] |= change
    save_file(tensors, tmp_path / "net", {KEY: json.dumps(header)})
    with pytest.raises(WeightsError, match=told):
        Packed.load(tmp_path / "net")


@pytest.mark.parametrize("change", [{"groups": 0}, {"stride": [0, 1]}, {"kernel": [0, 3]}, {"out_channels": 0},
                                    {"in_channels": 4}, {"pads": [-1, 0, 0, 0]}, {"in_channels": 10**12}])
def test_refuses_geometries_that_cannot_be(packed: Packed, tmp_path: Path, change: dict[str, Any]) -> None:
    for layer in (0, 2):
        tensors, header = written(packed, tmp_path / "net")
        header["graph"]["layers"][layer]["geometry"] |= change
        save_file(tensors, tmp_path / "net", {KEY: json.dumps(header)})
        with pytest.raises(WeightsError):
            Packed.load(tmp_path / "net")


def changed(packed: Packed, **tensors: torch.Tensor | None) -> Packed:
    new = {**packed.tensors, **{f"body_1_conv1.{role}": tensor for role, tensor in tensors.items()}}
    return Packed(packed.graph, {key: tensor for key, tensor in new.items() if tensor is not None})


def test_refuses_tensors_that_do_not_fit(packed: Packed) -> None:
    with pytest.raises(ModelError, match=r"'body_1_conv1\.flip' is missing"):
        changed(packed, flip=None)
    with pytest.raises(ModelError, match=r"'body_1_conv1\.other' is one too many"):
        changed(packed, other=torch.ones(1))
    with pytest.raises(ModelError, match=r"'body_1_conv1\.weight' is torch\.float32 .* where torch\.uint8 \(72,\)"):
        changed(packed, weight=torch.ones(8, 8, 3, 3))
    with pytest.raises(ModelError, match=r"'body_1_conv1\.threshold' is torch\.int32 \(7,\)"):
        changed(packed, threshold=torch.ones(7, dtype=torch.int32))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8)


@given(value=_JSON, data=st.data())
@settings(max_examples=40)
def test_any_header_is_read_or_refused(packed: Packed, tmp_path_factory: pytest.TempPathFactory, value: Any,
                                       data: st.DataObject) -> None:
    """A value anywhere in a true header is replaced: what can still be loaded can be made a network, or is refused."""
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    tensors, header = written(packed, path)
    place: Any = header["graph"]["layers"][data.draw(st.integers(0, len(header["graph"]["layers"]) - 1))]
    key = data.draw(st.sampled_from(sorted(place)))
    if key == "geometry" and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place)))
    place[key] = value
    path.write_bytes(save(tensors, {KEY: json.dumps(header)}))
    try:
        PackedNetwork(Packed.load(path))
    except EdgetuneError as failure:
        assert "fuzzed" in str(failure)


def test_header_is_plain_json(packed: Packed) -> None:
    assert PackedGraph.model_validate_json(packed.graph.model_dump_json()) == packed.graph


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (4, 7), (2, 1, 1, 1)])
def test_int8_is_half_a_step_off_at_most(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    weight[1] = 0.0
    tensors = encode(weight, "int8")
    again = decode(tensors, "int8", shape)
    limit = tensors["scale"].view(-1, *(1 for _ in shape[1:])) * 0.5001
    assert bool(((again - weight).abs() <= limit).all())
    assert torch.equal(again[1], weight[1])
