"""Trained layers and pictures -> settings fitted to what the layers read, and norms estimated anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import nn

from edgetune.contract import ArithmeticMethod, Plan
from edgetune.graph import evaluating
from edgetune.hosts.arithmetic import arithmetic_layers


def fit_layers(model: nn.Module, methods: Mapping[str, ArithmeticMethod],
               batches: Iterable[torch.Tensor]) -> dict[str, ArithmeticMethod]:
    """Let arithmetic layers compute by `methods` from now on, fitted to what each reads of `batches` x (n c h w).

    Ranges are seen while all layers still compute as before. Returns the fitted methods by layer.
    """
    layers, fitted = arithmetic_layers(model), dict(methods)
    hooks = [layers[name].register_forward_pre_hook(partial(_fit, fitted, name)) for name in methods]
    try:
        with evaluating(model), torch.no_grad():
            for x in batches:
                model(x)
    finally:
        for hook in hooks:
            hook.remove()
    for name, method in fitted.items():
        layers[name].take(method)
    return fitted


def _fit(fitted: dict[str, ArithmeticMethod], name: str, layer: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
    fitted[name] = fitted[name].fitted(given[0])


def estimate_norms(model: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Estimate the running statistics of all batch norms anew, as the means over `batches` x (n c h w)."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    before = [norm.momentum for norm in norms]
    try:
        with evaluating(model), torch.no_grad():
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum, norm.training = None, True  # None: every batch counts alike
            for x in batches:
                model(x)
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum


def fit(model: nn.Module, plan: Plan, batches: Callable[[], Iterable[torch.Tensor]]) -> Plan:
    """Fit the layers of a trained network whose methods ask for it, and the norms with them unless the plan keeps those
    frozen. `batches` gives the pictures x (n c h w), each time anew.

    Returns the plan with what was found; without such layers it is the one given, and nothing happens.
    """
    asking = {name: method for name, method in plan.arithmetic().items() if method.fits}
    if not asking:
        return plan
    fitted = fit_layers(model, asking, batches())
    if plan.norms == "batch":
        estimate_norms(model, batches())
    stacks = {name: tuple(fitted[name] if isinstance(method, ArithmeticMethod) else method
                          for method in plan.layers[name]) for name in fitted}
    return plan.model_copy(update={"layers": {**plan.layers, **stacks}})
