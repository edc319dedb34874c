"""The documents say what is so: commands exist, links lead somewhere, generated parts are fresh."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tables

ROOT = Path(__file__).resolve().parent.parent
WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = re.compile(r"```(?:sh|bash|console)\n(.*?)```", re.DOTALL)
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
INLINE = re.compile(r"`((?:edgetune|make) [^`\n]+)`")
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def commands(text: str) -> Iterator[list[str]]:
    """Every `edgetune ...` and `make ...` of the text, in blocks and in the line, as words."""
    blocks = "\n".join(SHELL.findall(text)).replace("\\\n", " ")
    for line in [*blocks.splitlines(), *INLINE.findall(SHELL.sub("", text))]:
        words = shlex.split(line.strip().removeprefix("$ "), comments=True)
        if words[:3] == ["python", "-m", "edgetune"]:
            words = words[2:]
        if words and words[0] in {"edgetune", "make"}:
            yield words


def complaints(words: list[str], program: Any) -> list[str]:
    """What is wrong with a documented edgetune command: an unknown verb, or an option that the verb lacks."""
    here, said = program, ["edgetune"]
    for word in words[1:]:
        if word.startswith("--") or re.fullmatch(r"-[a-z]", word):
            option = word.partition("=")[0]
            known = {name for each in here.params for name in (*each.opts, *each.secondary_opts)} | {"--help"}
            if option not in known:
                return [f"`{' '.join(said)}` has no option {option}"]
        elif hasattr(here, "commands"):
            if word in {"VERB", "..."}:
                return []
            if word not in here.commands:
                return [f"`{' '.join(said)}` has no verb {word}"]
            here, said = here.commands[word], [*said, word]
    return []


@pytest.fixture(scope="module")
def program() -> Any:
    from typer.main import get_command

    from edgetune.cli import app

    return get_command(app)


@pytest.fixture(scope="module")
def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("file", WRITTEN, ids=name_of)
def test_documented_commands_exist(file: Path, program: Any, targets: set[str]) -> None:
    for words in commands(file.read_text()):
        if words[0] == "make":
            goals = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
            assert set(goals) <= targets, " ".join(words)
        else:
            assert not complaints(words, program), " ".join(words)


def test_every_verb_has_its_place_in_the_docs(program: Any) -> None:
    said = "\n".join(file.read_text() for file in WRITTEN)
    assert [verb for verb in program.commands if f"edgetune {verb}" not in said] == []


@pytest.mark.parametrize("file", WRITTEN, ids=name_of)
def test_links_lead_somewhere(file: Path) -> None:
    broken = [target for target in LINK.findall(file.read_text()) if not (file.parent / target).exists()]
    assert broken == []


@pytest.mark.parametrize("file", WRITTEN, ids=name_of)
def test_documented_python_compiles_and_uses_public_names(file: Path) -> None:
    import edgetune

    for block in PYTHON.findall(file.read_text()):
        compile(block, name_of(file), "exec")
        missing = [name for name in re.findall(r"\bet\.(\w+)", block) if not hasattr(edgetune, name)]
        assert missing == []


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    import edgetune as et
    from edgetune.models import model_card

    monkeypatch.chdir(tmp_path)
    preprocess = et.Preprocess.from_input(model_card("digits_net").input)
    x, y = torch.randn(8, 1, 32, 32), torch.arange(8)
    names = {
        "model": et.load_model("digits_net"),
        "data": et.load_data("digits:drift", preprocess, limit=32),
        "sample": x,
        "x": x,
        "y": y,
    }
    (block,) = PYTHON.findall((ROOT / "README.md").read_text())
    exec(block, names)
    assert isinstance(names["run"], et.Run)
    assert (tmp_path / "runs" / "field" / "run.json").exists()


def test_generated_pages_and_tables_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "generate.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("", 0), f"run `make docs`\n{done.stderr}"


class TestCommandCheck:
    @pytest.mark.parametrize(
        ("line", "complaint"),
        [
            ("edgetune train --memory 24MiB --seed 0", []),
            ("edgetune", []),
            ("edgetune tarin", ["`edgetune` has no verb tarin"]),
            ("edgetune train --memroy 24MiB", ["`edgetune train` has no option --memroy"]),
        ],
    )
    def test_finds_what_is_wrong(self, line: str, complaint: list[str], program: Any) -> None:
        assert complaints(shlex.split(line), program) == complaint

    def test_reads_blocks_and_lines(self) -> None:
        text = (
            "see `edgetune plan x` and `edgetune`\n```sh\n$ edgetune train \\\n  --seed 0 # why\nls\n```"
        )
        assert list(commands(text)) == [["edgetune", "train", "--seed", "0"], ["edgetune", "plan", "x"]]


def layer_row(case: str, patch_px: int, speedup: float, machine: str = "box") -> tables.Row:
    return {
        "suite": "layers", "machine": machine, "git": "0123456789", "versions": {"torch": "2.0"},
        "case": case, "patch_px": patch_px, "taps": "mean", "batch": 4, "threads": 2, "baseline_ms": 10.0,
        "backward_speedup": speedup, "grid_speedup": 2 * speedup, "kept_bytes": 1024,
        "kept_bytes_baseline": 4096, "cosine": 0.5, "scale": 1.0, "keep_overhead": 0.05,
    }  # fmt: skip


class TestTables:
    def test_medians_stand_below_each_patch_size(self) -> None:
        rows = [layer_row(name, 2, speedup) for name, speedup in (("a", 1.0), ("b", 5.0), ("c", 3.0))]
        written = tables.render("layers", rows).splitlines()
        assert written[0] == "box; 2 threads; torch 2.0; commit 0123456"
        assert written[4] == "| a | 2 | 10.0 ms | 1.0x | 2.0x | 5.0 % | 1.0 KiB of 4.0 KiB | 0.50 | 1.00 |"
        assert written[-1].startswith("| **median** | 2 | - | 3.0x | 6.0x |")

    def test_a_later_row_replaces_an_earlier_one(self) -> None:
        written = tables.render("layers", [layer_row("a", 2, 1.0), layer_row("a", 2, 7.0)])
        assert "7.0x" in written and " 1.0x" not in written

    def test_machines_stay_apart(self) -> None:
        written = tables.render("layers", [layer_row("a", 2, 1.0), layer_row("a", 2, 7.0, machine="other")])
        assert "box; 2 threads" in written and "other; 2 threads" in written

    def test_tap_forms_and_trials_stay_out(self) -> None:
        grid, trial = {"taps": "grid"}, {"quick": True}
        rows = [layer_row("a", 2, 1.0), layer_row("b", 2, 9.0) | grid, layer_row("c", 2, 8.0) | trial]
        assert "| b |" not in tables.render("layers", rows) and "| c |" not in tables.render("layers", rows)
        assert "| b |" in tables.render("layers-grid", rows)

    def test_a_suite_without_rows_says_so(self) -> None:
        assert "edgetune bench steps" in tables.render("steps", [])

    def test_a_difference_carries_its_interval(self) -> None:
        row = {"accuracy_difference": -0.31, "difference_low": -1.02, "difference_high": 0.4}
        assert tables.interval(row) == "-0.3 (-1.0 to +0.4)"

    def test_rows_come_from_every_file(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / f"{name}.jsonl").write_text(json.dumps({"case": name}) + "\n\n")
        assert [row["case"] for row in tables.read_rows(tmp_path)] == ["a", "b"]

    def test_a_region_is_filled_between_its_marks(self) -> None:
        text = "x\n<!-- table:steps -->\nold\n<!-- /table -->\ny"
        match = tables.REGION.search(text)
        assert match is not None and match["name"] == "steps" and "old" in match[0]
