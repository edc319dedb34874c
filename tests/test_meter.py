"""The watchers of a step: lifetimes, keepers, products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgetune import kernels, meter
from edgetune.allocator import peak_during
from edgetune.graph import trace
from edgetune.meter import Account, Ledger, keep_book
from edgetune.models import load_model

CPU = torch.device("cpu")
MEGA = 1 << 20


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_peak_is_the_worst_moment_and_not_a_sum(device: str) -> None:
    ledger = Ledger(CPU)
    with ledger:
        first = torch.empty(MEGA, device=device)
        second = first + 1
        view = second.view(2, -1)[0]
        del first, second
        third = torch.empty(MEGA // 4, device=device)
        third.add_(1)
        assert ledger.live_bytes == 5 * MEGA  # the view holds the whole of what it looks at
        del view
    assert (ledger.live_bytes, ledger.peak_bytes) == (MEGA, 8 * MEGA)
    del third
    assert ledger.live_bytes == 0


def test_a_ledger_leaves_out_what_was_there_before() -> None:
    before, ledger = torch.zeros(MEGA), Ledger(CPU)
    with ledger:
        before.view(2, -1).add_(1)
    assert ledger.peak_bytes == 0


def test_fallback_kernels_need_more_than_native_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(4, 8, 64, 64, device="meta")
    peaks = {}
    for native in (True, False):
        reply = kernels.Status(native=native, reason="as the test says")
        monkeypatch.setattr(meter, "status", lambda reply=reply: reply)
        ledger = Ledger(CPU)
        with ledger:
            bits = kernels.mask_pack(x, 0.0, 6.0)
        peaks[native] = ledger.peak_bytes
        assert ledger.live_bytes == x.numel() // 8 == bits.numel()
    assert peaks[True] == x.numel() // 8
    assert peaks[False] > x.numel()


def test_a_simulated_step_peaks_where_a_real_one_does() -> None:
    model = load_model("resnet20").eval()
    x, y = torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()

    step()
    ledger = Ledger(CPU)
    with ledger:
        step()
    model.zero_grad()
    # a real ledger does not see inside of a convolution
    assert ledger.peak_bytes <= peak_during(CPU, step) * 1.001
    assert ledger.peak_bytes >= 0.8 * peak_during(CPU, step)


class Small(nn.Module):
    """Every kind of layer once, and what each keeps known by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.deep = nn.Conv2d(8, 8, 1, groups=2, bias=False)
        self.mean, self.flat, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.relu(self.norm(self.conv(x))))
        x = x * torch.sigmoid(self.deep(x)) + x
        return self.head(self.flat(self.mean(x)))


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_kept_bytes_and_products_of_stock_layers(device: str) -> None:
    model = Small().to(device).eval()
    x = torch.zeros(2, 3, 8, 8, device=device)
    labels = torch.zeros(2, dtype=torch.long, device=device)
    book = keep_book(model, trace(model, x), x, lambda out: F.cross_entropy(out, labels), CPU)
    full, half = 4 * 2 * 8 * 64, 4 * 2 * 8 * 16
    assert {name: account.kept_bytes for name, account in book.items() if account.kept_bytes} == {
        "norm": full,         # its input; the convolution's input is the batch
        "relu": full,         # its result in place, which pooling keeps too
        "pool": 2 * half,     # int64 indices
        "deep": half,         # its input, which the gate multiplies and the sum adds
        "sigmoid": half,      # its result, which the product keeps too
        "head": 4 * 2 * 8,
        "loss": 4 * 2 * 5 + 4}
    products = {name: (account.forward_macs, account.backward_macs) for name, account in book.items()
                if account.forward_macs}
    conv, deep, head = 2 * 64 * 8 * 27, 2 * 16 * 8 * 4, 2 * 8 * 5
    assert products == {"conv": (conv, conv), "deep": (deep, 2 * deep), "head": (head, 2 * head)}


def test_nothing_is_kept_where_nothing_learns() -> None:
    model = Small().to("meta").eval().requires_grad_(False)
    x = torch.zeros(2, 3, 8, 8, device="meta")
    book = keep_book(model, trace(model, x), x, torch.sum, CPU)
    assert all(account == Account(0, account.forward_macs, 0) for account in book.values())


@pytest.mark.parametrize("product", [
    lambda a, b: a @ b, lambda a, b: torch.addmm(torch.zeros(5, device=a.device), a, b), lambda a, b: a @ b[:, 0],
    lambda a, b: a[None].repeat(2, 1, 1) @ b[None].repeat(2, 1, 1), lambda a, b: a[0] @ b[:, 0]],
    ids=["mm", "addmm", "mv", "bmm", "dot"])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_matrix_products_are_counted(product, device: str) -> None:  # type: ignore[no-untyped-def]
    book, (a, b) = meter.Book(CPU), (torch.zeros(3, 4, device=device), torch.zeros(4, 5, device=device))
    with book, book.turn("layer"):
        out = product(a, b)
    assert book.accounts["layer"].forward_macs == out.numel() * 4
