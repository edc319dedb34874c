"""What is remembered of operators on meta: the same in every respect as asking them again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

import edgetune as et
from edgetune import meter, outcome
from edgetune.draft import last_layers
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.mobiletl import MobileTL
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.outcome import foreseen, result_of, tensors_in
from edgetune.profile import predicted_kept, predicted_peak, profile
from nets import NETS, scramble

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome, "_KNOWN", {})


def asked(func: Any, *args: Any, **kwargs: Any) -> tuple[Any, int]:
    """The result, and how often it was computed."""
    runs: list[int] = []

    def run() -> Any:
        runs.append(1)
        return func(*args, **kwargs)

    return foreseen(func, args, kwargs, "here", run, lambda: 7)[0], len(runs)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


X, G = meta(2, 4, 6, 5), meta(2, 3, 4, 3)
BACKWARD = (None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
CASES: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.add.Tensor, (X, X), {"alpha": 2}),
    (aten.mul.Tensor, (X.contiguous(memory_format=torch.channels_last), 2.5), {}),
    (aten.convolution_backward.default, (G, X, meta(3, 4, 3, 3), *BACKWARD, [False, True, False]), {}),
    (aten.native_layer_norm.default, (X, [5], None, None, 1e-5), {}),
    (aten._to_copy.default, (X,), {"dtype": torch.float64}),
    (aten.topk.default, (X, 2), {}),
]


@pytest.mark.parametrize(("func", "args", "kwargs"), CASES, ids=lambda value: str(getattr(value, "__name__", "")))
def test_what_is_made_again_is_what_was_given(func: Any, args: Any, kwargs: Any) -> None:
    first, again = asked(func, *args, **kwargs), asked(func, *args, **kwargs)
    assert (first[1], again[1]) == (1, 0)
    assert type(first[0]) is type(again[0])
    for one, other in zip(tensors_in(first[0]), tensors_in(again[0]), strict=True):
        assert (one.shape, one.stride(), one.dtype, one.device) == (other.shape, other.stride(), other.dtype,
                                                                    other.device)
        assert one.untyped_storage().nbytes() == other.untyped_storage().nbytes()
        assert one.untyped_storage()._cdata != other.untyped_storage()._cdata
    if isinstance(first[0], tuple):
        assert [value is None for value in first[0]] == [value is None for value in again[0]]


def test_other_arguments_are_asked_anew() -> None:
    whole = meta(3, dtype=torch.int64)
    results = [asked(aten.add.Tensor, whole, other)[0].dtype for other in (1, 1.0, True)]
    assert results == [torch.int64, torch.float32, torch.int64]
    for x in (X, X.transpose(2, 3), X.double(), meta(2, 4, 6)):
        assert asked(aten.neg.default, x)[1] == 1


def test_views_are_computed_and_changed_values_stay_what_they_are() -> None:
    for _ in range(2):
        assert asked(aten.view.default, X, [8, 30])[1] == 1
        assert asked(aten.unsqueeze_.default, meta(3), 0)[1] == 1
    assert result_of(aten.hardtanh_.default) == "changed" and result_of(aten.t_.default) == "view"
    x = meta(3)
    assert asked(aten.hardtanh_.default, x, 0, 6)[0] is x
    assert asked(aten.hardtanh_.default, x, 0, 6) == (x, 0)
    expected, once = meta(1).expand(4), asked(aten.neg.default, meta(1).expand(4))
    assert once[0].stride() == aten.neg.default(expected).stride()


def test_it_forgets_before_it_grows_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome, "MOST", 3)
    for size in range(1, 9):
        asked(aten.neg.default, meta(size))
    assert len(outcome._KNOWN) <= 3


def unaided(func: Any, args: Any, kwargs: Any, place: Any, run: Callable[[], Any],
            scratch: Callable[[], int]) -> tuple[Any, int]:
    """The slow way: every operator is asked each time."""
    held = scratch()
    return run(), held


@pytest.mark.parametrize("method", [Exact(), MobileTL(), PooledChain(patch_px=2)], ids=lambda own: own.method)
@pytest.mark.parametrize("name", ["Branching", "Inverted", "Residual"])
def test_predictions_are_those_of_the_slow_way(name: str, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = scramble(NETS[name]()), torch.randn(3, 3, 17, 22)
    graph = et.trace(model, x)
    plan = last_layers(graph, None, method).model_copy(update={"micro_batch": 2})
    quick = [(profile(model, x, plan), predicted_peak(model, x, plan, graph)) for _ in range(2)]
    kept = predicted_kept(model, x, plan, graph)
    monkeypatch.setattr(meter, "foreseen", unaided)
    slow = profile(model, x, plan), predicted_peak(model, x, plan, graph)
    assert quick[0] == quick[1] == slow and slow[0].peak_bytes == slow[1]
    assert {layer.name: layer.kept_bytes for layer in slow[0].layers if layer.kept_bytes} == {
        layer: size for layer, size in kept.items() if size}


def test_a_second_prediction_asks_for_views_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for, real = Counter[str](), meter.foreseen

    def counted(func: Any, args: Any, kwargs: Any, place: Any, run: Any, scratch: Any) -> Any:
        def counting() -> Any:
            asked_for[result_of(func)] += 1
            return run()
        return real(func, args, kwargs, place, counting, scratch)

    monkeypatch.setattr(meter, "foreseen", counted)
    model, x = scramble(NETS["Inverted"]()), torch.randn(2, 3, 32, 32)
    graph = et.trace(model, x)
    plan = last_layers(graph, None, PooledChain(patch_px=2))
    predicted_peak(model, x, plan, graph)
    assert asked_for["new"] and asked_for["changed"]
    asked_for.clear()
    predicted_peak(model, x, plan, graph)
    assert set(asked_for) == {"view"}
