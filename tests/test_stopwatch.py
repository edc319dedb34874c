"""Timing layers: every lap goes to its call, each kind is timed once and remembered, whatever happens to the file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import edgetune as et
from edgetune import kernels, stopwatch
from edgetune.draft import last_layers
from edgetune.graph import Call
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.methods.backward.sparse_update import SparseUpdate, window_axis
from edgetune.profile import profile
from edgetune.stopwatch import Laps, Times, layer_times, samples_for
from macs import MacClock
from nets import NETS, block, scramble

METHODS = (Exact(), PooledChain(patch_px=2))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test's own."""
    kernels.status()  # compiled before, in the usual folder
    monkeypatch.setenv("EDGETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the segments that are really run."""
    seen: list[str] = []
    real = stopwatch._run

    def run(shop: Any, segment: Any, learned: Any, rounds: int) -> dict[str, Laps]:
        seen.append(segment.name)
        return real(shop, segment, learned, rounds)

    monkeypatch.setattr(stopwatch, "_run", run)
    return seen


def timed(model: nn.Module, samples: int = 2, **options: Any) -> tuple[et.Graph, dict[Any, dict[str, Laps]]]:
    graph = et.trace(model, torch.zeros(1, 3, 16, 16))
    plans = {method: last_layers(graph, None, method) for method in METHODS}
    return graph, layer_times(model, graph, plans, samples, **options)


@pytest.mark.parametrize("name", ["Residual", "Inverted", "Branching"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.method)
def test_by_a_clock_of_macs_each_call_takes_what_the_profiler_counts(name: str, method: Any,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ways to the same numbers: segments run alone, and one whole step on meta tensors."""
    model = scramble(NETS[name]())
    with MacClock(monkeypatch):
        graph, times = timed(model, samples=3)
    plan = last_layers(graph, None, method)
    cost = {layer.name: layer for layer in profile(model, torch.zeros(3, 3, 16, 16), plan).layers}
    convs = graph.layers("conv")
    assert convs
    for number, call in enumerate(convs):
        laps, told = times[method][call.node], cost[call.name]
        assert laps.frozen_ms == pytest.approx(told.forward_macs)
        if number:  # nobody asks for a gradient of the first layer's input
            assert laps.learning_ms == pytest.approx(told.forward_macs + told.backward_macs)
        assert laps.frozen_ms <= laps.passing_ms + 1e-6 <= laps.learning_ms + 2e-6


def test_segments_take_real_time(runs: list[str]) -> None:
    _, times = timed(scramble(NETS["Residual"]()))
    assert all(laps.learning_ms > 0 and laps.frozen_ms > 0 for node, laps in times[METHODS[0]].items()
               if "0" in node)
    assert runs


def test_layers_of_one_geometry_are_timed_once(runs: list[str]) -> None:
    deep = nn.Sequential(block(3, 4), *(block(4, 4) for _ in range(6)), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, 2))
    graph, times = timed(deep)
    exact = [name for name in runs if " ... " not in name]
    assert len(exact) == 2  # two convolutions; a norm runs with its activation
    assert len({times[METHODS[0]][call.node] for call in graph.layers("conv")[1:]}) == 1
    assert len(times[METHODS[0]]) == 7 * 3


def test_what_was_timed_is_remembered(runs: list[str], folder: Path) -> None:
    heard: list[str] = []
    _, first = timed(NETS["Inverted"](), progress=heard.append)
    count = len(runs)
    _, second = timed(NETS["Inverted"](), progress=heard.append)
    assert count and len(runs) == count and first == second
    assert len(heard) == 1 and "kinds of layer on this machine" in heard[0]
    assert len(list(folder.iterdir())) == 1
    timed(NETS["Inverted"](), samples=1)
    assert len(runs) > count and len(list(folder.iterdir())) == 1


def test_only_what_is_new_is_timed(runs: list[str]) -> None:
    timed(nn.Sequential(block(3, 4), nn.Flatten(), nn.Linear(1024, 2)))
    before = len(runs)
    timed(nn.Sequential(block(3, 4), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 2)))
    assert runs[before:] == ["1"]


@pytest.mark.parametrize("damage", [b"", b"{", b'{"laps": {"a": {"frozen_ms": -1}}}', b'{"laps": {}, "more": 1}',
                                    b"\xff\x00"])
def test_a_damaged_file_is_measured_anew(damage: bytes, folder: Path, runs: list[str]) -> None:
    model = NETS["Untraceable"]()
    timed(model)
    (file,) = folder.iterdir()
    whole, count = Times.load(file), len(runs)
    file.write_bytes(damage)
    timed(model)
    assert len(runs) == 2 * count and set(Times.load(file).laps) == set(whole.laps)


@pytest.mark.parametrize("where", ["a file", "a file/inside", "full"])
def test_what_cannot_be_written_is_only_not_remembered(where: str, tmp_path: Path, runs: list[str],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("EDGETUNE_CACHE", str(tmp_path / where))
    if where == "full":
        monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    model = NETS["Untraceable"]()
    _, times = timed(model)
    count = len(runs)
    assert times[METHODS[0]] and count
    timed(model)
    assert len(runs) == 2 * count
    assert where != "full" or not list((tmp_path / where).iterdir())


def test_processes_may_write_at_once(folder: Path) -> None:
    """Whoever reads meanwhile finds a whole file, and each process finds its own entry after it has written."""
    code = (
        "import sys, torch\nfrom edgetune import stopwatch as s\n"
        "file, lap = s._file(torch.device('cpu')), s.Laps(frozen_ms=1, passing_ms=2, learning_ms=3)\n"
        "for n in range(15):\n"
        "    s._remember(file, {f'{sys.argv[1]} {n}': lap})\n"
        "    s.Times.load(file)\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, name], stderr=subprocess.PIPE, text=True,
                             env={**os.environ, "EDGETUNE_NATIVE": "0"}) for name in "ab"]
    assert [process.communicate()[1] for process in both] == ["", ""]
    (file,) = folder.glob("times-*")
    names = {key.split()[0] for key in Times.load(file).laps}
    assert names <= {"a", "b"} and any(key.endswith(" 14") for key in Times.load(file).laps)


def test_the_model_and_the_random_state_are_left_alone() -> None:
    model = scramble(NETS["Residual"]())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    timed(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_channels_last_is_timed_by_itself(runs: list[str]) -> None:
    timed(NETS["Residual"]())
    count = len(runs)
    timed(NETS["Residual"](), channels_last=True)
    assert len(runs) == 2 * count


def test_large_batches_are_timed_on_fewer_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = et.trace(NETS["Residual"](), torch.zeros(1, 3, 16, 16))
    assert samples_for(graph, 32) == 32
    monkeypatch.setattr(stopwatch, "MOST_MACS", 5 * graph.macs)
    assert [samples_for(graph, micro) for micro in (32, 12, 5, 1)] == [4, 3, 5, 1]
    monkeypatch.setattr(stopwatch, "MOST_MACS", 0)
    assert samples_for(graph, 32) == 1


def test_after_too_long_every_kind_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[int] = []
    monkeypatch.setattr(stopwatch, "PATIENCE_S", -1.0)
    real = stopwatch._once
    monkeypatch.setattr(stopwatch, "_once", lambda *given: rounds.append(1) or real(*given))
    _, times = timed(nn.Sequential(block(3, 4), nn.Flatten(), nn.Linear(1024, 2)))
    assert all(laps.learning_ms >= 0 for laps in times[METHODS[0]].values())
    assert len(rounds) == 3 * 3 * 2  # three ways to run, three segments, a second round


def test_a_slice_takes_its_own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sparse = scramble(NETS["Inverted"]()), SparseUpdate(ratio=0.5)
    before = dict(model.named_parameters())
    graph = et.trace(model, torch.zeros(1, 3, 16, 16))
    with MacClock(monkeypatch):
        times = layer_times(model, graph, {own: last_layers(graph, None, own) for own in (Exact(), sparse)}, 2)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    for call in graph.layers("conv"):
        exact, own = times[Exact()][call.node], times[sparse][call.node]
        assert own.passing_ms == pytest.approx(exact.passing_ms)
        channels = _channels(call)
        share = 1 if sparse.refuse(call) else max(1, round(0.5 * channels)) / channels
        assert own.learning_ms - own.passing_ms == pytest.approx(share * (exact.learning_ms - exact.passing_ms))


def _channels(call: Call) -> int:
    assert call.geometry is not None
    return window_axis(call.geometry)[1]
