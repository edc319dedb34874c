"""report.html: whole, offline, in step with the run, and readable on any screen."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

from edgetune.contract import Plan
from edgetune.costs import costs_of
from edgetune.errors import RunError
from edgetune.graph import trace
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.gradient_filter import GradientFilter
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.plan import last_layers
from edgetune.profile import profile
from edgetune.report import report
from edgetune.report.choices import describe, kept_by_layer, layer_views
from edgetune.report.figures import curves, memory_by_layer
from edgetune.report.page import Story, page
from edgetune.report.picture import colour_classes, picture
from edgetune.run import DataRef, Epoch, ModelRef, Plain, Preprocess, Run, Settings

VOID = {"meta", "br", "link", "img", "hr"}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    ).eval()


@pytest.fixture
def plan() -> Plan:
    return last_layers(trace(net(), torch.zeros(4, 3, 8, 8)), 2, PooledChain(patch_px=2))


def make_run(plan: Plan, **changes: object) -> Run:
    epochs = tuple(Epoch(train_loss=1 / n, val_loss=1 / n, val_accuracy=1 - 0.3 / n, ms=5.0) for n in (1, 2, 3))
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
    run = Run(
        status="finished",
        started="2026-01-01T00:00:00+00:00",
        model=ModelRef(name="my <net>", weights="/a/b/w.safetensors"),
        classes=("cat", "dog & co"),
        preprocess=Preprocess(size=(8, 8)),
        settings=Settings(epochs=3, baseline=True),
        plan_digest="0",
        data=DataRef(source="photos", fingerprint="0", counts={"train": 90, "val": 10}),
        versions={"edgetune": "0.1.0", "torch": "2.13.0"},
        accuracy_before=0.625,
        accuracy_after=0.9,
        epochs=epochs,
        plain=Plain(accuracy=0.91, epochs=epochs),
        costs=costs_of(net(), plan, x, y),
    )
    return run.model_copy(update=changes)


def written(run: Run, plan: Plan, model: nn.Module | None = None) -> str:
    views = layer_views(trace(net() if model is None else model, torch.zeros(1, 3, 8, 8)), plan)
    return page(Story(folder=Path("runs/one"), run=run, plan=plan, views=views))


class Tags(HTMLParser):
    """Checks that tags nest, and gathers what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.fetched += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


class TestPage:
    def test_tags_nest_and_nothing_is_fetched(self, plan: Plan) -> None:
        text, tags = written(make_run(plan), plan), Tags()
        tags.feed(text)
        assert tags.open == []
        assert all(link.startswith("#") for link in tags.fetched)
        assert not {"script", "link", "img", "iframe"} & set(tags.seen)
        assert "@import" not in text and "url(http" not in text

    def test_tells_the_result_in_words_and_numbers(self, plan: Plan) -> None:
        text = written(make_run(plan), plan)
        for said in (
            "62.5 %",
            "90.0 %",
            "91.0 %",
            "After 3 epochs on 90 pictures",
            "edgetune predict runs/one photo.jpg",
            "w.safetensors",
            "torch 2.13.0",
        ):
            assert said in text
        assert "/a/b/" not in text and "--resume" not in text

    def test_names_cannot_break_the_page(self, plan: Plan) -> None:
        text = written(make_run(plan), plan)
        assert "my &lt;net&gt; on photos" in text and "<net>" not in text
        assert "dog &amp; co" in text

    def test_goes_without_costs_and_network(self, plan: Plan) -> None:
        run = make_run(plan, costs=None, plain=None)
        text = page(Story(folder=Path("r"), run=run, plan=plan, views=()))
        assert "Memory by layer" not in text and "The plan" not in text and "Learning" in text

    def test_unfinished_run_says_so_and_how_to_go_on(self, plan: Plan) -> None:
        text = written(make_run(plan, status="interrupted", accuracy_after=None), plan)
        assert "not finished (interrupted)" in text and "edgetune train --resume runs/one" in text

    def test_run_without_an_epoch_has_a_page(self, plan: Plan) -> None:
        text = written(make_run(plan, status="running", accuracy_after=None, epochs=()), plan)
        assert "Learning" not in text and "After 0 epochs" in text

    def test_folder_without_a_run_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="holds no run"):
            report(tmp_path)


