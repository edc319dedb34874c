"""What each verb prints for people and gives to programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgetune.cli import VERBS
from verbs import QUICK, draw, refusal, run_verb


def answer(*words: object) -> Any:
    """What a verb gives to a program."""
    done = run_verb(*words, "--json", "-")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples_that_hold(verb: str) -> None:
    done = run_verb(verb, "--help")
    assert done.exit_code == 0
    assert f"edgetune {verb}" in done.stdout and "Examples" in done.stdout
    assert len(done.stdout.splitlines()) > 12


def test_help_comes_at_once_because_it_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['edgetune', 'train', '--help']\nfrom edgetune.cli import main\ntry: main()\n"
        "finally: print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_module_is_the_same_as_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgetune", "explain", "exact"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Exact gradients")


class TestQuantize:
    def test_writes_the_network_and_compares(self, finished: Path, tmp_path: Path) -> None:
        from edgetune.quantize import Quantized

        found = answer("quantize", finished, "--pictures", 30, "--batch-size", 20, "--out", tmp_path / "net")
        quantized = Quantized.load(tmp_path / "net")
        assert [layer["name"] for layer in found["layers"]] == [layer.name for layer in quantized.graph.layers]
        assert found["pictures"] == 30
        assert abs(found["float"]["accuracy"] - found["int8"]["accuracy"]) <= 0.1
        assert found["int8"]["weight_bytes"] < 0.3 * found["float"]["weight_bytes"]

    def test_tells_people_where_it_is(self, finished: Path) -> None:
        done = run_verb("quantize", finished, "--keep-percent", 99.9, "--pictures", 1000)
        assert done.exit_code == 0, done.output
        assert "int8" in done.stdout and "40 training pictures" in done.stdout
        assert (finished / "quantized.safetensors").exists()

    def test_refuses_shares_that_are_none(self, finished: Path) -> None:
        assert "--keep-percent 101 is no share" in refusal("quantize", finished, "--keep-percent", 101)


class TestTrain:
    def test_leaves_a_whole_run_folder(self, finished: Path) -> None:
        assert {"run.json", "plan.json", "weights.safetensors", "report.html"} <= {f.name for f in finished.iterdir()}
        assert not list(finished.glob("*.checkpoint"))

    def test_result_has_both_trainings_predicted_and_measured(self, finished: Path) -> None:
        run = json.loads((finished / "run.json").read_text())
        assert 0 <= run["accuracy_after"] <= 1 and 0 <= run["plain"]["accuracy"] <= 1
        for name in ("planned_predicted", "planned_measured", "plain_predicted", "plain_measured"):
            assert run["costs"][name]["kept_bytes"] > 0 and run["costs"][name]["peak_bytes"] > 0

    def test_tells_as_json(self, tmp_path: Path) -> None:
        told = answer("train", *QUICK, "--limit", 20, "--out", tmp_path / "run")
        assert told["status"] == "finished" and told["plain"] is None
        assert told["folder"] == str(tmp_path / "run")

    def test_head_of_another_class_count_is_replaced(self, photos: Path, tmp_path: Path) -> None:
        done = run_verb("train", "--model", "digits_net", "--data", photos, *QUICK, "--out", tmp_path / "run")
        assert done.exit_code == 0, done.output
        assert "its head (10 classes) is replaced by a new one for 2 classes" in done.stderr
        assert json.loads((tmp_path / "run" / "run.json").read_text())["classes"] == ["dark", "light"]

    def test_takes_a_plan_file_as_edited(self, tmp_path: Path) -> None:
        file = tmp_path / "plan.json"
        assert run_verb("plan", "--method", "pooled_chain", "--last", 2, "--limit", 20, "--out", file).exit_code == 0
        plan = json.loads(file.read_text())
        for settings in plan["layers"].values():
            settings[0]["patch_px"] = 4
        file.write_text(json.dumps(plan))
        told = answer("train", "--plan", file, "--epochs", 1, "--limit", 20, "--no-baseline", "--out", tmp_path / "run")
        assert told["status"] == "finished"
        used = json.loads((tmp_path / "run" / "plan.json").read_text())
        assert {settings[0]["patch_px"] for settings in used["layers"].values()} == {4}

    def test_blocks_get_branches_that_every_verb_knows(self, tmp_path: Path) -> None:
        run, wish = tmp_path / "run", ("--method", "tinytl", "--last-blocks", 1, "--limit", 20)
        done = run_verb("plan", *wish, "--out", tmp_path / "plan.json")
        assert done.exit_code == 0 and "features.3.lite.conv1" in done.stdout
        told = answer("train", *wish, "--epochs", 1, "--no-baseline", "--out", run)
        assert json.loads((run / "plan.json").read_text())["layers"].keys() == {"features.3"}
        assert answer("eval", run)["accuracy"] == told["accuracy_after"]
        draw(tmp_path / "digit.png", 100, "L")
        assert run_verb("predict", run, tmp_path / "digit.png").exit_code == 0
        assert run_verb("report", run).exit_code == 0
        assert "features.3.lite.conv1" in (run / "report.html").read_text()
        plan = answer("plan", "--method", "mobiletl", "--last-blocks", 1, "--model", "mobilenet_v2", "--limit", 20,
                      "--data", "digits", "--size", 64, "--batch-size", 4, "--out", tmp_path / "plan.json")["plan"]
        assert list(plan["layers"]) == ["features.17.conv.0.0", "features.17.conv.1.0", "features.17.conv.2",
                                        "features.18.0"]

    def test_the_last_blocks_learn_by_mobiletl(self, tmp_path: Path) -> None:
        network = ("--model", "mobilenet_v3_small", "--data", "digits", "--size", 32, "--limit", 20)
        told = answer("plan", *network, "--last-blocks", 2, "--out", tmp_path / "plan.json")
        layers = told["plan"]["layers"]
        assert {stack[0]["method"] for stack in layers.values()} == {"mobiletl"}
        assert {name.split(".")[1] for name in layers} == {"10", "11", "12"}

    def test_takes_a_published_scheme(self, tmp_path: Path) -> None:
        network, file = ("--model", "mcunet", "--data", "digits", "--size", 64, "--limit", 20), tmp_path / "plan.json"
        assert run_verb("plan", *network, "--scheme", "mcunet-49KB", "--out", file).exit_code == 0
        assert len(json.loads(file.read_text())["layers"]) == 3
        told = answer("train", *network, "--plan", file, "--epochs", 1, "--no-baseline", "--out", tmp_path / "run")
        assert told["status"] == "finished"

    def test_a_cache_is_told_and_written_down(self, tmp_path: Path) -> None:
        cached = ("--cache", "disk", "--cache-codec", "int8", "--cache-views", 2, "--cache-size", "3MiB")
        done = run_verb("train", *QUICK, "--epochs", 3, "--limit", 20, *cached, "--out", tmp_path / "run")
        assert done.exit_code == 0, done.output
        run = json.loads((tmp_path / "run" / "run.json").read_text())
        assert run["settings"]["cache"] == {
            "keep": "disk", "codec": "int8", "size_bytes": 3 * 2**20, "views": 2, "folder": None}  # fmt: skip
        assert (run["cached"]["found"], run["cached"]["computed"]) == (20, 40)
        assert "40 samples behind" in done.stdout and "33.3 %" in done.stdout
        assert "pictures found in the cache" in (tmp_path / "run" / "report.html").read_text()
        assert not list((tmp_path / "run").glob("*.cache"))

    def test_names_the_folder_itself(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert answer("train", *QUICK, "--limit", 20)["folder"] == "runs/digits_net-digits-1"
        assert answer("train", *QUICK, "--limit", 20)["folder"] == "runs/digits_net-digits-2"


class TestUse:
    def test_eval_repeats_the_accuracy_of_the_run(self, finished: Path) -> None:
        run = json.loads((finished / "run.json").read_text())
        told = answer("eval", finished)
        assert told["accuracy"] == pytest.approx(run["accuracy_after"])
        assert sum(row["seen"] for row in told["rows"]) == run["data"]["counts"]["val"]

    def test_eval_takes_other_data(self, finished: Path) -> None:
        told = answer("eval", finished, "--data", "digits:clean", "--limit", 50)
        assert sum(row["seen"] for row in told["rows"]) == 50
        assert told["accuracy"] > 0.8

    def test_predict_tells_classes_of_the_run(self, finished: Path, tmp_path: Path) -> None:
        draw(tmp_path / "a.png", 90)
        rows = answer("predict", finished, tmp_path / "a.png", "--top", 2)["rows"]
        assert [len(row["classes"]) for row in rows] == [2]
        first, second = rows[0]["classes"]
        assert first["class"] in "0123456789" and 1 >= first["probability"] >= second["probability"] >= 0

    def test_compare_puts_runs_side_by_side(self, finished: Path) -> None:
        rows = answer("compare", finished, finished)["rows"]
        assert len(rows) == 2 and rows[0] == rows[1]
        assert rows[0]["methods"] == ["pooled_chain r=2"] and rows[0]["measured"]
        assert run_verb("compare", finished, width=200).stdout.count(str(finished)) == 1

    def test_report_is_written_anew(self, finished: Path) -> None:
        before = (finished / "report.html").read_text()
        (finished / "report.html").unlink()
        assert answer("report", finished)["report"] == str(finished / "report.html")
        assert (finished / "report.html").read_text() == before


class TestInform:
    def test_list_has_everything(self) -> None:
        told = answer("list")
        assert "mobilenet_v2" in told["models"] and "digits" in told["data"]
        assert {"exact", "gradient_filter", "pooled_chain"} <= set(told["methods"])

    def test_explain(self) -> None:
        told = answer("explain", "Pooled-Chain")
        assert told["settings"]["patch_px"]["default"] == 2
        assert told["text"] == run_verb("explain", "pooled_chain").stdout.rstrip("\n")

    def test_doctor(self) -> None:
        told = answer("doctor")
        assert told["packages"]["torch"] and told["threads"] >= 1
        assert set(told["kernels"]["ops"].values()) <= {"native", "torch"}
        assert "kernels" in run_verb("doctor").stdout

    def test_profile_measures_what_it_predicts(self) -> None:
        told = answer("profile", "--model", "digits_net", "--batch-size", 2, "--measure")
        assert told["predicted"]["kept_bytes"] == told["measured"]["kept_bytes"]
        assert told["predicted"]["step_ms"] is None and told["measured"]["step_ms"] > 0

    def test_plan_keeps_to_its_budget(self, tmp_path: Path) -> None:
        told = answer("plan", "--memory", "900KiB", "--batch-size", 8, "--limit", 40, "--out", tmp_path / "p.json")
        assert told["predicted"]["peak_bytes"] <= 900 * 1024
        assert json.loads((tmp_path / "p.json").read_text()) == told["plan"]

    def test_plan_tells_reasons_and_front(self, tmp_path: Path) -> None:
        picture = tmp_path / "front.svg"
        words = ("plan", "--memory", "900KiB", "--batch-size", 8, "--limit", 40, "--out", tmp_path / "p.json")
        told = answer(*words, "--explain", "--pareto", picture)
        assert told["reasons"]["benefit_per_byte"] >= 0 and told["reasons"]["benefit_per_ms"] is None
        assert told["reasons"]["layers"][0]["layer"] == "features.0.0"
        assert told["front"]["chosen"]["benefit"] == told["reasons"]["benefit"]
        assert told["front"]["chosen"]["memory_bytes"] == told["predicted"]["peak_bytes"]
        assert len(told["front"]["by_memory"]) > 1 and len(told["front"]["by_time"]) > 1
        drawn = picture.read_text()
        assert drawn.count("<svg") == 1 and "Benefit by memory" in drawn and "Benefit by time" in drawn
        assert "the plan" in drawn

    def test_json_goes_to_a_file_or_out(self, tmp_path: Path) -> None:
        done = run_verb("list", "--json", tmp_path / "l.json")
        assert (done.exit_code, done.stdout) == (0, "")
        assert (
            json.loads((tmp_path / "l.json").read_text())
            == answer("list")
            == json.loads(run_verb("list", "--json").stdout)
        )

    def test_bench_prints_one_object(self, tmp_path: Path) -> None:
        told = answer(
            "bench",
            "steps",
            "--set",
            "models=mcunet",
            "--set",
            "sizes_px=64",
            "--set",
            "depths=2",
            "--set",
            "patch_px=4",
            "--set",
            "rounds=1",
            "--set",
            "batch=1",
            "--threads",
            1,
            "--out",
            tmp_path / "s.jsonl",
        )
        assert {"machine", "versions", "rows"} <= set(told)
        assert len((tmp_path / "s.jsonl").read_text().splitlines()) == len(told["rows"]) > 0


def test_very_small_networks_get_the_memory_they_need(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of what plain back-propagation takes is too little where the head alone needs more."""
    (tmp_path / "own_net.py").write_text(
        "from torch import nn\n\n\ndef net(num_classes=4):\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, num_classes))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    done = run_verb(
        "train", "--model", "own_net:net", "--data", photos, "--size", 16, "--epochs", 1, "--out", tmp_path / "r"
    )
    assert done.exit_code == 0, done.output
    assert "from random weights" in done.stderr
