"""Networks rewritten by an arithmetic method: which layers take part, the training that fits, and the run it leaves."""

from __future__ import annotations

import copy
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import edgetune as et
from edgetune.compress import FIRST, FLOAT_BITS, Recipe, recipe, weights_of
from edgetune.data import Dataset, batches
from edgetune.distil import Distil
from edgetune.errors import DivergedError, ModelError, PlanError, Refusal, RunError
from edgetune.fit import estimate_norms
from edgetune.graph import Graph, trace
from edgetune.hosts.arithmetic import arithmetic_layers
from edgetune.loop import Silent
from edgetune.methods.arithmetic.addernet import AdderNet
from edgetune.methods.arithmetic.dir_net import DIRNet
from edgetune.methods.arithmetic.quantized_adder import QuantizedAdder
from edgetune.methods.arithmetic.xnor import XNOR
from edgetune.packed import Packed, PackedNetwork, rounded
from edgetune.run import PACKED, Interrupted, digest, evaluate, load_run, read_run
from edgetune.train import resume
from nets import Signed
from stopping import Stop, few_digits

FEW = {"epochs": 2, "batch_size": 8, "model_name": "digits_net", "data_options": {"limit": 24}}
ALL = {f"features.{name}" for name in ("1.inner.0", "1.inner.3", "2.0", "3.inner.0", "3.inner.3", "4.0", "5.0")}


@pytest.fixture(scope="module")
def data() -> Dataset:
    return few_digits()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return et.load_model("digits_net")


