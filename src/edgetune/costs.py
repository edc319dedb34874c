"""What the steps of a run cost: by its plan and by plain back-propagation, predicted and measured."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from edgetune.apply import apply
from edgetune.contract import Plan
from edgetune.profile import Cost, measure, profile
from edgetune.record import Record

REPEATS = 3
"""Steps that a time is the median of."""


class Costs(Record):
    """Costs of a step of `batch_size` pictures, taken `micro_batch` at a time, planned and plain.

    Plain is stock autograd through all parameters with the same micro-batch; its prediction is of one
    micro-batch. The measured ones are None where nothing ran; the budgets are those the plan was made under.
    """

    batch_size: int
    micro_batch: int
    planned_predicted: Cost
    plain_predicted: Cost
    planned_measured: Cost | None = None
    plain_measured: Cost | None = None
    memory_budget_bytes: int | None = None
    step_budget_ms: float | None = None


def costs_of(
    model: nn.Module,
    plan: Plan,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    measured: bool = True,
    plain_measured: bool = True,
    update_as_it_comes: bool = False,
    optimizer_copies: int = 1,
    memory_budget_bytes: int | None = None,
    step_budget_ms: float | None = None,
) -> Costs:
    """Predict and measure a training step on x (n c h w), y (n), by `plan` and by plain back-propagation.

    `model` has no plan applied, and stays as it is. Measuring the plain step (`plain_measured`) takes all the
    memory that the plan is there to save. `update_as_it_comes` and `optimizer_copies` are as in the settings of
    a run. Raises PlanError or Refusal when the plan does not fit.
    """
    micro = min(plan.micro_batch or len(x), len(x))
    plain_seen = None
    step: dict[str, Any] = {"optimizer_copies": optimizer_copies, "update_as_it_comes": update_as_it_comes}
    predicted, planned_seen = _planned(model, plan, x, y, measured, **step)
    plain = unrestrained(copy.deepcopy(model))
    plain_predicted = profile(plain, x[:micro], **step)
    if measured and plain_measured:
        plain_seen = measure(plain, x, y, micro_batch=micro, repeats=REPEATS, **step)
    return Costs(
        batch_size=len(x),
        micro_batch=micro,
        planned_predicted=predicted,
        plain_predicted=plain_predicted,
        planned_measured=planned_seen,
        plain_measured=plain_seen,
        memory_budget_bytes=memory_budget_bytes,
        step_budget_ms=step_budget_ms,
    )


def planned_again(
    costs: Costs, model: nn.Module, plan: Plan, x: torch.Tensor, y: torch.Tensor, **step: Any
) -> Costs:
    """The same costs, but for the planned step: that is `model`'s as it is now."""
    predicted, seen = _planned(model, plan, x, y, costs.planned_measured is not None, **step)
    return costs.model_copy(update={"planned_predicted": predicted, "planned_measured": seen})


def _planned(
    model: nn.Module, plan: Plan, x: torch.Tensor, y: torch.Tensor, measured: bool, **step: Any
) -> tuple[Cost, Cost | None]:
    predicted = profile(model, x, plan, **step)
    if not measured:
        return predicted, None
    undo = apply(model, plan)
    try:
        micro = min(plan.micro_batch or len(x), len(x))
        return predicted, measure(model, x, y, micro_batch=micro, repeats=REPEATS, **step)
    finally:
        undo()


def unrestrained(model: nn.Module) -> nn.Module:
    """Make `model` train by plain back-propagation: all parameters learn, norms stay in evaluation mode."""
    model.train().requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model
