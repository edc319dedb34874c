"""Weights into networks: what fits, what does not, and what is said about it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from edgetune.errors import WeightsError
from edgetune.models import load_model, load_weights, shipped_weights


def saved(
    model: nn.Module, path: Path, prefix: str = "", leave_out: str = "-", **extra: torch.Tensor
) -> Path:
    """The model's weights as safetensors; keys that start with `leave_out` stay behind."""
    state = {
        prefix + key: value for key, value in model.state_dict().items() if not key.startswith(leave_out)
    }
    save_file({**state, **extra}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_everything_goes_in(tmp_path: Path, prefix: str) -> None:
    source, target = load_model("resnet20"), load_model("resnet20")
    report = load_weights(target, saved(source, tmp_path / "w.safetensors", prefix))
    assert report.head == "linear"
    assert report.head_loaded
    assert report.loaded == len(source.state_dict())
    for key, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[key])


def test_a_head_with_other_classes_stays_out(tmp_path: Path) -> None:
    source, target = load_model("resnet20", 10), load_model("resnet20", 5)
    kept = target.linear.weight.detach().clone()  # type: ignore[union-attr, operator]
    report = load_weights(target, saved(source, tmp_path / "w.safetensors"))
    assert not report.head_loaded
    assert report.file_classes == 10
    assert torch.equal(target.linear.weight, kept)  # type: ignore[union-attr, arg-type]
    assert torch.equal(target.conv1.weight, source.conv1.weight)  # type: ignore[union-attr, arg-type]


def test_a_file_without_head_is_reported(tmp_path: Path) -> None:
    report = load_weights(
        load_model("resnet20"), saved(load_model("resnet20"), tmp_path / "w", leave_out="linear")
    )
    assert not report.head_loaded
    assert report.file_classes is None


def test_missing_and_unknown_keys_are_counted_and_named(tmp_path: Path) -> None:
    path = saved(load_model("resnet20"), tmp_path / "w", leave_out="layer3.2.bn2", strange=torch.ones(1))
    model = load_model("resnet20")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError) as refusal:
        load_weights(model, path)
    text = str(refusal.value)
    assert "4 keys (layer3.2.bn2.weight" in text
    assert "missing" in text
    assert "1 key (strange) unknown" in text
    assert "--allow-partial" in text
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    report = load_weights(model, path, allow_partial=True)
    assert len(report.missing) == 4
    assert report.unexpected == ("strange",)


def test_another_network_is_refused_even_partially(tmp_path: Path) -> None:
    path = saved(load_model("resnet8"), tmp_path / "w")
    for allow in (False, True):
        with pytest.raises(WeightsError, match=r"of another shape|missing"):
            load_weights(load_model("mcunet"), path, allow_partial=allow)


def test_another_width_is_refused_with_shapes(tmp_path: Path) -> None:
    path = saved(load_model("mobilenet_v2_0.35"), tmp_path / "w")
    with pytest.raises(
        WeightsError, match=r"features\.0\.0\.weight: file \(16, 3, 3, 3\), network \(24, 3, 3, 3\)"
    ):
        load_weights(load_model("mobilenet_v2_0.75"), path)


@pytest.mark.parametrize("old_form", [False, True], ids=["zip", "bare pickle"])
def test_a_pickle_needs_trust(tmp_path: Path, old_form: bool) -> None:
    source, target, path = load_model("resnet20"), load_model("resnet20"), tmp_path / "w.safetensors"
    torch.save({"state_dict": source.state_dict()}, path, _use_new_zipfile_serialization=not old_form)
    with pytest.raises(WeightsError, match="--trust-pickle"):
        load_weights(target, path)
    load_weights(target, path, trust_pickle=True)
    assert torch.equal(target.conv1.weight, source.conv1.weight)  # type: ignore[union-attr, arg-type]


class Dangerous:
    """Would make a folder if a pickle of it were ever opened."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.folder,)


def test_even_a_trusted_pickle_runs_no_code(tmp_path: Path) -> None:
    path, folder = tmp_path / "w.pth", tmp_path / "made"
    path.write_bytes(pickle.dumps(Dangerous(str(folder)), protocol=2))
    with pytest.raises(WeightsError, match="state_dict"):
        load_weights(load_model("resnet20"), path, trust_pickle=True)
    assert not folder.exists()


def test_a_pickled_model_is_no_state_dict(tmp_path: Path) -> None:
    torch.save([torch.ones(1)], tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="no state dict"):
        load_weights(load_model("resnet20"), tmp_path / "w.pth", trust_pickle=True)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    model = load_model("resnet20")
    with pytest.raises(WeightsError, match="does not exist"):
        load_weights(model, tmp_path / "none.safetensors")
    whole = saved(model, tmp_path / "whole.safetensors").read_bytes()
    for name, content in (("cut", whole[: len(whole) // 2]), ("empty", b""), ("noise", b"\x01" * 64)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match="not a whole safetensors file"):
            load_weights(model, tmp_path / name)


def test_the_shipped_weights_fit() -> None:
    path = shipped_weights("digits_net")
    assert path is not None
    assert path.stat().st_size < 300_000
    assert load_weights(load_model("digits_net"), path).head_loaded
    assert shipped_weights("resnet18") is None
