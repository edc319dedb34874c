"""Tables as people see them, compared with text files; EDGETUNE_SNAPSHOTS=write writes those anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from edgetune.cache import CacheUse
from edgetune.cli.compare import _show
from edgetune.cli.compress import layers_table
from edgetune.cli.output import facts, table
from edgetune.cli.tables import front_tables, reasons_facts, reasons_table, result_table
from edgetune.compress import Weights
from edgetune.costs import Costs
from edgetune.data import Preprocess
from edgetune.front import Front, Point
from edgetune.profile import Cost
from edgetune.reasons import Otherwise, Reason, Reasons, Way
from edgetune.run import DataRef, Epoch, ModelRef, Plain, Run, Settings
from verbs import run_verb

SNAPSHOTS = Path(__file__).parent / "snapshots"


def check(name: str, text: str) -> None:
    """The text must be that of the snapshot, spaces at line ends aside."""
    now = "\n".join(line.rstrip() for line in text.splitlines()).strip("\n") + "\n"
    file = SNAPSHOTS / f"{name}.txt"
    if os.environ.get("EDGETUNE_SNAPSHOTS") == "write":
        file.write_text(now)
    assert now == file.read_text(), f"{file.name} differs; if that is meant, run with EDGETUNE_SNAPSHOTS=write"


def layers_of(text: str) -> str:
    """The table of layers up to its total: the peaks behind it depend on the machine's convolutions."""
    head, _, rest = text.partition(" total ")
    return f"{head} total {rest.splitlines()[0]}"


def drawn(what: Table, width: int = 100) -> str:
    console = Console(width=width, highlight=False, no_color=True)
    with console.capture() as captured:
        console.print(what)
    return captured.get()


def cost(kept: int, peak: int, step_ms: float | None = None) -> Cost:
    return Cost(
        layers=(),
        param_bytes=2000,
        grad_bytes=1000,
        optimizer_bytes=1000,
        kept_bytes=kept,
        peak_bytes=peak,
        forward_macs=10,
        backward_macs=20,
        step_ms=step_ms,
        origin="predicted" if step_ms is None else "measured",
    )


@pytest.fixture
def run() -> Run:
    epochs = tuple(Epoch(train_loss=1 / n, val_loss=1 / n, val_accuracy=1 - 0.3 / n, ms=5.0) for n in (1, 2, 3))
    return Run(
        status="finished",
        started="2026-01-01T00:00:00+00:00",
        model=ModelRef(name="digits_net"),
        classes=("a", "b"),
        preprocess=Preprocess(),
        settings=Settings(epochs=3, baseline=True),
        plan_digest="0",
        data=DataRef(source="photos", fingerprint="0", counts={"train": 90, "val": 10}),
        versions={},
        accuracy_before=0.625,
        accuracy_after=0.9,
        epochs=epochs,
        plain=Plain(accuracy=0.91, epochs=epochs),
        costs=Costs(
            batch_size=32,
            micro_batch=8,
            memory_budget_bytes=2**20,
            planned_predicted=cost(50_000, 900_000),
            planned_measured=cost(50_000, 910_000, 12.5),
            plain_predicted=cost(4_000_000, 9_000_000),
            plain_measured=cost(4_000_000, 9_100_000, 25.0),
        ),
    )


def test_result(run: Run) -> None:
    check("result", drawn(result_table(run)))


def test_result_of_a_baseline_that_diverged(run: Run) -> None:
    check("result_diverged", drawn(result_table(run.model_copy(update={"plain": Plain(diverged=True)}))))


def test_result_without_baseline_and_costs(run: Run) -> None:
    check("result_short", drawn(result_table(run.model_copy(update={"plain": None, "costs": None}))))


def test_result_of_a_cached_run(run: Run) -> None:
    use = CacheUse(layers=("features.15", "add_3"), sample_bytes=31360, stored=360, found=810, computed=90)
    check("result_cached", drawn(result_table(run.model_copy(update={"cached": use}))))


