"""`edgetune plan`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetune.cli import options
from edgetune.cli.output import console, emit, facts
from edgetune.cli.program import say
from edgetune.cli.setup import (
    DEMO_DATA,
    DEMO_MODEL,
    Planned,
    Wish,
    one_batch,
    open_network,
    planned,
    preprocess_for,
)
from edgetune.cli.tables import cost_facts, front_tables, plan_table, reasons_facts, reasons_table

if TYPE_CHECKING:
    from edgetune.front import Front
    from edgetune.reasons import Reasons

EXAMPLES = (
    (
        "edgetune plan --model mobilenet_v2 --weights w.safetensors --data photos --memory 24MiB",
        "choose for every layer, under a budget",
    ),
    ("edgetune plan --method pooled_chain --patch-px 4 --last 6", "the last six convolutions, filtered at 4 px"),
    ("edgetune plan --method tinytl --last-blocks 2", "biases, and small branches beside the last two blocks"),
    ("edgetune plan --model mobilenet_v3_small --data photos --last-blocks 3", "the last three blocks, by mobiletl"),
    ("edgetune plan --method asi --last 4 --kept 64KiB", "inputs kept as factors, their ranks chosen for the bytes"),
    ("edgetune plan --memory 2MiB --hold low_bit", "what is kept may be held in 4 or 2 bits a value, where that gains"),
    ("edgetune plan --memory 4MiB --hold checkpoint", "layers may run again in backward, where more learns that way"),
    ("edgetune plan --memory 1MiB --step-ms 60 --explain", "why each layer got what it got, under both limits"),
    ("edgetune plan --memory 1MiB --pareto front.svg", "what more or less memory and time would bring, as a picture"),
    ("edgetune train --plan plan.json", "train by the plan, edited or not"),
)

Scheme = Annotated[
    str | None,
    typer.Option(
        "--scheme",
        metavar="NAME",
        show_default=False,
        help="A published sparse update, such as mobilenet_v2_0.35-99KB, for a network of that shape.",
    ),
]
Out = Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the plan is written.")]
Explain = Annotated[
    bool,
    typer.Option("--explain", help="Tell why each layer got what it got, and what choosing otherwise would cost."),
]
Pareto = Annotated[
    Path | None,
    typer.Option(
        "--pareto",
        metavar="FILE.svg|FILE.png",
        show_default=False,
        help=("Draw and list what a range of budgets would bring, in memory and in time; layers are timed for it."),
    ),
]


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
    last_blocks: options.LastBlocks = None,
    scheme: Scheme = None,
    kept: options.Kept = None,
    hold: options.Hold = None,
    batch_size: options.BatchSize = 32,
    size: options.Size = None,
    val_fraction: options.ValFraction = None,
    limit: options.Limit = None,
    skip_bad_images: options.SkipBadImages = False,
    trust_pickle: options.TrustPickle = False,
    allow_partial: options.AllowPartial = False,
    seed: options.Seed = 0,
    explain: Explain = False,
    pareto: Pareto = None,
    out: Out = Path("plan.json"),
    json: options.Json = None,
) -> None:
    """Choose what learns and how each layer's gradient is computed, under a budget, and write it to a file.

    Every convolution is frozen, exact, filtered at one of several patch sizes, or learns a share of its channels;
    where there is hard-swish, its slope may be kept in bits. What gains the most on a calibration batch of the data
    is chosen. Without --memory and --step-ms training may take a quarter of what plain back-propagation takes. The
    file can be read, compared and edited.

    For --step-ms and --pareto layers are timed on this machine, once: what they take is remembered. The finished plan
    is tried by a real step, which exceeds neither limit.
    """
    from edgetune.apply import trace_rewritten
    from edgetune.costs import unrestrained
    from edgetune.data import load_data
    from edgetune.profile import profile

    wish = Wish(
        memory=memory,
        step_ms=step_ms,
        method=method,
        patch_px=patch_px,
        taps=taps,
        last=last,
        last_blocks=last_blocks,
        scheme=scheme,
        kept=kept,
        hold=hold,
    )
    _check(wish, explain, pareto)
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
    full = planned(network.model, x, y, wish)
    made, reasons, front = full.plan, _reasons(full) if explain else None, _front(full) if pareto else None
    cost = profile(network.model, x, made)
    graph = trace_rewritten(network.model, made, x[:1])
    plain = profile(unrestrained(network.model), x[: made.micro_batch or len(x)])
    made.save(out)
    if front is not None and pareto is not None:
        from edgetune.report.pareto import draw

        draw(front, pareto)

    def show() -> None:
        console().print(
            plan_table(f"{model}, batch {len(x)}, {made.micro_batch or len(x)} at a time", made, graph, cost, plain)
        )
        console().print(facts("predicted", cost_facts(cost)))
        if reasons is not None:
            console().print(reasons_table(reasons))
            console().print(facts("as a whole", reasons_facts(reasons)))
        if front is not None:
            for each in front_tables(front):
                console().print(each)
            say(f"drawn to '{pareto}'")
        say(f"written to '{out}'")

    emit(
        json,
        lambda: {
            "file": str(out),
            "plan": made.model_dump(mode="json"),
            "predicted": cost.model_dump(mode="json"),
            "plain_predicted": plain.model_dump(mode="json"),
            **_told("reasons", reasons),
            **_told("front", front),
        },
        show,
    )


def _check(wish: Wish, explain: bool, pareto: Path | None) -> None:
    """Refuse contradictions before anything is loaded or computed."""
    from edgetune.errors import PlanError
    from edgetune.report.pareto import check_picture

    wish.check()
    if (wish.by_hand or wish.scheme is not None) and (explain or pareto is not None):
        raise PlanError(
            "--explain and --pareto tell of the planner's own choices: leave them out, or leave out --method, "
            "--patch-px, --taps, --last, --last-blocks and --scheme"
        )
    if pareto is not None:
        check_picture(pareto)


def _reasons(full: Planned) -> Reasons:
    from edgetune.reasons import explain

    assert full.planner is not None and full.found is not None
    return explain(
        full.planner,
        full.found,
        bytes_limited=full.budget.memory_bytes is not None,
        ms_limited=full.budget.step_ms is not None,
    )


def _front(full: Planned) -> Front:
    from edgetune.front import front

    assert full.planner is not None
    return front(full.planner, full.budget, full.found)


def _told(name: str, what: Reasons | Front | None) -> dict[str, Any]:
    return {} if what is None else {name: what.model_dump(mode="json")}
