"""`edgetune profile`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgetune.cli import options
from edgetune.cli.output import console, emit, facts
from edgetune.cli.setup import open_network, preprocess_for
from edgetune.cli.tables import cost_facts, cost_table

EXAMPLES = (
    ("edgetune profile --model mobilenet_v2", "plain back-propagation through every layer, predicted"),
    ("edgetune profile --model mobilenet_v2 --plan plan.json --batch-size 8", "the same network by a plan"),
    ("edgetune profile --model mobilenet_v2 --plan plan.json --frozen-bits 8", "with its frozen part in integers"),
    ("edgetune profile --model resnet18 --size 128 --measure --json -", "run it, too, for a program"),
)

PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        metavar="FILE",
        show_default=False,
        help=("Cost of training by this plan; plain back-propagation through all layers otherwise."),
    ),
]
Classes = Annotated[
    int | None,
    typer.Option(
        "--classes", metavar="N", min=2, show_default=False, help=("Give the network a head for so many classes.")
    ),
]
Measure = Annotated[
    bool, typer.Option("--measure", help="Run some steps and show what they took, beside the prediction.")
]


def profile(
    model: options.Model = "digits_net",
    plan: PlanFile = None,
    batch_size: options.BatchSize = 8,
    size: options.Size = None,
    classes: Classes = None,
    measure: Measure = False,
    frozen_bits: options.FrozenBits = None,
    json: options.Json = None,
) -> None:
    """Tell what one training step costs, layer by layer: parameters, multiply-accumulates, bytes kept for backward.

    The prediction runs the very code that trains on tensors without memory, so it takes a moment even for networks that
    would not fit. Peak training memory is gradients, optimizer state, kept bytes and what lives in passing at the worst
    moment; parameters and the batch stand beside it.
    """
    import torch

    from edgetune.contract import Plan
    from edgetune.costs import unrestrained
    from edgetune.errors import PlanError
    from edgetune.profile import profile as predict

    network = open_network(model, None, classes).model
    given = None if plan is None else Plan.load(plan, PlanError)
    x = torch.zeros(batch_size, *preprocess_for(model, size).shape)
    if given is None:
        unrestrained(network)
    if options.checked_bits(frozen_bits) is not None:
        from edgetune.apply import rewrite
        from edgetune.frozen import install, integer_front

        if given is None:
            raise PlanError("--frozen-bits is for a plan that leaves the first layers frozen: name it with --plan")
        rewrite(network, given)
        front = integer_front(network, given, [x])  # what a step takes does not depend on the ranges
        install(network, front)
        given = front.left_over(given)
    predicted = predict(network, x, given)
    found = {"predicted": predicted}
    if measure:
        from edgetune.apply import apply
        from edgetune.profile import measure as run

        if given is not None:
            apply(network, given)
        found["measured"] = run(network, x, micro_batch=given.micro_batch if given is not None else None)
    how = "plain back-propagation" if plan is None else str(plan)

    def show() -> None:
        console().print(cost_table(f"{model}, batch {batch_size}, {how}, predicted", predicted))
        for cost in found.values():
            console().print(facts(cost.origin, cost_facts(cost)))

    emit(
        json,
        lambda: {
            "model": model,
            "batch_size": batch_size,
            "plan": how,
            **{origin: cost.model_dump(mode="json") for origin, cost in found.items()},
        },
        show,
    )
