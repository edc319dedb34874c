"""The run as one page: a lead, the numbers, the curves, memory by layer, the plan as a picture, and how to go on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from edgetune.compress import Weights
from edgetune.contract import Plan
from edgetune.costs import Costs
from edgetune.report.choices import LayerView, kept_by_layer
from edgetune.report.figures import curves, memory_by_layer
from edgetune.report.picture import colour_class, colour_classes, picture
from edgetune.report.result import COLUMNS, percent, plain_accuracy, result_lines
from edgetune.run import Run, Settings
from edgetune.units import format_bytes, format_ms


@dataclass(frozen=True)
class Story:
    """All that a page is made of; `views` is empty where a run's network cannot be built again, `weights` also where
    all of them are float32."""

    folder: Path
    run: Run
    plan: Plan
    views: tuple[LayerView, ...]
    weights: tuple[Weights, ...] = ()

    @property
    def costs(self) -> Costs | None:
        return self.run.costs


def page(story: Story) -> str:
    """The whole HTML file; it asks for nothing from anywhere else."""
    here = resources.files("edgetune.report")
    sections = [
        tiles(story),
        result(story),
        learning(story),
        memory(story),
        network(story),
        going_on(story),
        facts(story),
    ]
    return Template((here / "page.html").read_text()).substitute(
        title=escape(title(story.run)),
        lead=lead(story),
        style=(here / "style.css").read_text(),
        sections="\n".join(part for part in sections if part),
        version=escape(story.run.versions.get("edgetune", "")),
    )


def title(run: Run) -> str:
    """`mobilenet_v2 on photos`."""
    source = run.data.source if len(run.data.source) < 40 else Path(run.data.source).name
    return f"{run.model.name or 'a network'} on {source}"


def lead(story: Story) -> str:
    """What happened, in two sentences."""
    run, costs = story.run, story.costs
    reached = run.epochs[-1].val_accuracy if run.epochs else None
    said = (
        f"After {len(run.epochs)} {'epoch' if len(run.epochs) == 1 else 'epochs'} on "
        f"{run.data.counts.get('train', 0)} pictures, accuracy went from <b>{percent(run.accuracy_before)}</b> to "
        f"<b>{percent(run.accuracy_after if run.accuracy_after is not None else reached)}</b>"
    )
    if run.status != "finished":
        said = f"This run is not finished ({run.status}). {said}"
    if run.plain is not None and run.plain.accuracy is not None:
        said += f"; plain back-propagation through all layers reached {percent(run.plain.accuracy)}"
    said += "."
    if story.weights:
        taken = [each for each in story.weights if each.spared is None]
        said += (
            f" {len(taken)} of {len(story.weights)} layers compute by {_methods(story.plan)}: the network's weights, "
            f"scales aside, are {format_bytes(_bits(story))} in place of {format_bytes(_floats(story))}."
        )
    if costs is not None:
        ours = costs.planned_measured or costs.planned_predicted
        plain = costs.plain_measured or costs.plain_predicted
        if ours.kept_bytes and ours.peak_bytes:
            about = "" if costs.plain_measured is not None else "a predicted "
            said += (
                f" Training took {format_bytes(ours.peak_bytes)} at its peak instead of {about}"
                f"{format_bytes(plain.peak_bytes)}, and kept {format_bytes(ours.kept_bytes)} for the backward pass "
                f"instead of {format_bytes(plain.kept_bytes)}."
            )
    return said


def _methods(plan: Plan) -> str:
    """The arithmetic methods of a plan, in words."""
    return " and ".join(sorted({method.label for method in plan.arithmetic().values()}))


def _bits(story: Story) -> int:
    return sum(each.bytes for each in story.weights)


def _floats(story: Story) -> int:
    return sum(each.float_bytes for each in story.weights)


def tiles(story: Story) -> str:
    """The few numbers that matter, large."""
    run, costs = story.run, story.costs
    shown = [
        (
            "accuracy after",
            percent(run.accuracy_after),
            f"before {percent(run.accuracy_before)}" + (f"; plain {plain_accuracy(run)}" if run.plain else ""),
        )
    ]
    if story.weights:
        shown.append(("weights, in bits", format_bytes(_bits(story)), f"float32 {format_bytes(_floats(story))}"))
    if costs is not None:
        ours = costs.planned_measured or costs.planned_predicted
        plain = costs.plain_measured or costs.plain_predicted
        budget = "" if costs.memory_budget_bytes is None else f"; budget {format_bytes(costs.memory_budget_bytes)}"
        shown += [
            ("peak training memory", format_bytes(ours.peak_bytes), f"plain {format_bytes(plain.peak_bytes)}{budget}"),
            ("kept for backward", format_bytes(ours.kept_bytes), f"plain {format_bytes(plain.kept_bytes)}"),
        ]
        if ours.step_ms is not None and plain.step_ms is not None:
            shown.append(
                (f"step of {costs.batch_size} pictures", format_ms(ours.step_ms), f"plain {format_ms(plain.step_ms)}")
            )
    cells = (
        f'<div><dt>{escape(what)}</dt><dd class="big">{escape(value)}</dd><dd class="small">{escape(more)}</dd></div>'
        for what, value, more in shown
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def result(story: Story) -> str:
    """The table that the command line prints, too."""
    rows = [[escape(cell) for cell in line.cells] for line in result_lines(story.run)]
    note = (
        "Training memory is gradients, optimizer state, what is kept for backward and passing tensors at the worst "
        "moment; parameters and the batch come on top for both."
        if story.costs is not None
        else ""
    )
    return f'<h2>Result</h2>{html_table(COLUMNS, rows, kind="result")}<p class="note">{note}</p>'


def learning(story: Story) -> str:
    """Loss and accuracy after every epoch."""
    run = story.run
    if not run.epochs:
        return ""
    plain = run.plain.epochs if run.plain is not None else ()
    shown = [
        curves(
            "Validation accuracy",
            [e.val_accuracy for e in run.epochs],
            [e.val_accuracy for e in plain],
            percent=True,
            start=run.accuracy_before,
        ),
        curves("Training loss", [e.train_loss for e in run.epochs], [e.train_loss for e in plain]),
    ]
    return f'<h2>Learning</h2><div class="pair">{"".join(f"<figure>{figure}</figure>" for figure in shown)}</div>'


def memory(story: Story) -> str:
    """Kept bytes by layer, of the plan and of plain back-propagation."""
    if story.costs is None or not story.views:
        return ""
    ours, plain, seen = (
        list(kept_by_layer(cost, story.views).values())
        for cost in (story.costs.planned_predicted, story.costs.plain_predicted, story.costs.planned_measured)
    )
    figure = memory_by_layer([str(view.number) for view in story.views], ours, plain, seen or None)
    return (
        '<h2>Memory by layer</h2><p class="note">What each convolution or linear layer, with the norms, '
        "activations and adds behind it, keeps from the forward pass until backward needs it. The numbers are those of "
        "the picture below.</p>"
        f'<figure class="wide scroll">{figure}</figure>'
    )


def network(story: Story) -> str:
    """The plan as a picture, and as a table for those who want every layer."""
    if not story.views:
        return ""
    note = (
        "A block is a convolution or linear layer: as tall as its map, as wide as its channels, coloured by the "
        "method of its gradient, or of its numbers. Striped ones learn nothing and only pass the gradient on."
    )
    micro = f" Pictures go through {story.plan.micro_batch} at a time." if story.plan.micro_batch else ""
    return (
        f'<h2>The plan</h2><p class="note">{escape(note + micro)}</p>{picture(story.views)}'
        f"<details><summary>Every layer</summary>{layer_table(story)}</details>"
    )


def layer_table(story: Story) -> str:
    """Number, name, map, choice, what learns, and kept bytes beside plain's."""
    classes = colour_classes(story.views)
    costs = story.costs
    ours = kept_by_layer(costs.planned_predicted if costs else None, story.views)
    plain = kept_by_layer(costs.plain_predicted if costs else None, story.views)
    rows = [
        [
            f"{view.number}",
            escape(view.name),
            escape(view.map_text),
            f'<i class="chip {colour_class(view.choice, classes)}"></i>{escape(view.choice.label)}',
            escape(", ".join(view.learns)) or "-",
            format_bytes(ours[view.name]) if view.name in ours else "-",
            format_bytes(plain[view.name]) if view.name in plain else "-",
        ]
        for view in story.views
    ]
    return html_table(
        ("", "layer", "channels · map", "method", "learns", "kept", "plain keeps"), rows, left={1, 2, 3, 4}
    )


