"""Rows of the accuracy benches that no other test makes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from edgetune.bench.arms import tinytl
from edgetune.models import load_model


def test_tinytl_trains_branches_biases_or_both() -> None:
    learned = {}
    for residuals, biases in ((True, True), (True, False), (False, True)):
        arm = tinytl(1, residuals, biases)
        trainee = arm.prepare(load_model("digits_net"), torch.zeros(40, 1, 32, 32), torch.zeros(40, dtype=torch.long))
        F.cross_entropy(trainee.model(torch.zeros(2, 1, 32, 32)), torch.arange(2)).backward()
        learned[arm.method] = {name for name, p in trainee.model.named_parameters() if p.grad is not None}
    both, branches, biases_only = learned.values()
    assert len(learned) == 3
    assert {name for name in both if ".lite." in name} < branches and "features.3.lite.conv1.weight" in branches
    assert not any(".lite." in name for name in biases_only) and "features.4.1.bias" in biases_only - branches