class TestChoices:
    @pytest.mark.parametrize(
        ("method", "learns", "key", "label"),
        [
            (None, (), "frozen", "frozen"),
            (None, ("weight",), "exact", "exact"),
            (Exact(), ("weight",), "exact", "exact"),
            (PooledChain(patch_px=4), ("weight",), "r4", "filtered, r = 4"),
            (PooledChain(patch_px=4, taps="grid"), ("weight",), "r4", "filtered, r = 4, grid taps"),
            (GradientFilter(patch_px=2, bases=2), ("weight",), "r2", "filtered, r = 2, 2 bases"),
            (PooledChain(patch_px=7), (), "r7", "passes on only, r = 7"),
        ],
    )
    def test_are_told_apart(self, method: Exact | None, learns: tuple[str, ...], key: str, label: str) -> None:
        choice = describe(method, learns)
        assert (choice.key, choice.label, choice.passes) == (key, label, label.startswith("passes"))

    def test_views_follow_the_network(self, plan: Plan) -> None:
        views = layer_views(trace(net(), torch.zeros(1, 3, 8, 8)), plan)
        assert [(v.number, v.name, v.map_text, v.choice.key) for v in views] == [
            (1, "0", "4 · 8×8", "frozen"),
            (2, "2", "8 · 4×4", "r2"),
            (3, "5", "8 · 4×4", "r2"),
            (4, "9", "2", "exact"),
        ]

    def test_kept_bytes_of_groups_add_up(self, plan: Plan) -> None:
        views = layer_views(trace(net(), torch.zeros(1, 3, 8, 8)), plan)
        for cost in (profile(net(), torch.zeros(4, 3, 8, 8)), profile(net(), torch.zeros(4, 3, 8, 8), plan)):
            kept = kept_by_layer(cost, views)
            assert sum(kept.values()) == cost.kept_bytes and list(kept) == ["0", "2", "5", "9"]
        assert kept_by_layer(None, views) == {}


class TestPicture:
    def test_has_a_block_a_layer_and_a_legend_that_counts(self, plan: Plan) -> None:
        text = picture(layer_views(trace(net(), torch.zeros(1, 3, 8, 8)), plan))
        assert len(re.findall("<li title=", text)) == 4
        assert re.findall(r"</i>([^<]+) <b>(\d+)</b>", text) == [
            ("frozen", "1"),
            ("exact", "1"),
            ("filtered, r = 2", "2"),
        ]

    def test_blocks_shrink_with_the_map(self, plan: Plan) -> None:
        heights = [
            int(h)
            for h in re.findall(r"height:(\d+)px", picture(layer_views(trace(net(), torch.zeros(1, 3, 8, 8)), plan)))
        ]
        assert heights[0] > heights[1] == heights[2] > heights[3]

    def test_many_patch_sizes_share_the_last_colour(self) -> None:
        graph = trace(nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(6))), torch.zeros(1, 3, 8, 8))
        made = Plan(
            input_shape=(1, 3, 8, 8),
            layers={str(n): (PooledChain(patch_px=n + 2),) for n in range(6)},
            learns={str(n): ("weight",) for n in range(6)},
        )
        classes = colour_classes(layer_views(graph, made))
        assert [classes[f"r{n}"] for n in range(2, 8)] == ["r-a", "r-b", "r-c", "r-d", "r-d", "r-d"]


class TestFigures:
    def test_take_the_colours_of_the_page(self) -> None:
        for text in (
            curves("Accuracy", [0.5, 0.9], [0.6], percent=True, start=0.2),
            memory_by_layer(["1", "2"], [10, 20], [4000, 3000], [10, 20]),
            memory_by_layer(["1"], [0], [0], None),
        ):
            assert text.startswith("<svg role=") and text.endswith("</svg>")
            assert set(re.findall(r"#[0-9a-f]{6}\b", text)) <= {"#ffffff", "#000000"}
            assert "font-family" not in text and "<style" not in text and "<metadata" not in text
            assert "var(--faint)" in text and "var(--ours)" in text

    def test_are_the_same_every_time(self) -> None:
        assert curves("Loss", [1.0, 0.5], []) == curves("Loss", [1.0, 0.5], [])

    def test_text_stays_text(self) -> None:
        assert "this plan" in curves("Loss", [1.0, 0.5], [1.0]) and "plain back-propagation" in curves(
            "Loss", [1.0], [1.0]
        )