def going_on(story: Story) -> str:
    """Commands for this very run."""
    folder = escape(str(story.folder))
    steps = [
        ("try it on photos", f"edgetune predict {folder} photo.jpg"),
        ("score it on other pictures, class by class", f"edgetune eval {folder} --data more_photos"),
        ("put runs side by side", f"edgetune compare {folder} ..."),
        ("edit the plan and train by it", f"edgetune train --plan {folder}/plan.json ..."),
    ]
    if story.run.status != "finished":
        steps.insert(0, ("go on where it stopped", f"edgetune train --resume {folder}"))
    lines = "\n".join(f"<i># {what}</i>\n{command}" for what, command in steps)
    return f"<h2>How to go on</h2><pre>{lines}</pre>"


def facts(story: Story) -> str:
    """Data, settings and versions: what it would take to do the same again."""
    run, settings = story.run, story.run.settings
    counts = ", ".join(f"{count} {split}" for split, count in run.data.counts.items())
    skipped = f", {len(run.data.skipped)} unreadable left out" if run.data.skipped else ""
    size = f"{run.preprocess.channels}×{run.preprocess.size[0]}×{run.preprocess.size[1]}"
    pairs = [
        ("started", run.started),
        ("network", f"{run.model.name}, weights {Path(run.model.weights).name if run.model.weights else 'random'}"),
        ("data", f"{run.data.source} ({counts}{skipped}), fingerprint {run.data.fingerprint}"),
        ("pictures", size),
        ("classes", f"{len(run.classes)}: {', '.join(run.classes[:12])}{', ...' if len(run.classes) > 12 else ''}"),
        (
            "training",
            f"{settings.epochs} epochs, batch {settings.batch_size}, {_OPTIMIZERS[settings.optimizer]}, "
            f"learning rate {settings.learning_rate:g}, momentum {settings.momentum:g}, "
            f"weight decay {settings.weight_decay:g}, seed {settings.seed}{_taught(settings)}",
        ),
        ("versions", ", ".join(f"{name} {version}" for name, version in run.versions.items())),
    ]
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs)
    return f'<h2>What it ran on</h2><dl class="facts">{items}</dl>'


_OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW"}


def _taught(settings: Settings) -> str:
    """What the float network taught, where it did."""
    if settings.distil is None:
        return ""
    return f", distilled with features {settings.distil.features:g} and logits {settings.distil.logits:g}"


def html_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "", left: Collection[int] = ()
) -> str:
    """Cells are HTML already; the columns in `left` are aligned left, as the first always is."""
    head = "".join(f"<th{_left(n, left)}>{escape(name)}</th>" for n, name in enumerate(columns))
    body = "".join(
        "<tr>" + "".join(f"<td{_left(n, left)}>{cell}</td>" for n, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _left(number: int, left: Collection[int]) -> str:
    return ' class="left"' if number in left else ""
