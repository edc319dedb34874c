"""The record: through a file and back, and nothing inconsistent gets in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from edgetune.errors import ModelError, WeightsError
from edgetune.quantize import Quantized, QuantizedGraph
from edgetune.quantize.record import Conv
from integer_nets import odd


def test_goes_through_a_file(tmp_path: Path) -> None:
    _, quantized, _ = odd()
    quantized.save(tmp_path / "net.safetensors")
    again = Quantized.load(tmp_path / "net.safetensors")
    assert again.graph == quantized.graph
    assert again.tensors.keys() == quantized.tensors.keys()
    for key, tensor in quantized.tensors.items():
        assert again.tensors[key].dtype == tensor.dtype
        assert torch.equal(again.tensors[key], tensor), key


def test_header_is_plain_json() -> None:
    _, quantized, _ = odd()
    assert QuantizedGraph.model_validate_json(quantized.graph.model_dump_json()) == quantized.graph


def test_refuses_other_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(WeightsError, match=r"nothing.*cannot be read as a quantized network"):
        Quantized.load(tmp_path / "nothing")
    save_file({"a": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(WeightsError, match="it holds no quantized network"):
        Quantized.load(tmp_path / "other")
    (tmp_path / "garbled").write_bytes(b"xx")
    with pytest.raises(WeightsError, match="garbled"):
        Quantized.load(tmp_path / "garbled")


def changed(**tensors: torch.Tensor | None) -> Quantized:
    _, quantized, _ = odd()
    new = {**quantized.tensors, **{f"first.0.{role}": tensor for role, tensor in tensors.items()}}
    return Quantized(quantized.graph, {key: tensor for key, tensor in new.items() if tensor is not None})


def test_refuses_tensors_that_do_not_fit() -> None:
    with pytest.raises(ModelError, match=r"'first\.0\.bias' is missing"):
        changed(bias=None)
    with pytest.raises(ModelError, match=r"'first\.0\.other' is one too many"):
        changed(other=torch.ones(1))
    with pytest.raises(ModelError, match=r"'first\.0\.weight' is torch\.float32 .* where torch\.int8"):
        changed(weight=torch.ones(8, 3, 3, 3))
    with pytest.raises(ModelError, match=r"'first\.0\.bias' is torch\.int32 \(7,\)"):
        changed(bias=torch.ones(7, dtype=torch.int32))
    with pytest.raises(ModelError, match=r"'first\.0' can leave a 32-bit accumulator"):
        changed(bias=torch.full((8,), 2**24 + 1, dtype=torch.int32))


def test_refuses_graphs_that_do_not_hang_together() -> None:
    _, quantized, _ = odd()
    graph = quantized.graph
    with pytest.raises(ValidationError, match="which no layer before it makes"):
        QuantizedGraph(input_shape=graph.input_shape, input=graph.input, layers=graph.layers[1:])
    with pytest.raises(ValidationError, match=r"two layers are called 'first\.0'"):
        QuantizedGraph(input_shape=graph.input_shape, input=graph.input, layers=(graph.layers[0],) * 2)
    with pytest.raises(ValidationError, match="a linear layer is not the last one"):
        extra = graph.layers[0].model_copy(update={"name": "again"})
        QuantizedGraph(input_shape=graph.input_shape, input=graph.input, layers=(*graph.layers, extra))
    assert isinstance(graph["first.0"], Conv)
    with pytest.raises(KeyError):
        graph["nothing"]
