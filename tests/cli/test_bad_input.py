"""Whatever cannot be used ends in one sentence that names it and says how to mend it, with exit status 2."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from verbs import QUICK, draw, refusal, run_verb

MODEL = ("--model", "digits_net")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


class TestData:
    def test_missing_folder(self, tmp_path: Path, out: Path) -> None:
        told = refusal("train", *MODEL, "--data", tmp_path / "nowhere", "--out", out)
        assert "nowhere' does not exist: give an image folder, an npz file, or one of" in told
        assert not out.exists()

    def test_misspelt_name(self, out: Path) -> None:
        assert "did you mean 'digits'?" in refusal("train", *MODEL, "--data", "digit", "--out", out)

    def test_empty_folder(self, tmp_path: Path, out: Path) -> None:
        (tmp_path / "empty").mkdir()
        told = refusal("train", *MODEL, "--data", tmp_path / "empty", "--out", out)
        assert "is empty: put the pictures into one folder per class" in told
        assert not out.exists()

    def test_class_without_pictures(self, photos: Path, out: Path) -> None:
        (photos / "train" / "grey").mkdir()
        told = refusal("train", *MODEL, "--data", photos, "--out", out)
        assert told.startswith("class 'grey' of ") and "has no pictures" in told
        assert not out.exists()

    def test_one_class_only(self, photos: Path, out: Path) -> None:
        for split in ("train", "val"):
            shutil.rmtree(photos / split / "light")
        assert "has one class only ('dark')" in refusal("train", *MODEL, "--data", photos, "--out", out)

    def test_no_validation_pictures(self, photos: Path, out: Path) -> None:
        shutil.rmtree(photos / "val")
        assert "--val-fraction 0.2" in refusal("train", *MODEL, "--data", photos, "--out", out)

    def test_data_without_a_network(self, photos: Path) -> None:
        assert "choose one of `edgetune list` with --model" in refusal("train", "--data", photos)

    def test_network_without_data(self) -> None:
        assert "with --data" in refusal("train", "--model", "resnet20")


class TestPictures:
    @pytest.mark.parametrize("damage", ["truncated", "not a picture", "empty"])
    def test_unreadable_ones_are_named(self, damage: str, photos: Path, out: Path) -> None:
        spoil(photos / "train" / "dark" / "1.jpg", damage)
        told = refusal("train", *MODEL, *QUICK, "--data", photos, "--out", out)
        assert "dark/1.jpg" in told and "--skip-bad-images" in told
        assert not out.exists()

    def test_unreadable_ones_are_skipped_and_counted(self, photos: Path, out: Path) -> None:
        spoil(photos / "train" / "dark" / "1.jpg", "truncated")
        done = run_verb("train", *MODEL, *QUICK, "--data", photos, "--out", out, "--skip-bad-images")
        assert done.exit_code == 0, done.output
        assert "7 pictures to train, 4 pictures to validate; 1 unreadable left out (dark/1.jpg)" in done.stderr
        assert json.loads((out / "run.json").read_text())["data"]["skipped"] == ["dark/1.jpg"]

    def test_grey_cmyk_and_deep_ones_are_converted(self, photos: Path, out: Path) -> None:
        draw(photos / "train" / "dark" / "grey.png", 60, "L")
        draw(photos / "train" / "dark" / "deep.png", 62, "I;16")
        draw(photos / "train" / "light" / "print.jpg", 190, "CMYK")
        done = run_verb("train", *MODEL, *QUICK, "--data", photos, "--out", out)
        assert done.exit_code == 0, done.output
        assert "11 pictures to train" in done.stderr

    def test_prediction_names_what_it_cannot_read(self, finished: Path, tmp_path: Path) -> None:
        draw(tmp_path / "good.png", 100)
        spoil(tmp_path / "bad.jpg", "not a picture")
        assert "bad.jpg' is not a picture" in refusal("predict", finished, tmp_path / "bad.jpg")
        assert "does not exist" in refusal("predict", finished, tmp_path / "none.jpg")
        done = run_verb("predict", finished, tmp_path / "bad.jpg", tmp_path / "good.png", "--skip-bad-images", "--json")
        assert [row["photo"] for row in json.loads(done.stdout)["rows"]] == [str(tmp_path / "good.png")]


class TestWeights:
    def test_missing_file(self, out: Path) -> None:
        told = refusal("train", *MODEL, "--weights", "none.safetensors", "--out", out)
        assert told == "weights file 'none.safetensors' does not exist: check the path given to --weights"

    def test_file_of_another_network_says_which_keys_and_how_many(self, tmp_path: Path, out: Path) -> None:
        file = tmp_path / "other.safetensors"
        save_file({"body.0.weight": torch.zeros(3), "body.0.bias": torch.zeros(3)}, file)
        told = refusal("train", *MODEL, "--weights", file, "--out", out)
        assert re.search(r"does not fit: \d+ keys \(features\.0\.0\.weight, .*\) missing and 2 keys \(body", told)
        assert not out.exists()

    def test_not_safetensors(self, tmp_path: Path) -> None:
        file = tmp_path / "w.safetensors"
        file.write_bytes(b"hello")
        assert "is not a whole safetensors file" in refusal("train", *MODEL, "--weights", file)

    def test_pickle_is_refused_unless_trusted(self, tmp_path: Path, out: Path) -> None:
        file = tmp_path / "weights.pt"
        torch.save(load_file(shipped()), file)
        assert "--trust-pickle" in refusal("train", *MODEL, "--weights", file, "--out", out)
        done = run_verb("train", *MODEL, "--limit", 20, *QUICK, "--weights", file, "--out", out, "--trust-pickle")
        assert done.exit_code == 0, done.output

    def test_trusted_pickle_runs_no_code(self, tmp_path: Path) -> None:
        file, mark = tmp_path / "evil.pt", tmp_path / "ran"

        class Evil:
            def __reduce__(self) -> tuple[object, ...]:
                return os.mkdir, (str(mark),)

        torch.save({"a": Evil()}, file, pickle_module=pickle)
        assert "cannot be read as weights alone" in refusal("train", *MODEL, "--weights", file, "--trust-pickle")
        assert not mark.exists()


class TestNames:
    def test_model(self) -> None:
        told = refusal("train", "--model", "mobilenet_v22", "--data", "digits")
        assert told.startswith("model 'mobilenet_v22' is unknown: did you mean mobilenet_v2")
        assert "did you mean" in refusal("profile", "--model", "resnet21")

    def test_method(self) -> None:
        assert refusal("explain", "pooled-chian") == "method 'pooled-chian' is unknown: did you mean pooled_chain?"

    def test_method_setting(self) -> None:
        assert "method 'exact' has no --patch-px" in refusal("train", "--method", "exact", "--patch-px", 2)
        assert "--taps some does not hold" in refusal("train", "--method", "pooled_chain", "--taps", "some")

    def test_blocks_are_counted_by_methods_that_know_them(self, out: Path) -> None:
        plan = ("plan", "--limit", 20, "--out", out)
        assert "give one of them" in refusal(*plan, "--last", 1, "--last-blocks", 1)
        assert "choose from checkpoint, comet, low_bit" in refusal(*plan, "--hold", "exact")
        assert "say --method asi" in refusal(*plan, "--method", "exact", "--kept", "1MiB")
        assert "the smallest budget that works here is" in refusal(*plan, "--method", "asi", "--kept", "1KiB")
        assert "say how many with --last-blocks" in refusal(*plan, "--method", "tinytl", "--last", 1)
        assert "use --method exact" in refusal(*plan, "--last-blocks", 1)
        assert "the network has 2: ask for" in refusal(*plan, "--method", "tinytl", "--last-blocks", 3)
        assert not out.exists()

    @pytest.mark.parametrize("words", [("--explain",), ("--pareto", "front.svg")])
    def test_plans_made_by_hand_have_no_reasons(self, words: tuple[str, ...], out: Path) -> None:
        assert "leave them out, or leave out --method" in refusal("plan", "--last", 2, *words, "--out", out)
        assert not out.exists()

    def test_blocks_are_counted_where_there_are_some(self, out: Path) -> None:
        said = ("plan", "--limit", 20, "--out", out)
        assert "give one of them" in refusal(*said, "--last", 2, "--last-blocks", 1)
        assert "leave out --memory and --step-ms" in refusal(*said, "--last-blocks", 1, "--memory", "1MiB")
        told = refusal(*said, "--model", "resnet20", "--method", "mobiletl", "--size", 32)
        assert "neither hard-swish nor squeeze-excite nor inverted residual blocks" in told
        assert "use --method exact" in told
        assert "but the network has 17" in refusal(
            *said, "--model", "mobilenet_v2_0.35", "--size", 32, "--last-blocks", 99)  # fmt: skip
        assert not out.exists()

    def test_schemes_stand_alone_and_fit_their_network(self, out: Path) -> None:
        scheme = ("plan", "--scheme", "mcunet-49KB", "--out", out)
        assert "leave out --memory" in refusal(*scheme, "--last", 2)
        assert "leave them out, or leave out --method" in refusal(*scheme, "--explain")
        assert "made for 42 convolutions, but this network has" in refusal(*scheme, "--limit", 20)
        assert "'mcunet' is unknown: choose from mcunet-49KB" in refusal(
            "plan", "--scheme", "mcunet", "--limit", 20, "--out", out)  # fmt: skip
        assert not out.exists()

    def test_pictures_of_another_kind(self, out: Path) -> None:
        assert "ends in .svg or .png" in refusal("plan", "--pareto", "front.gif", "--out", out)
        assert not out.exists()

    def test_suite(self) -> None:
        assert refusal("bench", "layer") == "suite 'layer' is unknown: did you mean layers?"
        assert "has no option 'sice'" in refusal("bench", "steps", "--set", "sice=3")

    def test_run(self, tmp_path: Path) -> None:
        for verb in (("eval",), ("report",), ("compare",), ("train", "--resume")):
            assert "holds no run" in refusal(*verb, tmp_path / "none")

    def test_plan_file(self, tmp_path: Path) -> None:
        assert "cannot be read" in refusal("train", "--plan", tmp_path / "none.json")
        (tmp_path / "plan.json").write_text('{"input_shape": [1, 1, 32, 32], "layer": {}}')
        assert "layer: Extra inputs are not permitted" in refusal("train", "--plan", tmp_path / "plan.json")


class TestBudget:
    @pytest.mark.parametrize("text", ["much", "24 MiBs", "-3MiB", "0", ""])
    def test_unparsable(self, text: str, out: Path) -> None:
        assert "such as 24MiB" in refusal("train", f"--memory={text}", "--out", out)

    def test_too_small_says_the_smallest_that_works(self, out: Path) -> None:
        told = refusal("train", "--memory", "20KiB", "--limit", 40, "--batch-size", 4, "--out", out)
        smallest = int(re.search(r"smallest budget that works here is .* \((\d+) bytes\)", told)[1])  # type: ignore[index]
        assert not out.exists()
        done = run_verb(
            "plan", "--memory", smallest, "--limit", 40, "--batch-size", 4, "--out", out / "p.json", "--json"
        )
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["predicted"]["peak_bytes"] <= smallest

    def test_two_ways_to_say_the_plan(self) -> None:
        assert "leave out" in refusal("train", "--memory", "1MiB", "--method", "exact")
        assert "leave out" in refusal("train", "--memory", "1MiB", "--plan", "plan.json")


class TestTraining:
    def test_loss_that_is_no_number_keeps_the_last_good_weights(self, out: Path) -> None:
        told = refusal("train", *MODEL, *QUICK, "--limit", 40, "--learning-rate", "1e30", "--out", out)
        assert "not a number" in told and "--learning-rate below 1e+30" in told
        assert all(bool(value.isfinite().all()) for value in load_file(out / "weights.safetensors").values())
        assert json.loads((out / "run.json").read_text())["status"] == "diverged"

    def test_folder_with_a_run_is_left_alone(self, finished: Path) -> None:
        before = {file.name: file.read_bytes() for file in finished.iterdir()}
        assert "holds a run already" in refusal("train", "--out", finished)
        assert {file.name: file.read_bytes() for file in finished.iterdir()} == before

    def test_finished_run_is_not_resumed(self, finished: Path) -> None:
        assert "has finished" in refusal("train", "--resume", finished)

    def test_full_disk_leaves_nothing_half_written(self, out: Path) -> None:
        """No file of this process may grow beyond 100 kB, as on a full disk; the weights need 250 kB."""
        code = (
            "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
            "from edgetune.cli import main; main()"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "train", *QUICK, "--limit", "40", "--out", str(out)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "EDGETUNE_NATIVE": "0"},
        )
        assert done.returncode == 2, done.stderr
        assert "weights.safetensors' cannot be written" in done.stderr and "Traceback" not in done.stderr
        assert not out.exists()

    def test_ctrl_c_saves_and_says_how_to_resume(self, out: Path) -> None:
        command = [
            sys.executable,
            "-m",
            "edgetune",
            "train",
            *QUICK,
            "--epochs",
            "40",
            "--limit",
            "20",
            "--batch-size",
            "10",
            "--out",
            str(out),
        ]
        # a shell that starts the tests in the background makes them ignore Ctrl-C, and children inherit that
        listening = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **listening
        ) as process:
            assert process.stderr is not None and process.stdout is not None
            for line in process.stderr:
                if "epoch 2/40" in line:
                    process.send_signal(signal.SIGINT)
                    break
            rest = process.stderr.read()
        assert process.returncode == 130, rest
        assert f"edgetune train --resume {out}" in rest and "Traceback" not in rest
        assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
        done = run_verb("train", "--resume", out)
        assert done.exit_code == 0, done.output
        assert json.loads((out / "run.json").read_text())["status"] == "finished"


def test_other_errors_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    import edgetune.doctor

    def broken() -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(edgetune.doctor, "examine", broken)
    with pytest.raises(ZeroDivisionError):
        run_verb("doctor")


def spoil(path: Path, damage: str) -> None:
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_bytes(b"" if damage == "empty" else b"no picture at all")


def shipped() -> Path:
    from edgetune.models import shipped_weights

    path = shipped_weights("digits_net")
    assert path is not None
    return path


class TestCache:
    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            (("--cache", "tape"), "--cache cannot be 'tape': choose one of off, memory, disk"),
            (("--cache-size", "2GiB"), "--cache-size says how to cache, but nothing is cached: add --cache memory"),
            (("--cache-views", 2), "--cache-views says how to cache"),
            (("--cache", "disk", "--cache-codec", "int3"), "--cache-codec cannot be 'int3': choose one of float32, fl"),
            (("--cache", "disk", "--cache-size", "much"), "'much' is not an amount of memory"),
            (("--cache", "memory", "--cache-folder", "x"), "--cache-folder is for features on disk"),
        ],
    )
    def test_options_that_make_no_sense(self, words: tuple[object, ...], complaint: str, out: Path) -> None:
        assert complaint in refusal("train", *words, "--out", out)
        assert not out.exists()

    def test_a_stem_that_learns_is_told_and_trains_all_the_same(self, photos: Path, out: Path) -> None:
        quick = [*QUICK[:2], *QUICK[4:]]
        done = run_verb("train", *MODEL, *quick, "--data", photos, "--cache", "disk", "--out", out)
        assert done.exit_code == 0, done.output
        assert "edgetune: nothing is cached: layer 'features.0.0' learns, " in done.stderr
        assert done.stderr.count("nothing is cached") == 1
