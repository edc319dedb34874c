"""`edgetune plan`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgetune.cli import options
from edgetune.cli.output import console, emit, facts
from edgetune.cli.program import say
from edgetune.cli.setup import DEMO_DATA, DEMO_MODEL, Wish, graph_of, make_plan, one_batch, open_network, preprocess_for
from edgetune.cli.tables import cost_facts, plan_table

EXAMPLES = (
    (
        "edgetune plan --model mobilenet_v2 --weights w.safetensors --data photos --memory 24MiB",
        "choose for every layer, under a budget",
    ),
    ("edgetune plan --method pooled_chain --patch-px 4 --last 6", "the last six convolutions, filtered at 4 px"),
    ("edgetune train --plan plan.json", "train by the plan, edited or not"),
)

Out = Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the plan is written.")]


def plan(
    model: options.Model = DEMO_MODEL,
    weights: options.Weights = None,
    data: options.Data = DEMO_DATA,
    memory: options.Memory = None,
    step_ms: options.StepMs = None,
    method: options.Method = None,
    patch_px: options.PatchPx = None,
    taps: options.Taps = None,
    last: options.Last = None,
    batch_size: options.BatchSize = 32,
    size: options.Size = None,
    val_fraction: options.ValFraction = None,
    limit: options.Limit = None,
    skip_bad_images: options.SkipBadImages = False,
    trust_pickle: options.TrustPickle = False,
    allow_partial: options.AllowPartial = False,
    seed: options.Seed = 0,
    out: Out = Path("plan.json"),
    json: options.Json = None,
) -> None:
    """Choose what learns and how each layer's gradient is computed, under a budget, and write it to a file.

    Every convolution is frozen, exact, or filtered at one of several patch sizes; what gains the most on a calibration
    batch of the data is chosen. Without --memory and --step-ms training may take a quarter of what plain
    back-propagation takes. The file can be read, compared and edited.
    """
    from edgetune.costs import unrestrained
    from edgetune.data import load_data
    from edgetune.profile import profile

    pictures = load_data(
        data,
        preprocess_for(model, size),
        val_fraction=val_fraction,
        seed=seed,
        limit=limit,
        skip_bad_images=skip_bad_images,
    )
    network = open_network(
        model, weights, len(pictures.classes), trust_pickle=trust_pickle, allow_partial=allow_partial, seed=seed
    )
    say(network.story)
    x, y = one_batch(pictures, batch_size, seed)
    wish = Wish(memory=memory, step_ms=step_ms, method=method, patch_px=patch_px, taps=taps, last=last)
    made, _ = make_plan(network.model, x, y, wish)
    cost = profile(network.model, x, made)
    graph = graph_of(network.model, x[:1])
    plain = profile(unrestrained(network.model), x[: made.micro_batch or len(x)])
    made.save(out)

    def show() -> None:
        console().print(
            plan_table(f"{model}, batch {len(x)}, {made.micro_batch or len(x)} at a time", made, graph, cost, plain)
        )
        console().print(facts("predicted", cost_facts(cost)))
        say(f"written to '{out}'")

    emit(
        json,
        lambda: {
            "file": str(out),
            "plan": made.model_dump(mode="json"),
            "predicted": cost.model_dump(mode="json"),
            "plain_predicted": plain.model_dump(mode="json"),
        },
        show,
    )
