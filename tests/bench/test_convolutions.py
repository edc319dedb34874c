"""The suites of binary and adder convolutions: well-formed rows and right answers; times are never judged."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgetune.bench import adder, binary, timing, whole
from edgetune.bench.convolutions import RESNET18, Drawn, Shape
from edgetune.contract import ArithmeticMethod
from edgetune.methods.arithmetic.xnor import XNOR

SHAPES = (
    Shape(network="tiny", in_channels=8, out_channels=12, size=6),
    Shape(network="tiny", in_channels=16, out_channels=16, size=5, kernel=1, stride=2),
)
SHORT: dict[str, Any] = {"batches": (1, 2), "threads": (1,), "rounds": 1, "turn_ms": 0.0}


@pytest.mark.parametrize("suite", [binary, adder], ids=["binary", "adder"])
def test_every_layer_and_method_has_a_row_whose_answer_is_exact(suite: Any) -> None:
    found = suite.run(suite.Options(shapes=SHAPES, networks=(), **SHORT))
    rows = found["rows"]
    methods = {row["method"] for row in rows}
    assert len(rows) == len(methods) * len(SHAPES) * 2 and len(methods) >= 3
    for row in rows:
        assert row["exact"] is True
        assert row["baseline"] in ("contiguous", "channels last", "laid out")
        assert row["speedup"] == pytest.approx(row["baseline_ms"] / row["method_ms"])
        assert row["gmac_s"] > 0 and row["threads"] == 1


def test_additions_of_bytes_are_compared_with_those_of_floats() -> None:
    rows = adder.run(adder.Options(shapes=SHAPES[:1], networks=(), **SHORT))["rows"]
    alone = next(row for row in rows if row["method"] == adder.FLOAT)
    for row in rows:
        if row["method"] != adder.FLOAT and row["batch"] == alone["batch"]:
            assert row["adder_speedup"] == pytest.approx(alone["method_ms"] / row["method_ms"])


def test_layers_are_named_and_drawn_as_they_are() -> None:
    assert [shape.case for shape in RESNET18[:2]] == ["resnet18 64@56 k3 s1", "resnet18 64-128@56 k3 s2"]
    drawn = Drawn.of(RESNET18[1], 2, seed=3)
    assert drawn.x.shape == (2, 64, 56, 56) and drawn.weight.shape == (128, 64, 3, 3)
    assert torch.equal(drawn.x, Drawn.of(RESNET18[1], 2, seed=3).x)
    assert RESNET18[1].geometry.out_hw == (28, 28)


def test_quick_takes_one_round_of_small_layers() -> None:
    found: timing.Result = binary.run(binary.Options(shapes=(*SHAPES, RESNET18[0]), quick=True, threads=(1,)))
    assert {row["case"].split()[0] for row in found["rows"]} == {"tiny"}


@pytest.mark.parametrize(("methods", "ratios"), [((XNOR(),), (10,)), (adder.METHODS, (3.5, 6))],
                         ids=["binary", "adder"])
def test_a_whole_network_is_packed_small_and_answers_alike(methods: tuple[ArithmeticMethod, ...],
                                                           ratios: tuple[float, ...]) -> None:
    rows = whole.measure(whole.Network(name="resnet20", size=32), methods, batch=2, threads=1, rounds=1, clock="cpu",
                         seed=0, compiles=False)
    assert [row["method"] for row in rows] == [f"packed {method.label}" for method in methods]
    for row, ratio in zip(rows, ratios, strict=True):
        assert row["exact"] and row["ratio"] > ratio and row["speedup"] == row["baseline_ms"] / row["method_ms"]
        assert row["baseline"] in ("contiguous", "channels last")
