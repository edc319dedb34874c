"""Applied plans in the user's own loop: autocast, DistributedDataParallel, compile, layouts, modes."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import edgetune as et
from edgetune.contract import Plan
from edgetune.errors import PlanError
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.gradient_filter import GradientFilter
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.methods.backward.sparse_update import SparseUpdate
from edgetune.plan import last_layers
from nets import NETS, scramble

METHODS = [Exact(), GradientFilter(), PooledChain(patch_px=4), SparseUpdate(ratio=0.5)]


def made(name: str = "Inverted") -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(5)
    return scramble(NETS[name]()), torch.randn(4, 3, 24, 24)


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(model(x).float(), torch.arange(len(x)) % 5).backward()
    return {name.removeprefix("module.").removeprefix("_orig_mod."): p.grad.clone()
            for name, p in model.named_parameters() if p.grad is not None}


def applied(model: nn.Module, x: torch.Tensor, method: GradientFilter | Exact) -> nn.Module:
    et.apply(model, last_layers(et.trace(model, x), None, method))
    return model


def relative(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm().clamp(min=1e-6)) for n in expected)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.method)
@pytest.mark.parametrize("name", ["Inverted", "Residual"])
def test_autocast_keeps_half_the_bytes_and_gives_gradients_in_the_parameters_precision(
        method: GradientFilter | Exact, name: str) -> None:
    model, x = made(name)
    expected = gradients(applied(model, x, method), x)
    kept: list[torch.dtype] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, x)
    assert torch.bfloat16 in kept
    assert all(found[name].dtype == torch.float32 for name in found)
    whole = [torch.cat([grads[name].flatten() for name in expected]) for grads in (found, expected)]
    assert (whole[0] - whole[1]).norm() < 0.05 * whole[1].norm()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.method)
def test_channels_last_gives_the_same_gradients(method: GradientFilter | Exact) -> None:
    model, x = made()
    expected = gradients(applied(model, x, method), x)
    model = model.to(memory_format=torch.channels_last)
    found = gradients(model, x.contiguous(memory_format=torch.channels_last))
    assert relative(found, expected) < 1e-3


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.method)
def test_compiled_forward_gives_the_same_gradients(method: GradientFilter | Exact) -> None:
    model, x = made("Residual")
    expected = gradients(applied(model, x, method), x)
    found = gradients(torch.compile(model, backend="eager"), x)
    assert relative(found, expected) < 1e-5


def _worker(rank: int, port: int, method: GradientFilter | Exact, queue: mp.SimpleQueue) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model, x = made()
    parallel = nn.parallel.DistributedDataParallel(applied(model, x, method))
    grads = gradients(parallel, x[2 * rank:2 * rank + 2])
    if rank == 0:
        queue.put({name: value.numpy() for name, value in grads.items()})
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("method", [PooledChain(), GradientFilter(), SparseUpdate()], ids=lambda m: m.method)
def test_two_processes_average_to_the_gradient_of_the_whole_batch(method: GradientFilter) -> None:
    model, x = made()
    model = applied(model, x, method)
    halves = []
    for part in (x[:2], x[2:]):
        halves.append(gradients(model, part))
    expected = {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    mp.start_processes(_worker, (port, method, queue), nprocs=2, join=False, start_method="spawn")
    found = {name: torch.from_numpy(value) for name, value in queue.get().items()}
    assert relative(found, expected) < 1e-4


def test_norms_stay_frozen_when_the_model_trains_and_thaw_after_undo() -> None:
    model, x = made()
    undo = et.apply(model, last_layers(et.trace(model, x), 2, PooledChain()))
    before = model.stem[1].running_mean.clone()
    model.train()
    model(x)
    assert torch.equal(model.stem[1].running_mean, before)
    undo()
    model.train()
    model(x)
    assert not torch.equal(model.stem[1].running_mean, before)


def test_dropout_follows_the_models_mode() -> None:
    model, x = made()
    model.head[1].p = 0.9
    et.apply(model, last_layers(et.trace(model, x), None, PooledChain()))
    assert torch.equal(model.eval()(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_a_users_own_loop_learns() -> None:
    model, x = made("Residual")
    y = torch.arange(4)
    x = x + torch.tensor([[-3.0, 0, 0], [3, 0, 0], [0, 3, 0], [0, 0, 3]])[:, :, None, None]
    model = applied(model, x, PooledChain())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.02, momentum=0.9)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_frozen_prefix_keeps_nothing() -> None:
    model, x = made("Residual")
    et.apply(model, last_layers(et.trace(model, x), 1, Exact()))
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel() if tensor.data_ptr() not in {p.data_ptr() for p in model.parameters()} else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    assert sum(kept) < 4 * 8 * 12 * 12 * 12


def test_a_second_plan_and_an_unknown_parameter_are_refused() -> None:
    model, x = made()
    plan = last_layers(et.trace(model, x), 1, Exact())
    with pytest.raises(PlanError, match="no parameter"):
        et.apply(model, plan.model_copy(update={"learns": {"stem.0": ("gain",)}}))
    undo = et.apply(model, plan)
    with pytest.raises(PlanError, match="undo"):
        et.apply(model, plan)
    undo()
    et.apply(model, plan)()


def test_a_refused_plan_leaves_the_model_as_it_was() -> None:
    model, x = made()
    names = {id(m): set(m.__dict__) for m in model.modules()}
    flags = [p.requires_grad for p in model.parameters()]
    plan = Plan(input_shape=tuple(x.shape), layers={"head.2": (GradientFilter(),)})
    with pytest.raises(et.EdgetuneError, match=r"head\.2"):
        et.apply(model, plan)
    assert {id(m): set(m.__dict__) for m in model.modules()} == names
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.cuda
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.method)
@pytest.mark.parametrize("name", NETS)
def test_a_cuda_device_gives_the_cpus_gradients(method: GradientFilter | Exact, name: str) -> None:
    model, x = made(name)
    expected = gradients(applied(model, x, method), x)
    model.zero_grad(set_to_none=True)
    model.cuda()
    nn.functional.cross_entropy(model(x.cuda()), (torch.arange(len(x)) % 5).cuda()).backward()
    found = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    assert relative({n: found[n] for n in expected}, expected) < 1e-2
