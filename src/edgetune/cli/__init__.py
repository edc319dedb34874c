"""The command line: one file a verb. torch is imported inside the verbs, so that help comes at once."""

from __future__ import annotations

from collections.abc import Callable

import typer

from edgetune.cli import bench, compare, compress, doctor, explain, plan, predict, profile, quantize, report, train
from edgetune.cli import eval as eval_
from edgetune.cli import list as list_
from edgetune.cli.program import Program, Verb, examples, paragraphs

app = typer.Typer(
    name="edgetune",
    cls=Program,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Adapt vision networks on small devices, under a memory budget.",
    epilog=examples(
        ("edgetune train", "the demo: digits as another camera sees them; under a minute"),
        ("edgetune train --model mobilenet_v2 --weights w.safetensors --data photos --memory 24MiB", "your own photos"),
        ("edgetune VERB --help", "what a verb does, with examples"),
    ),
)

VERBS: dict[str, tuple[Callable[..., None], tuple[tuple[str, str], ...]]] = {
    "train": (train.train, train.EXAMPLES),
    "eval": (eval_.evaluate, eval_.EXAMPLES),
    "predict": (predict.predict, predict.EXAMPLES),
    "compare": (compare.compare, compare.EXAMPLES),
    "report": (report.report, report.EXAMPLES),
    "compress": (compress.compress, compress.EXAMPLES),
    "plan": (plan.plan, plan.EXAMPLES),
    "profile": (profile.profile, profile.EXAMPLES),
    "quantize": (quantize.quantize, quantize.EXAMPLES),
    "bench": (bench.bench, bench.EXAMPLES),
    "explain": (explain.explain, explain.EXAMPLES),
    "list": (list_.list_, list_.EXAMPLES),
    "doctor": (doctor.doctor, doctor.EXAMPLES),
}

for _name, (_verb, _examples) in VERBS.items():
    app.command(_name, cls=Verb, help=paragraphs(_verb), epilog=examples(*_examples))(_verb)


def main() -> None:
    """What the `edgetune` command calls."""
    app()
