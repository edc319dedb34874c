"""The run folder: what is written is read back, what is damaged is refused by name."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import edgetune as et
from edgetune.data import Dataset, Preprocess, load_data
from edgetune.errors import DataError, ModelError, RunError
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.models import load_model, model_card
from edgetune.plan import last_layers
from edgetune.run import (
    PLAN,
    RUN,
    WEIGHTS,
    Run,
    build,
    evaluate,
    fresh_folder,
    load_run,
    open_data,
    predict,
    read_tensors,
    sweep,
    write_tensors,
)
from edgetune.train import train

PREPROCESS = Preprocess.from_input(model_card("digits_net").input)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data("digits", PREPROCESS, limit=40)


@pytest.fixture(scope="module")
def trained(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A short run on digits, and the network as training left it in memory."""
    torch.manual_seed(0)
    model = load_model("digits_net")
    plan = last_layers(et.trace(model, torch.zeros(8, 1, 32, 32)), 2, PooledChain(patch_px=2))
    out = tmp_path_factory.mktemp("runs") / "digits"
    train(model, digits, plan, out=out, epochs=1, batch_size=8, model_name="digits_net",
          data_options={"limit": 40})  # fmt: skip
    return out, model


@pytest.fixture
def folder(trained: tuple[Path, nn.Module], tmp_path: Path) -> Path:
    """A copy of the run folder to damage."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def test_loaded_network_answers_as_the_trained_one(trained: tuple[Path, nn.Module], digits: Dataset) -> None:
    out, model = trained
    loaded = load_run(out)
    x = torch.stack([digits.val[i][0] for i in range(8)])
    with torch.no_grad():
        assert torch.equal(loaded.model(x), model(x))
    assert not any(module.training for module in loaded.model.modules())
    assert (loaded.classes, loaded.preprocess) == (digits.classes, PREPROCESS)
    assert sorted(path.name for path in out.iterdir()) == [PLAN, RUN, WEIGHTS]


def test_accuracy_is_what_the_run_says(trained: tuple[Path, nn.Module]) -> None:
    loaded = load_run(trained[0])
    data = open_data(loaded.run)
    score = evaluate(loaded.model, data.val, len(loaded.classes), batch_size=7)
    assert score.accuracy == loaded.run.accuracy_after == loaded.run.epochs[-1].val_accuracy
    assert sum(score.seen) == 40 and all(r <= s for r, s in zip(score.right, score.seen, strict=True))


def test_evaluate_counts_as_one_by_one(digits: Dataset) -> None:
    model = load_model("digits_net").train()
    score = evaluate(model, digits.val, 10, batch_size=7)
    assert model.training and model.features[0][1].training
    model.eval()
    with torch.no_grad():
        answers = [int(model(x[None]).argmax()) for x, _ in (digits.val[i] for i in range(len(digits.val)))]
    labels = list(digits.val.labels)
    assert score.seen == tuple(labels.count(c) for c in range(10))
    assert score.right == tuple(sum(a == y == c for a, y in zip(answers, labels, strict=True)) for c in range(10))


def test_evaluate_refuses_another_head(digits: Dataset) -> None:
    with pytest.raises(ModelError, match=r"gives \(32, 7\) for 32 pictures of 10 classes: fit its head"):
        evaluate(load_model("digits_net", 7), digits.val, 10)


def test_predict_gives_probabilities_likeliest_first(
    trained: tuple[Path, nn.Module], digits: Dataset, tmp_path: Path
) -> None:
    from PIL import Image

    pixels = digits.val.pixels(0)
    photo = tmp_path / "seven.png"
    Image.fromarray(pixels[0].numpy()).save(photo)
    loaded = load_run(trained[0])
    [whole] = predict(loaded, [photo], top=10)
    with torch.no_grad():
        shares = loaded.model(digits.val[0][0][None])[0].softmax(0)
    assert [name for name, _ in whole] == [loaded.classes[i] for i in shares.argsort(descending=True)]
    assert sum(share for _, share in whole) == pytest.approx(1)
    assert predict(loaded, [photo, photo]) == [whole[:3]] * 2
    with pytest.raises(DataError, match=r"nothing\.png"):
        predict(loaded, [tmp_path / "nothing.png"])


def test_weights_go_into_a_network_of_ones_own(trained: tuple[Path, nn.Module], digits: Dataset) -> None:
    mine = load_model("digits_net")
    assert load_run(trained[0], mine).model is mine
    assert torch.equal(mine.head.weight, trained[1].head.weight)


def test_a_head_that_the_builder_does_not_size_is_replaced(
    trained: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\ndef small():\n    return nn.Sequential(nn.Flatten(), nn.Linear(1024, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = Run.load(trained[0] / RUN)
    model = build(run.model_copy(update={"model": run.model.model_copy(update={"name": "my_nets:small"})}))
    assert model[1].out_features == 10


def test_a_nameless_network_has_to_be_given(folder: Path) -> None:
    _edit(folder / RUN, lambda run: run["model"].update(name=""))
    with pytest.raises(RunError, match="pass the network itself"):
        load_run(folder)


def _edit(path: Path, change) -> None:  # type: ignore[no-untyped-def]
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


DAMAGE = {
    "no run": (lambda f: (f / RUN).unlink(), "holds no run"),
    "no folder": (shutil.rmtree, "holds no run"),
    "half a file": (lambda f: (f / RUN).write_text((f / RUN).read_text()[:200]), "run.json' is not a Run"),
    "not text": (lambda f: (f / RUN).write_bytes(b"\xff\xfe\x00"), "run.json' cannot be read"),
    "foreign": (lambda f: (f / RUN).write_text('{"epochs": 3}'), "run.json' is not a Run"),
    "unknown key": (lambda f: _edit(f / RUN, lambda run: run.update(mood="good")), "mood"),
    "wrong type": (
        lambda f: _edit(f / RUN, lambda run: run.update(accuracy_before="high")),
        "accuracy_before",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "weights.safetensors' is missing or damaged"),
    "cut weights": (lambda f: os.truncate(f / WEIGHTS, 5000), "weights.safetensors' is missing or damaged"),
    "other weights": (
        lambda f: write_tensors(f / WEIGHTS, {"a": torch.zeros(1)}),
        "does not fit the network of its run",
    ),
    "no plan": (lambda f: (f / PLAN).unlink(), "plan.json' cannot be read"),
    "garbled plan": (lambda f: (f / PLAN).write_text("{"), "plan.json' is not a Plan"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(folder: Path, what: str) -> None:
    hurt, complaint = DAMAGE[what]
    hurt(folder)
    with pytest.raises(RunError, match=complaint) as told:
        load_run(folder)
    assert "\n" not in str(told.value)


def test_other_pictures_are_noticed(trained: tuple[Path, nn.Module]) -> None:
    run = Run.load(trained[0] / RUN)
    assert open_data(run).fingerprint == run.data.fingerprint
    fewer = run.model_copy(update={"data": run.data.model_copy(update={"limit": 20})})
    with pytest.raises(RunError, match="are not those that the run began with"):
        open_data(fewer)


def test_a_run_survives_json_to_the_last_bit(trained: tuple[Path, nn.Module], tmp_path: Path) -> None:
    run = Run.load(trained[0] / RUN)
    odd = run.model_copy(update={"epochs": tuple(
        row.model_copy(update={"train_loss": x, "ms": x * 1e5}) for x in torch.rand(50).sqrt().tolist()
        for row in run.epochs)})  # fmt: skip
    odd.save(tmp_path / RUN)
    assert Run.load(tmp_path / RUN) == odd


def test_a_run_from_before_there_was_a_cache_is_read(trained: tuple[Path, nn.Module], tmp_path: Path) -> None:
    told = json.loads((trained[0] / RUN).read_text())
    del told["settings"]["cache"], told["cached"]
    (tmp_path / RUN).write_text(json.dumps(told))
    assert Run.load(tmp_path / RUN) == Run.load(trained[0] / RUN)


def test_tensors_and_their_text_come_back(tmp_path: Path) -> None:
    tied = torch.randn(3, 4)
    tensors = {"a": tied, "tied": tied, "flipped": tied.t(), "count": torch.tensor(7)}
    write_tensors(tmp_path / "x", tensors, '{"step": 3}')
    back, about = read_tensors(tmp_path / "x")
    assert about == '{"step": 3}' and back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    write_tensors(tmp_path / "x", {"a": torch.zeros(3)})
    with monkeypatch.context() as full:
        full.setattr(os, call, _full)
        with pytest.raises(RunError, match=r"x' cannot be written \(No space left on device\)"):
            write_tensors(tmp_path / "x", {"a": torch.ones(3)})
    assert torch.equal(read_tensors(tmp_path / "x")[0]["a"], torch.zeros(3))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_sweep_takes_halves_only(tmp_path: Path) -> None:
    for name in (RUN, PLAN, WEIGHTS, "planned.checkpoint", ".hidden", "notes.txt"):
        (tmp_path / name).touch()
        (tmp_path / f".{name}.a1b2c3").touch()
    sweep(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {RUN, PLAN, WEIGHTS, "planned.checkpoint", ".hidden", "notes.txt", "..hidden.a1b2c3",
                    ".notes.txt.a1b2c3"}  # fmt: skip


def test_fresh_folders_do_not_exist_yet(tmp_path: Path) -> None:
    assert fresh_folder(tmp_path, "digits") == tmp_path / "digits-1"
    (tmp_path / "digits-1").mkdir()
    assert fresh_folder(tmp_path, "digits") == tmp_path / "digits-2"
