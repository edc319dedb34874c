"""The frozen part in integers in front of blocks that a method has rewritten."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import edgetune as et
from edgetune.apply import apply, rewrite
from edgetune.cache.cut import find_cut
from edgetune.data import Dataset
from edgetune.errors import ModelError, Refusal, RunError
from edgetune.frozen import NAME, has_front, install, integer_front
from edgetune.methods.backward.tinytl import Lite, TinyTL
from edgetune.models import load_model
from edgetune.run import Interrupted, Run, load_run
from edgetune.train import resume, train
from stopping import Stop, few_digits

SAMPLE = (8, 1, 32, 32)


def network() -> tuple[nn.Module, et.Plan]:
    torch.manual_seed(1)
    model = load_model("digits_net")
    return model, TinyTL().last_blocks(et.trace(model, torch.zeros(SAMPLE)), 1)


def pictures(count: int = 4) -> torch.Tensor:
    return torch.randn(count, *SAMPLE[1:], generator=torch.Generator().manual_seed(count))


def awakened(model: nn.Module) -> nn.Module:
    """With branches that add something."""
    for module in model.modules():
        if isinstance(module, Lite):
            nn.init.ones_(module.norm2.weight)
    return model


def test_branches_learn_behind_the_dequantised_map() -> None:
    (ours, plan), (theirs, _) = network(), network()
    front = integer_front(ours, plan, [pictures(8)])
    assert not any(isinstance(module, Lite) for module in ours.modules())
    rewrite(ours, plan)
    assert integer_front(ours, plan, [pictures(8)]).part == front.part
    install(ours, front)
    apply(ours, front.left_over(plan))
    apply(theirs, plan)
    x, cut, found = pictures(), find_cut(awakened(theirs.train()), SAMPLE[1:]), []
    awakened(ours.train())
    for model, run in ((ours, ours), (theirs, lambda x: cut.suffix(theirs, ours.get_submodule(NAME)(x)))):
        y, learned = run(x), {name: p for name, p in model.named_parameters() if p.requires_grad}
        found.append((y, dict(zip(learned, torch.autograd.grad(y.square().sum(), learned.values()), strict=True))))
    (y, grads), (y2, grads2) = found
    assert torch.equal(y, y2) and grads.keys() == grads2.keys() == plan.learned()
    assert all(torch.equal(grads[name], grads2[name]) and grads[name].any() for name in grads)


def test_blocks_come_first() -> None:
    model, plan = network()
    front = integer_front(model, plan, [pictures(8)])
    install(model, front)
    with pytest.raises(Refusal, match=r"'features\.3' is to be rewritten, but .* before the frozen part is put in"):
        apply(model, front.left_over(plan))


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return few_digits()


def start(data: Dataset, out: Path, model: nn.Module | None = None, **changes: object) -> Run:
    fresh, plan = network()
    settings = {"epochs": 2, "batch_size": 8, "augment": False, "frozen_bits": 8, "model_name": "digits_net", **changes}
    return train(fresh if model is None else model, data, plan, out=out, **settings)


@pytest.mark.usefixtures("one_thread")
class TestARun:
    def test_is_resumed_and_loaded(self, digits: Dataset, tmp_path: Path) -> None:
        model = network()[0]
        whole = start(digits, tmp_path / "whole", model, baseline=True)
        with pytest.raises(Interrupted):
            start(digits, tmp_path / "parts", baseline=True, progress=Stop())
        assert resume(tmp_path / "parts", data=digits).frozen == whole.frozen is not None
        states = [load_run(tmp_path / name).model.state_dict() for name in ("whole", "parts")] + [model.state_dict()]
        assert all(torch.equal(each[name], tensor) for each in states for name, tensor in states[0].items())
        assert states[0]["features.3.lite.norm2.weight"].any()
        x = pictures()
        with torch.no_grad():
            assert torch.equal(load_run(tmp_path / "parts").model(x), model.eval()(x))

    def test_plain_back_propagation_has_neither(self, digits: Dataset, tmp_path: Path) -> None:
        runs = [start(digits, tmp_path / str(bits), frozen_bits=bits, baseline=True) for bits in (8, None)]
        rows = [[(row.train_loss, row.val_loss) for row in run.plain.epochs] for run in runs if run.plain]
        assert rows[0] == rows[1] and len(rows[0]) == 2

    def test_with_the_network_that_was_interrupted(self, digits: Dataset, tmp_path: Path) -> None:
        start(digits, tmp_path / "whole")
        model = network()[0]
        with pytest.raises(Interrupted):
            start(digits, tmp_path / "parts", model, progress=Stop())
        resume(tmp_path / "parts", model=model, data=digits)
        wanted = load_run(tmp_path / "whole").model.state_dict()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())

    def test_plain_needs_the_float_network(self, digits: Dataset, tmp_path: Path) -> None:
        model = network()[0]
        with pytest.raises(Interrupted):
            start(digits, tmp_path / "parts", model, baseline=True, progress=Stop())
        with pytest.raises(ModelError, match=r"has a frozen part in integers .* build it anew"):
            resume(tmp_path / "parts", model=model, data=digits)
        resume(tmp_path / "parts", data=digits)

    def test_leaves_the_network_as_it_was_where_it_cannot_begin(
        self, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = network()[0]
        state = copy.deepcopy(model.state_dict())

        def full(file: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(RunError, match="No space left"):
                start(digits, tmp_path / "run", model)
        assert not has_front(model) and model.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
