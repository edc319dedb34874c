"""Bytes moved, against counting by hand."""

from __future__ import annotations

import torch

from edgetune.bench.traffic import Traffic


def test_reads_and_writes_count_once_an_operator() -> None:
    a, b = torch.ones(3, 4), torch.ones(3, 4)
    with Traffic() as traffic:
        c = a + b  # reads 2 * 48, writes 48
        c.view(12)  # moves nothing
        c.t()
        c.mul_(2.0)  # reads and writes 48
    assert traffic.moved_bytes == 3 * 48 + 2 * 48


def test_an_expanded_tensor_is_read_from_where_it_is_stored() -> None:
    with Traffic() as traffic:
        torch.ones(1, 1).expand(5, 5).contiguous()
    # one value is written, then read; 25 are written
    assert traffic.moved_bytes == 4 + 4 + 100


def test_backward_counts_too() -> None:
    x, w = torch.ones(2, 3), torch.ones(3, 4, requires_grad=True)
    with Traffic() as traffic:
        y = x @ w
        forward = traffic.moved_bytes
        y.sum().backward()
    assert forward == 4 * (6 + 12 + 8)
    assert traffic.moved_bytes >= forward + 4 * (6 + 8 + 12)
