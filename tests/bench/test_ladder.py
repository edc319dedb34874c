"""The ladder: well-formed rows, each rung below the one before where it must be, and the last one within its target."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

import ladder as drawing
from edgetune.bench import ladder, timing
from edgetune.bench.ladder import LadderOptions
from edgetune.errors import PlanError

SMALL = LadderOptions(size_px=64, more_classes=(), last=(2,), scheme="mobilenet_v2_0.35-49KB")


@pytest.fixture(scope="module")
def rows() -> list[timing.Row]:
    seen: list[timing.Row] = []
    assert ladder.run(SMALL, seen.append)["rows"] == seen
    return seen


def test_every_rung_is_there_and_falls(rows: list[timing.Row]) -> None:
    rungs = [row for row in rows if "peak_bytes" in row]
    assert [row["method"] for row in rungs] == [rung.method for rung in ladder.RUNGS]
    kept = [row["kept_bytes"] for row in rungs]
    assert kept == sorted(kept, reverse=True)
    for field in ("arena_bytes", "streamed_bytes"):
        sizes = [row[field] for row in rungs if field in row]
        assert len(sizes) == 4 and sizes == sorted(sizes, reverse=True)
    assert all(row["streamed_bytes"] <= row["arena_bytes"] for row in rungs[1:])
    plain, exact, int8, sparse, early = (row["peak_bytes"] for row in rungs)
    assert plain > exact > int8 > sparse >= early


def test_learning_adds_to_inference(rows: list[timing.Row]) -> None:
    extra = {row["method"]: row for row in rows if "extra_bytes" in row}
    assert extra["inference"]["extra_bytes"] == extra["inference"]["added_bytes"] == 0
    schemes = [row["extra_bytes"] for name, row in extra.items() if name.endswith("KB")]
    assert len(schemes) == 5 and schemes == sorted(schemes)
    assert all(row["streamed_bytes"] == extra["inference"]["streamed_bytes"] + row["extra_bytes"]
               for row in extra.values())  # fmt: skip


def test_a_class_costs_its_features_in_float() -> None:
    options = SMALL.model_copy(update={"more_classes": (3,), "quick": True})
    took = {(row["method"], row["classes"]): row["extra_bytes"] for row in ladder.run(options)["rows"]
            if "extra_bytes" in row}  # fmt: skip
    assert took["last 2", 3] - took["last 2", 2] == 4 * 1281
    assert took["inference", 3] == took["inference", 2] == 0


def test_quick_measures_the_last_rung() -> None:
    found = ladder.run(SMALL.model_copy(update={"quick": True}))["rows"]
    assert [row["method"] for row in found if "peak_bytes" in row] == ["update as it comes"]


def test_an_unknown_scheme_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match="scheme 'none' is unknown"):
        ladder.run(SMALL.model_copy(update={"scheme": "none"}))


def test_the_committed_ladder_ends_below_the_published_one() -> None:
    file = Path(__file__).resolve().parents[2] / "bench" / "results" / "ladder.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    last = next(row for row in rows if row["method"] == "update as it comes")
    assert (last["case"], last["batch"]) == ("mobilenet_v2_0.35@128", 1)
    assert last["streamed_bytes"] <= last["published_bytes"] == 141_000


def test_the_picture_shows_every_rung() -> None:
    row = {"suite": "ladder", "quick": False, "published_bytes": 141_000, "peak_bytes": 10**6, "streamed_bytes": 10**5}
    (svg,) = drawing.documents([{**row, "method": name} for name in ("one", "two", "one")]).values()
    texts = [each.text for each in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("one") == texts.count("two") == 1
    assert texts.count("97.7 KiB") == 2
    assert drawing.documents([]) == {}
    assert drawing.x_of(drawing.LOW) == drawing.LEFT < drawing.x_of(1e6) < drawing.x_of(1e7)