def test_profile() -> None:
    done = run_verb("profile", "--model", "digits_net", "--batch-size", 4, width=120)
    check("profile", layers_of(done.stdout))


def test_plan(tmp_path: Path) -> None:
    done = run_verb(
        "plan",
        "--method",
        "pooled_chain",
        "--patch-px",
        4,
        "--last",
        3,
        "--batch-size",
        8,
        "--limit",
        40,
        "--out",
        tmp_path / "plan.json",
        width=120,
    )
    check("plan", layers_of(done.stdout))


def test_reasons() -> None:
    def way(patch_px: int, fidelity: float, kib: int, ms: float) -> Way:
        settings = {} if patch_px == 1 else {"patch_px": patch_px}
        return Way(method="pooled_chain" if settings else "exact", settings=settings, fidelity=fidelity,
                   passes=fidelity, memory_bytes=kib * 1024, ms=ms)

    ways = (way(1, 1.0, 840, 3.25), way(2, 0.934, 210, 1.5), way(7, 0.7, 52, 1.25))
    after = Otherwise(way=1, learns=True, benefit=0.021, memory_bytes=162 * 1024, ms=0.25)
    back = Otherwise(way=None, learns=False, benefit=-0.3, memory_bytes=-(2**20), ms=-2.0)
    reasons = Reasons(
        layers=(
            Reason(layer="features.0.0", importance=0.05, ways=ways, way=None, learns=False, otherwise=after),
            Reason(layer="features.1.0", importance=0.25, ways=ways, way=2, learns=True, otherwise=after),
            Reason(layer="features.2.0", importance=0.1, ways=ways, way=1, learns=False, otherwise=None),
            Reason(layer="features.3.0", importance=0.6, ways=ways, way=0, learns=True, otherwise=back),
        ),
        benefit=0.765,
        benefit_per_byte=2.5e-8,
        benefit_per_ms=0.0125,
    )
    check("reasons", drawn(reasons_table(reasons), 120) + drawn(facts("as a whole", reasons_facts(reasons))))


def test_front() -> None:
    points = tuple(Point(memory_bytes=n * 2**20, step_ms=30.0 + n, benefit=n / 4, learning=2 * n, micro_batch=2**n)
                   for n in range(1, 5))
    made = Front(by_memory=points, by_time=points[:2], chosen=points[1])
    check("front", "".join(drawn(each) for each in front_tables(made)))


def test_compare(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from edgetune.cli.compare import _row
    from edgetune.contract import Plan
    from edgetune.methods.backward.pooled_chain import PooledChain

    plan = Plan(
        input_shape=(32, 3, 8, 8), layers={"a": (PooledChain(patch_px=4),)}, learns={"a": ("weight",), "n": ("bias",)}
    )
    stopped = run.model_copy(update={"status": "interrupted", "accuracy_after": None, "plain": None})
    monkeypatch.setenv("COLUMNS", "100")
    _show([_row(Path("runs/one"), run, plan), _row(Path("runs/two"), stopped, plan.model_copy(update={"layers": {}}))])
    check("compare", capsys.readouterr().out)


def test_list() -> None:
    check("list", run_verb("list", width=120).stdout)


def test_layers_of_a_compressed_network() -> None:
    layers = (
        Weights("conv1", 432, 32, "reads the pictures themselves"),
        Weights("layer1.0.conv1", 2304, 1, None),
        Weights("layer1.0.conv2", 2304, 1, None),
        Weights("fc", 640, 32, "is a linear layer"),
    )
    check("layers", drawn(layers_table("xnor", layers)))


def test_narrow_terminals_lose_nothing() -> None:
    shown = drawn(
        table("t", ("layer", "a long column", "another one"), [("features.0.inner.conv", "1234.5 KiB", "[x] 77 M")]), 30
    )
    assert "".join(shown.split()).count("[x]") == 1 and "…" not in shown
