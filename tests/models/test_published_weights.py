"""The weights at hand, on the pictures at hand: accuracy near what their authors and the manifest state."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edgetune.data import Preprocess, batches, load_data, open_picture
from edgetune.errors import WeightsError
from edgetune.models import load_model, load_weights, model_card, shipped_weights

Shared = Callable[[str], Path]


def accuracy(name: str, weights: Path, source: str, limit: int | None = None) -> float:
    model = load_model(name)
    load_weights(model, weights)
    val = load_data(source, Preprocess.from_input(model_card(name).input), limit=limit).val
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches(val, 100, shuffle=False))
    return right / len(val)


@pytest.mark.parametrize(
    ("name", "file", "stated"),
    [("resnet20", "resnet20_cifar10", 0.810), ("resnet8", "resnet8_cifar10_mlperftiny", 0.755)],
)
def test_cifar10(shared: Shared, name: str, file: str, stated: float) -> None:
    weights, data = shared(f"weights/{file}.safetensors"), shared("cifar10_jpeg.npz")
    # two standard deviations of a share of 500 are 3.5 points
    assert abs(accuracy(name, weights, str(data), 500) - stated) < 0.035
    drifted = accuracy(name, weights, f"{data}:drift", 500)
    assert 0.3 < drifted < stated - 0.1


def imagenet_accuracy(shared: Shared, model: torch.nn.Module, offset: int) -> float:
    """Top-1 of every eighth of the 500 photos; `offset` is 1 where class 0 is the background."""
    preprocess = Preprocess.from_input(model_card("mobilenet_v2_tf").input)
    with shared("imagenet_samples_256/labels.csv").open() as file:
        rows = list(csv.DictReader(file))[::8]
    right = 0
    for first in range(0, len(rows), 25):
        part = rows[first : first + 25]
        x = torch.stack(
            [preprocess.apply(open_picture(shared(f"imagenet_samples_256/{row['file']}"))) for row in part]
        )
        y = torch.tensor([int(row["class_index_ilsvrc2012"]) + offset for row in part])
        with torch.no_grad():
            right += int((model(x).argmax(1) == y).sum())
    return right / len(rows)


def test_mobilenet_v2_on_imagenet(shared: Shared) -> None:
    weights = shared("weights/mobilenet_v2_1.0_224_imagenet1001_dequant.safetensors")
    model = load_model("mobilenet_v2_tf")
    assert load_weights(model, weights).head_loaded
    assert (
        0.76 < imagenet_accuracy(shared, model, 1) < 0.96
    )  # stated: 86.5 %, give or take two deviations of 63


def test_imagenet_weights_on_five_flowers_keep_the_body(shared: Shared) -> None:
    weights = shared("weights/mobilenet_v2_1.0_224_imagenet1001_dequant.safetensors")
    report = load_weights(load_model("mobilenet_v2_tf", 5), weights)
    assert not report.head_loaded
    assert report.file_classes == 1001
    assert report.head == "classifier.1"


def test_a_backbone_without_its_last_layers_says_so(shared: Shared) -> None:
    weights = shared("weights/mobilenet_v1_1.0_224_imagenet_float_upto_dw13.safetensors")
    with pytest.raises(WeightsError, match=r"5 keys \(blocks\.13\.pw\.weight.*--allow-partial"):
        load_weights(load_model("mobilenet_v1"), weights)
    assert len(load_weights(load_model("mobilenet_v1"), weights, allow_partial=True).missing) == 5


def test_keras_names_are_read(shared: Shared) -> None:
    weights = shared("weights/mobilenet_v1_0.25_96_vww_mlperftiny.safetensors")
    assert load_weights(load_model("mobilenet_v1_vww"), weights).head_loaded


def test_shipped_digits_fall_with_drift() -> None:
    weights = shipped_weights("digits_net")
    assert weights is not None
    assert accuracy("digits_net", weights, "digits:clean") > 0.97
    assert 0.5 < accuracy("digits_net", weights, "digits") < 0.75
