"""The suite of codecs: rows that say what was measured; maps of every kind; other codecs where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edgetune.bench import activations, codec, codec_peers
from edgetune.bench.codec import CodecOptions
from edgetune.errors import EdgetuneError

PEERS = pytest.mark.parametrize("peer", codec_peers.PEERS, ids=lambda peer: peer.name)


def maps(*_: object) -> dict[str, list[torch.Tensor]]:
    x = torch.randn(2, 3, 8, 12)
    return {"ReLU": [x.relu(), x[:1].relu() * 9], "convolution": [x]}


@pytest.mark.parametrize("peers", [True, False])
def test_rows(peers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "maps", maps)
    seen: list[object] = []
    options = CodecOptions(networks=("resnet18",), bounds=(0.01, 0.1), rounds=1, peers=peers)
    found = codec.run(options, seen.append)
    assert found["rows"] == seen
    names = {"bounded"} | ({peer.name for peer in codec_peers.available()[0]} if peers else set())
    cells = {(row["case"], row["bound"], row["threads"], row["codec"]) for row in found["rows"]}
    assert cells == {(f"resnet18@224 {kind}", bound, threads, name) for kind in ("ReLU", "convolution")
                     for threads in (1, 2) for bound, name in [*((b, n) for b in (0.01, 0.1) for n in names),
                                                               *((None, f"{b} bits in groups") for b in (8, 4, 2))]}
    for row in found["rows"]:
        assert 0 < row["error"] <= 1 and row["ratio"] > 1 and row["encode_gb_s"] > 0 and row["decode_gb_s"] > 0
        assert (row["zeros_kept"] is None) == ("convolution" in row["case"])
        assert ("entropy_ratio" in row) == (row["bound"] is not None) and 0 < row["deviations"] < 3
        if row["codec"] == "bounded":
            assert row["zeros_kept"] in (None, 1.0) and row["zeros_made"] == 0 and row["error"] > 0.9


@PEERS
def test_peers_hold_the_bound(peer: codec_peers.Peer) -> None:
    pytest.importorskip(peer.package)
    x = torch.randn(2, 5, 9, 16).relu() * 3
    packed = peer.encode(x, 0.01)
    back = peer.decode(packed, x)
    assert (back.shape, back.dtype) == (x.shape, torch.float32)
    assert 0 < float((back.double() - x).abs().max()) <= 0.01 and 0 < peer.size(packed) < 4 * x.numel()


def test_the_entropy_of_values_by_hand() -> None:
    x = torch.tensor([0.0, 0, 0, 0, 0.5, 0.6, 2.5, 4.5])  # cells of 1: twice 0, and 2 and 4 once
    assert codec._entropy_bytes(x, 0.5) == pytest.approx((8 + 4 * 1.5) / 8)
    assert codec._entropy_bytes(x[4:], 0.5) == pytest.approx(4 * 1.5 / 8)
    assert codec._deviation(x) == pytest.approx(float(x[4:].std()))


def test_maps_are_those_of_a_training_step(shared: Callable[[str], Path]) -> None:
    data = shared("flowers5_224").parent
    shared("weights/mobilenet_v2_1.0_224_imagenet1001_dequant.safetensors")
    found = activations.maps("mobilenet_v2", data, batch=2, size_px=64, each=3)
    assert list(found) == list(activations.KINDS)
    assert [len(each) for each in found.values()] == [3, 3, 3, 3, 1]
    assert found["input"][0].shape == (2, 3, 64, 64)
    for x in found["ReLU"]:
        assert float(x.min()) == 0 and x.is_contiguous()
    for x in found["norm before ReLU"]:
        assert float(x.min()) < 0, "what is recorded is the norm's output before the ReLU works in place"
    for x in found["norm alone"]:
        assert x.shape[1] in (16, 24, 32, 64, 96, 160, 320)


def test_an_unknown_network_is_refused() -> None:
    with pytest.raises(EdgetuneError, match="'vgg' are at hand: choose among resnet18"):
        codec.run(CodecOptions(networks=("vgg",)))