class Mixed(nn.Module):
    """A stem, a layer with groups, a shortcut, one plain layer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2)
        self.short, self.plain, self.head = nn.Conv2d(4, 4, 1, stride=2), nn.Conv2d(4, 4, 1), nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(self.plain(self.wide(x) + self.short(x)).mean((2, 3)))


def mixed() -> Graph:
    return trace(Mixed(), torch.zeros(1, 1, 8, 8))


class TestRecipe:
    def test_every_convolution_but_the_first_and_those_that_the_method_spares(self) -> None:
        made = recipe(mixed(), XNOR())
        assert made.plan.arithmetic() == {"plain": XNOR()}
        assert made.spared == {"stem": FIRST, "wide": "has groups, so that few signs are summed",
                               "short": "is a shortcut, all that its block's input goes through"}

    def test_skip_and_take(self) -> None:
        made = recipe(mixed(), XNOR(), skip=["plain"], take=["wide", "stem"])
        assert made.plan.arithmetic().keys() == {"wide", "stem"}
        assert made.spared["plain"] == "is skipped as asked" and made.spared.keys() == {"plain", "short"}

    def test_all_learns_and_norms_take_their_batches(self, model: nn.Module) -> None:
        plan = recipe(trace(model, torch.zeros(1, 1, 32, 32)), XNOR()).plan
        assert plan.norms == "batch" and plan.arithmetic().keys() == ALL
        assert plan.learned() == {name for name, _ in model.named_parameters()}

    @pytest.mark.parametrize("method", [XNOR(), DIRNet()])
    def test_settings_are_the_methods(self, method: XNOR | DIRNet) -> None:
        assert recipe(mixed(), method).settings == dict(type(method).recipe) != {}

    def test_weights_before_and_after(self) -> None:
        graph, made = mixed(), recipe(mixed(), XNOR())
        found = made.weights(graph)
        assert [(each.layer, each.count, each.bits) for each in found] == [
            ("stem", 36, 32), ("wide", 72, 32), ("short", 16, 32), ("plain", 16, 1), ("head", 40, FLOAT_BITS)]
        assert [(each.float_bytes, each.bytes) for each in found[-2:]] == [(64, 2), (160, 160)]
        assert found[3].spared is None and found[4].spared == "is a linear layer"

    def test_weights_of_a_network_that_is_rewritten_are_the_same(self) -> None:
        from edgetune.apply import trace_rewritten

        made = recipe(mixed(), XNOR())
        again = trace_rewritten(Mixed(), made.plan, torch.zeros(1, 1, 8, 8))
        assert weights_of(again, made.plan, made.spared) == made.weights(mixed())

    @pytest.mark.parametrize(
        ("skip", "take", "complaint"),
        [
            (["nope"], [], "'nope' is no convolution of this network: its convolutions are stem, wide, short, plain"),
            ([], ["head"], "'head' is no convolution"),
            (["plain"], ["plain"], "'plain' is both to be skipped and to be taken"),
            (["plain"], [], "no layer is left for xnor .'stem' reads the pictures themselves.: name some with --take"),
        ],
    )
    def test_names_that_make_no_sense(self, skip: list[str], take: list[str], complaint: str) -> None:
        with pytest.raises(PlanError, match=complaint):
            recipe(mixed(), XNOR(), skip, take)

    def test_a_network_without_convolutions(self) -> None:
        graph = trace(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.zeros(1, 1, 2, 2))
        with pytest.raises(PlanError, match="has no convolution that xnor could take"):
            recipe(graph, XNOR())


class TestCompress:
    def test_a_run_loads_again_with_the_same_accuracy(self, model: nn.Module, data: Dataset, tmp_path: Path) -> None:
        run = et.compress(model, data, XNOR(), out=tmp_path / "run", skip=["features.5.0"], **FEW)
        assert run.status == "finished" and run.plain is None and run.settings.optimizer == "adamw"
        assert run.costs is not None and run.costs.planned_measured is not None
        predicted, seen = run.costs.planned_predicted, run.costs.planned_measured
        assert predicted.optimizer_bytes == 2 * predicted.grad_bytes  # AdamW
        assert predicted.kept_bytes == pytest.approx(seen.kept_bytes, rel=0.01)
        assert predicted.peak_bytes == pytest.approx(seen.peak_bytes, rel=0.25)
        assert run.settings.learning_rate == XNOR.recipe["learning_rate"]
        loaded = load_run(tmp_path / "run")
        assert loaded.plan.arithmetic().keys() == ALL - {"features.5.0"}
        again = evaluate(loaded.model, data.val, 10, 8)
        assert (again.accuracy, again.loss) == (run.accuracy_after, pytest.approx(run.epochs[-1].val_loss))
        assert et.report(tmp_path / "run").exists()

    def test_settings_go_before_the_methods(self, model: nn.Module, data: Dataset, tmp_path: Path) -> None:
        given = {**FEW, "epochs": 1, "optimizer": "sgd", "learning_rate": 0.05}
        settings = et.compress(model, data, XNOR(), out=tmp_path / "run", **given).settings
        assert (settings.optimizer, settings.learning_rate, settings.weight_decay) == ("sgd", 0.05, 1e-4)

    def test_a_folder_in_use_is_refused(self, model: nn.Module, data: Dataset, tmp_path: Path) -> None:
        (tmp_path / "run.json").write_text("{}")
        with pytest.raises(RunError, match="holds a run already"):
            et.compress(model, data, XNOR(), out=tmp_path, **FEW)

    def test_a_layer_that_is_called_twice(self, data: Dataset, tmp_path: Path) -> None:
        conv = nn.Conv2d(4, 4, 3, padding=1)
        twice = nn.Sequential(nn.Conv2d(1, 4, 3), conv, nn.ReLU(), conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                              nn.Linear(4, 10))
        with pytest.raises(Refusal, match=r"is called twice: give each call a layer of its own, or .*--skip 1"):
            et.compress(twice, data, XNOR(), out=tmp_path / "run", **FEW)
        assert not (tmp_path / "run").exists()

    def test_weights_that_are_no_numbers(self, model: nn.Module, data: Dataset, tmp_path: Path) -> None:
        model.get_submodule("features.2.0").weight.data[0] = torch.nan  # type: ignore[index, union-attr]
        with pytest.raises(ModelError, match=r"'features\.2\.0\.weight' has values that are not numbers: load other"):
            et.compress(model, data, XNOR(), out=tmp_path / "run", **FEW)
        assert not (tmp_path / "run").exists()

    def test_numbers_lost_on_the_way_do_not_hide_behind_signs(self, data: Dataset, tmp_path: Path) -> None:
        network = signed()

        class Spoil(Silent):
            def advance(self) -> None:
                network.get_buffer("pair.1.running_mean").fill_(torch.nan)

        with pytest.raises(DivergedError, match=r"'pair\.1\.running_mean' has values .* after epoch 1"):
            et.compress(network, data, XNOR(), out=tmp_path / "run", progress=Spoil(), **FEW)

    def test_weights_are_signs_and_scales_in_the_end(self, model: nn.Module, data: Dataset, tmp_path: Path) -> None:
        et.compress(model, data, XNOR(weights_from=0.5), out=tmp_path / "run", **FEW)
        layer = load_run(tmp_path / "run").model.get_submodule("features.5.0")
        x = torch.randn(1, 48, 8, 8)
        assert isinstance(layer, nn.Conv2d)
        signs = torch.where(layer.weight >= 0, 1.0, -1.0) * layer.weight.abs().mean((1, 2, 3), keepdim=True)
        padded = nn.functional.pad(torch.where(x >= 0, 1.0, -1.0), (1, 1, 1, 1), value=1.0)
        assert torch.allclose(layer(x), nn.functional.conv2d(padded, signs), atol=1e-4)


class StopInside(Silent):
    """Interrupts in the middle of the second epoch."""

    def __init__(self) -> None:
        self.steps = 0

    def advance(self) -> None:
        self.steps += 1
        if self.steps == 4:
            raise KeyboardInterrupt


WAYS = [
    (XNOR(), {}, StopInside),
    (XNOR(weights_from=0.4), {"optimizer": "sgd", "learning_rate": 0.02}, StopInside),
    (DIRNet(t_max=2.0), {}, StopInside),
    (XNOR(), {"distil": Distil(features=0.5, logits=1.0)}, Stop),
    (XNOR(), {"distil": Distil(features=0.5, logits=1.0)}, StopInside),
]


def signed() -> nn.Module:
    torch.manual_seed(3)
    return Signed(10)


@pytest.mark.parametrize(("method", "settings", "stop"), WAYS)
def test_an_interruption_changes_nothing(
    method: XNOR | DIRNet, settings: dict[str, Any], stop: type[Silent], data: Dataset, tmp_path: Path,
    one_thread: None
) -> None:
    given = {"epochs": 2, "batch_size": 8, "take": ["stem"], **settings}
    whole = et.compress(ours := signed(), data, method, out=tmp_path / "whole", **given)
    with pytest.raises(Interrupted):
        et.compress(signed(), data, method, out=tmp_path / "cut", progress=stop(), **given)
    assert read_run(tmp_path / "cut").status == "interrupted"
    run = resume(tmp_path / "cut", model=(other := signed()), data=data)
    assert run.status == "finished" and run.accuracy_after == whole.accuracy_after
    for (name, mine), theirs in zip(ours.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    assert [e.train_loss for e in run.epochs] == [e.train_loss for e in whole.epochs]


def test_a_recipe_can_be_followed_by_itself(model: nn.Module, data: Dataset, tmp_path: Path) -> None:
    plan = recipe(trace(model, torch.zeros(1, 1, 32, 32)), XNOR()).plan
    run = Recipe(plan, {}, {"learning_rate": 0.03}).follow(model, data, out=tmp_path / "run", **{**FEW, "epochs": 1})
    assert run.settings.learning_rate == 0.03 and run.settings.optimizer == "sgd" and not run.settings.baseline


def test_a_binary_run_leaves_a_packed_network_with_the_same_answers(
    data: Dataset, model: nn.Module, tmp_path: Path
) -> None:
    run = et.compress(model, data, XNOR(), out=tmp_path, **{**FEW, "epochs": 1})
    file = tmp_path / PACKED
    assert run.packed is not None and run.packed.file_bytes == file.stat().st_size
    packed = PackedNetwork(Packed.load(file))
    assert evaluate(packed, data.val, len(data.classes)).accuracy == run.packed.accuracy
    trained, x = rounded(load_run(tmp_path).model), torch.stack([data.val[i][0] for i in range(8)])
    with torch.no_grad():
        assert torch.allclose(packed(x), trained(x), atol=1e-4)


def test_a_run_without_layers_of_few_bits_leaves_none(data: Dataset, model: nn.Module, tmp_path: Path) -> None:
    run = et.compress(model, data, AdderNet(), out=tmp_path, **{**FEW, "epochs": 1})
    assert run.packed is None and run.settings.clip_norm is None
    assert not (tmp_path / PACKED).exists()


ADDER = QuantizedAdder(bits=6)


class TestFitted:
    """Methods whose settings are fitted once the network is trained."""

    def test_plan_weights_accuracy_and_packed_network_are_those_of_the_fitted_network(
        self, data: Dataset, model: nn.Module, tmp_path: Path
    ) -> None:
        run = et.compress(model, data, ADDER, out=tmp_path, **FEW)
        loaded = load_run(tmp_path)
        methods = [layer.method for layer in arithmetic_layers(loaded.model).values()]
        assert len(methods) == len(ALL)
        assert all(isinstance(method, QuantizedAdder) and method.range for method in methods)
        assert loaded.plan.arithmetic() == {name: layer.method for name, layer in arithmetic_layers(model).items()}
        assert run.plan_digest == digest(loaded.plan)
        score = evaluate(loaded.model, data.val, len(data.classes), 8)
        assert score.accuracy == run.accuracy_after and read_run(tmp_path) == run
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, loaded.model.state_dict()[name]), name
        assert {file.name for file in tmp_path.iterdir()} == {"run.json", "plan.json", "weights.safetensors", PACKED}
        packed, x = PackedNetwork(Packed.load(tmp_path / PACKED)), torch.stack([data.val[i][0] for i in range(8)])
        assert run.packed is not None
        assert evaluate(packed, data.val, len(data.classes)).accuracy == run.packed.accuracy
        with torch.no_grad():
            assert torch.allclose(packed(x), rounded(loaded.model)(x), atol=1e-4)

    def test_norms_are_means_over_training_pictures(self, data: Dataset, model: nn.Module, tmp_path: Path) -> None:
        et.compress(model, data, ADDER, out=tmp_path, **{**FEW, "epochs": 1})
        again = copy.deepcopy(model)
        estimate_norms(again, [x for x, _ in batches(data.train, 8)])
        for name, tensor in model.state_dict().items():
            assert torch.allclose(tensor, again.state_dict()[name], rtol=1e-5), name

    def test_frozen_norms_stay(self, data: Dataset, model: nn.Module, tmp_path: Path) -> None:
        graph = trace(model, torch.zeros(1, 1, 32, 32))
        plan = recipe(graph, ADDER).plan.model_copy(update={"norms": "frozen"})
        before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "running" in name}
        et.train(model, data, plan, out=tmp_path, **{**FEW, "epochs": 1})
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
        assert all(method.range for method in load_run(tmp_path).plan.arithmetic().values())

    def test_a_kill_while_any_of_its_files_is_written_changes_nothing(
        self, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
    ) -> None:
        few = {**FEW, "epochs": 1, "take": ["stem"]}
        whole, written = self._die(tmp_path / "whole", 0, data, monkeypatch, **few), self.writes
        wanted = load_run(tmp_path / "whole", signed())
        assert whole is not None
        # the last ones: plan trained by, plan fitted, weights, packed, run.json twice
        for write in range(written - 5, written + 1):
            out = tmp_path / f"cut-{write}"
            assert self._die(out, write, data, monkeypatch, costs=whole.costs, **few) is None
            agree(out, data)
            assert read_run(out).status == "running"
            assert (out / "trained.json").exists() == (write > written - 5)
            resume(out, model=signed(), data=data)
            found = load_run(out, signed())
            assert found.run.accuracy_after == whole.accuracy_after and found.plan == wanted.plan
            assert found.run.plan_digest == whole.plan_digest and not (out / "trained.json").exists()
            for name, tensor in wanted.model.state_dict().items():
                assert torch.equal(tensor, found.model.state_dict()[name]), name

    def _die(self, out: Path, write: int, data: Dataset, monkeypatch: pytest.MonkeyPatch, **few: Any) -> et.Run | None:
        """A run that is killed as its `write`-th file takes its place; `writes` is how many have."""
        self.writes, replace = 0, os.replace

        def wrapped(*given: Any, **named: Any) -> None:
            self.writes += 1
            if self.writes == write:
                raise Killed
            replace(*given, **named)

        with monkeypatch.context() as patch, suppress(Killed):
            patch.setattr(os, "replace", wrapped)
            return et.compress(signed(), data, ADDER, out=out, **few)
        return None

    def test_an_interruption_while_it_is_fitted(
        self, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
    ) -> None:
        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        few = {**FEW, "epochs": 1, "take": ["stem"]}
        whole, ours = et.compress(signed(), data, ADDER, out=tmp_path / "whole", **few), signed()
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr("edgetune.job.evaluate", stop)
            et.compress(ours, data, ADDER, out=tmp_path / "cut", costs=whole.costs, **few)
        assert read_run(tmp_path / "cut").status == "interrupted"
        assert not arithmetic_layers(ours)
        run = resume(tmp_path / "cut", model=ours, data=data)
        assert run.accuracy_after == whole.accuracy_after and run.plan_digest == whole.plan_digest


class Killed(BaseException):
    """Stands for a kill: nobody catches it, so nothing more is written."""


def agree(folder: Path, data: Dataset) -> None:
    """Plan and weights that a run is loaded with belong together: norms fit the ranges, or are those of training."""
    loaded = load_run(folder, signed())
    if not all(method.range for method in loaded.plan.arithmetic().values()):
        return
    again = copy.deepcopy(loaded.model)
    estimate_norms(again, [x for x, _ in batches(data.train, 8)])
    for name, tensor in loaded.model.state_dict().items():
        assert torch.allclose(tensor, again.state_dict()[name], rtol=1e-4), name
