"""`edgetune compress`: what it leaves and tells, what other verbs make of it, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune.cli.progress import Bars
from verbs import draw, refusal, run_verb

QUICK = ("--epochs", 1, "--limit", 16, "--batch-size", 8)


def answer(*words: object) -> Any:
    done = run_verb(*words, "--json", "-")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


class TestCompress:
    def test_tells_layers_reasons_and_bytes(self, tmp_path: Path) -> None:
        done = run_verb("compress", *QUICK, "--skip", "features.2.0", "--out", tmp_path / "run")
        assert done.exit_code == 0, done.output
        rows = {words[0]: line for line in done.stdout.splitlines() if (words := line.split())}
        assert "float32: reads the pictures themselves" in rows["features.0.0"]
        assert "float32: is skipped as asked" in rows["features.2.0"]
        assert rows["features.5.0"].split()[1:] == ["xnor", "20736", "81.0", "KiB", "2.5", "KiB"]
        assert "accuracy before" in done.stdout and "accuracy after" in done.stdout
        assert "xnor in 6 of 8 convolutions" in done.stderr
        assert {"run.json", "plan.json", "weights.safetensors", "packed.safetensors", "report.html"} == {
            file.name for file in (tmp_path / "run").iterdir()}

    def test_tells_as_json(self, tmp_path: Path) -> None:
        told = answer("compress", *QUICK, "--method", "dir-net", "--set", "t_max=2", "--set", "activations=false",
                      "--learning-rate", 0.03, "--distil-logits", 0.5, "--out", tmp_path / "run")
        assert told["folder"] == str(tmp_path / "run") and told["status"] == "finished"
        assert (told["settings"]["learning_rate"], told["settings"]["optimizer"]) == (0.03, "adamw")
        assert told["settings"]["distil"] == {"features": 0.0, "logits": 0.5}
        assert told["settings"]["epochs"] == 1 and told["plain"] is None
        layer = next(row for row in told["layers"] if row["layer"] == "features.4.0")
        assert layer == {"layer": "features.4.0", "rewritten": True, "spared": None, "weights": 13824, "weight_bits": 1,
                         "float_bytes": 55296, "packed_bytes": 1728}
        assert told["packed_bytes"] == sum(row["packed_bytes"] for row in told["layers"]) < told["float_bytes"] / 20
        (settings,) = json.loads((tmp_path / "run" / "plan.json").read_text())["layers"]["features.4.0"]
        assert (settings["method"], settings["t_max"], settings["activations"]) == ("dir_net", 2.0, False)

    def test_a_network_of_additions_in_few_bits(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        told = answer("compress", *QUICK, "--method", "quantized_adder", "--set", "bits=4", "--out", folder)
        layer = next(row for row in told["layers"] if row["layer"] == "features.4.0")
        assert layer["weight_bits"] == 4 and layer["packed_bytes"] == layer["float_bytes"] / 8
        layers = json.loads((folder / "plan.json").read_text())["layers"]
        assert all(settings["bits"] == 4 and settings["range"] > 0 for (settings,) in layers.values())
        assert {"run.json", "plan.json", "weights.safetensors", "packed.safetensors", "report.html"} == {
            file.name for file in folder.iterdir()}
        assert answer("eval", folder)["accuracy"] == told["accuracy_after"]
        run = json.loads((folder / "run.json").read_text())
        assert answer("eval", folder, "--packed")["accuracy"] == run["packed"]["accuracy"]
        assert run["packed"]["file_bytes"] == (folder / "packed.safetensors").stat().st_size
        assert "compute by quantized adder" in (folder / "report.html").read_text()

    def test_goes_on_after_an_interruption(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        folder = tmp_path / "run"
        with monkeypatch.context() as patched:
            patched.setattr(Bars, "epoch", stop)
            done = run_verb("compress", *QUICK, "--epochs", 2, "--distil-features", 1, "--out", folder)
        assert done.exit_code == 130 and f"edgetune train --resume {folder}" in done.stderr
        told = answer("train", "--resume", folder)
        assert told["status"] == "finished" and len(told["epochs"]) == 2
        assert (folder / "report.html").exists()


class TestOtherVerbs:
    def test_eval_and_predict(self, compressed: Path, tmp_path: Path) -> None:
        assert answer("eval", compressed)["accuracy"] == json.loads((compressed / "run.json").read_text())[
            "accuracy_after"]
        draw(tmp_path / "a.png", 90)
        assert len(answer("predict", compressed, tmp_path / "a.png")["rows"][0]["classes"]) == 3

    def test_compare(self, compressed: Path) -> None:
        (row,) = answer("compare", compressed)["rows"]
        assert row["methods"] == ["xnor"] and row["accuracy_plain"] is None and row["measured"]

    def test_report(self, compressed: Path) -> None:
        assert run_verb("report", compressed).exit_code == 0
        page = (compressed / "report.html").read_text()
        assert "6 of 9 layers compute by xnor" in page and "AdamW" in page and "SGD" not in page
        assert "features.3.inner.0" in page and "weights, in bits" in page

    def test_profile_takes_its_plan(self, compressed: Path) -> None:
        told = answer("profile", "--plan", compressed / "plan.json", "--batch-size", 2)
        assert told["predicted"]["kept_bytes"] > 0

    def test_list_and_explain(self) -> None:
        told = answer("list")
        assert {"xnor", "dir_net"} <= set(told["arithmetic"]) <= set(told["methods"])
        assert answer("explain", "xnor")["family"] == "arithmetic"


class TestRefusals:
    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            (("--method", "xnro"), "method 'xnro' is unknown: did you mean xnor?"),
            (("--method", "exact"), "not change the numbers that layers compute with, but how they learn: choose one"),
            (("--set", "pad=0"), "method 'xnor' has no pad: it takes activations, pad_value, weights_from, input_sc"),
            (("--set", "pad_value=7"), "pad_value 7 does not hold for method 'xnor' (Input should be -1, 0 or 1)"),
            (("--set", "pad_value"), "--set pad_value gives no value: say --set pad_value=VALUE"),
            (("--skip", "nowhere"), "'nowhere' is no convolution of this network: its convolutions are features.0.0"),
            (("--take", "head"), "'head' is no convolution of this network"),
            (("--optimizer", "rprop"), "optimizer cannot be rprop (Input should be 'sgd' or 'adamw')"),
            (("--data", "digits:clean"), "no network is named for data 'digits:clean'"),
        ],
    )
    def test_what_makes_no_sense(self, words: tuple[object, ...], complaint: str, tmp_path: Path) -> None:
        assert complaint in refusal("compress", *words, "--limit", 16, "--out", tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_nothing_is_left(self, tmp_path: Path) -> None:
        layers = ["1.inner.0", "1.inner.3", "2.0", "3.inner.0", "3.inner.3", "4.0", "5.0"]
        skips = [word for layer in layers for word in ("--skip", f"features.{layer}")]
        told = refusal("compress", *skips, "--limit", 16, "--out", tmp_path / "run")
        assert told.startswith("no layer is left for xnor ('features.0.0' reads the pictures themselves): name some")

    @pytest.mark.parametrize("verb", ["train", "plan"])
    def test_other_verbs_point_here(self, verb: str, tmp_path: Path) -> None:
        told = refusal(verb, "--method", "xnor", "--out", tmp_path / "out")
        assert told.endswith("use `edgetune compress --method xnor`")

    def test_a_run_is_left_alone(self, compressed: Path) -> None:
        assert "holds a run already" in refusal("compress", "--out", compressed)
