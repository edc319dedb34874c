"""`edgetune compress`"""

from __future__ import annotations

import json as json_
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from edgetune.cli import options
from edgetune.cli.order import Data, Model, Order, Out, names, run_folder, tell, watched
from edgetune.cli.output import table
from edgetune.cli.program import say
from edgetune.cli.setup import built, graph_of, one_batch
from edgetune.units import format_bytes

if TYPE_CHECKING:
    from edgetune.compress import Recipe, Weights
    from edgetune.contract import ArithmeticMethod
    from edgetune.graph import Graph
    from edgetune.run import Run

EXAMPLES = (
    ("edgetune compress", "the demo: a small network for digits, with signs for weights and values"),
    (
        "edgetune compress --model resnet18 --weights w.safetensors --data photos --epochs 30 --distil-logits 1",
        "your own photos; the network learns from its float self, too",
    ),
    (
        "edgetune compress --model resnet20 --data photos --val-fraction 0.2 --method dir_net --set t_max=2",
        "another method, with one of its settings changed: see `edgetune explain dir_net`",
    ),
    (
        "edgetune compress --model resnet20 --data photos --weights runs/adder/weights.safetensors --method "
        "quantized_adder --set bits=4",
        "a network that a run with --method addernet has trained, in 4 bits",
    ),
    ("edgetune compress --set activations=false --skip features.5.0", "binary weights alone, and a layer spared"),
    ("edgetune train --resume runs/resnet18-photos-1", "go on after an interruption"),
)

Method = Annotated[
    str, typer.Option("--method", metavar="NAME", help="Whose numbers the layers compute with (see `edgetune list`).")
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        show_default=False,
        help="Change a setting of the method; can be repeated. `edgetune explain NAME` tells what they mean.",
    ),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(
        "--skip", metavar="LAYER", show_default=False, help="Leave this convolution as it is; can be repeated."
    ),
]
Take = Annotated[
    list[str] | None,
    typer.Option(
        "--take",
        metavar="LAYER",
        show_default=False,
        help="Rewrite this convolution although it would be spared; can be repeated.",
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option(
        "--epochs",
        metavar="N",
        min=1,
        show_default="the method's, or 10",
        help="Passes over the training pictures.",
    ),
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        "--learning-rate", metavar="X", show_default="the method's", help="The highest of the schedule."
    ),
]
WeightDecay = Annotated[
    float | None,
    typer.Option(
        "--weight-decay", metavar="X", show_default="the method's", help="Of weights; norms and biases have none."
    ),
]
Optimizer = Annotated[
    str | None,
    typer.Option("--optimizer", metavar="sgd|adamw", show_default="the method's", help="Which steps are taken."),
]
DistilFeatures = Annotated[
    float | None,
    typer.Option(
        "--distil-features",
        metavar="X",
        min=0.0,
        show_default="0",
        help="How much the float network's maps behind its blocks count beside the labels, which count 1.",
    ),
]
DistilLogits = Annotated[
    float | None,
    typer.Option(
        "--distil-logits",
        metavar="X",
        min=0.0,
        show_default="0",
        help="How much the float network's answers count beside the labels.",
    ),
]


def compress(
    method: Method = "xnor",
    change: Changes = None,
    skip: Skip = None,
    take: Take = None,
    model: Model = None,
    weights: options.Weights = None,
    data: Data = None,
    epochs: Epochs = None,
    batch_size: options.BatchSize = 32,
    learning_rate: LearningRate = None,
    weight_decay: WeightDecay = None,
    optimizer: Optimizer = None,
    distil_features: DistilFeatures = None,
    distil_logits: DistilLogits = None,
    seed: options.Seed = 0,
    out: Out = None,
    val_fraction: options.ValFraction = None,
    size: options.Size = None,
    limit: options.Limit = None,
    skip_bad_images: options.SkipBadImages = False,
    trust_pickle: options.TrustPickle = False,
    allow_partial: options.AllowPartial = False,
    json: options.Json = None,
) -> None:
    """Rewrite a network so that its convolutions compute with few bits, and train it until it knows your pictures.

    The first convolution, the head, and what the method spares stay in float32. All layers learn, by the method's own
    recipe where nothing else is said; what is then fitted, such as the ranges of quantized_adder, is fitted to training
    pictures. The run folder is like that of `edgetune train`: `eval`, `predict`, `report`,
    `compare` and `edgetune train --resume` take it.
    """
    wanted = arithmetic_named(method, change or [])
    order = Order(
        *names(model, data),
        weights=weights,
        size=size,
        trust_pickle=trust_pickle,
        allow_partial=allow_partial,
        val_fraction=val_fraction,
        limit=limit,
        skip_bad_images=skip_bad_images,
        seed=seed,
    )
    asked = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "optimizer": optimizer,
        "distil": _distil(wanted, distil_features, distil_logits),
    }
    settings = {name: value for name, value in asked.items() if value is not None}
    folder = run_folder(out, order)
    run, layers = _train(order, wanted, (skip or [], take or []), settings, folder)
    tell(folder, run, json, more=_as_json(layers), first=layers_table(wanted.label, layers))


def arithmetic_named(name: str, changes: Sequence[str]) -> ArithmeticMethod:
    """The arithmetic method of that name, with settings such as `pad_value=0`.

    Raises PlanError for a method of another family, and for settings that it does not have or take.
    """
    from edgetune.cli.explain import find_method
    from edgetune.contract import ArithmeticMethod, known_methods
    from edgetune.errors import PlanError

    kind = find_method(name)
    if not issubclass(kind, ArithmeticMethod):
        known = sorted(each for each, other in known_methods().items() if issubclass(other, ArithmeticMethod))
        raise PlanError(f"method '{kind.method}' does not change the numbers that layers compute with, but how they "
                        f"learn: choose one of {', '.join(known)}, or use `edgetune train --method {kind.method}`")
    made = built(kind, dict(_setting(change) for change in changes), str)
    assert isinstance(made, ArithmeticMethod)
    return made


def _setting(change: str) -> tuple[str, Any]:
    """A name and its value: numbers and true or false as such, all else as text."""
    from edgetune.errors import PlanError

    name, equals, value = change.partition("=")
    if not equals:
        raise PlanError(f"--set {change} gives no value: say --set {change}=VALUE")
    try:
        return name.strip(), json_.loads(value)
    except ValueError:
        return name.strip(), value.strip()


def _distil(method: ArithmeticMethod, features: float | None, logits: float | None) -> Any:
    """How the float network teaches: by the method's own recipe unless told otherwise, and None where it does not."""
    from edgetune.distil import Distil

    given = {name: value for name, value in (("features", features), ("logits", logits)) if value is not None}
    if not given:
        return None
    own = method.recipe.get("distil") or Distil()
    return own.model_copy(update=given)


def _train(
    order: Order, method: ArithmeticMethod, chosen: tuple[list[str], list[str]], settings: dict[str, Any], folder: Path
) -> tuple[Run, tuple[Weights, ...]]:
    from edgetune.compress import recipe
    from edgetune.run import Settings

    network, pictures = order.open()
    graph = graph_of(network.model, one_batch(pictures, 1, order.seed)[0])
    made = recipe(graph, method, *chosen)
    say(_told(method, made, graph))
    epochs = {"epochs": Settings.model_fields["epochs"].default, **made.settings, **settings}["epochs"]
    noted = {**order.written_down(network), "out": folder, **settings}
    run = watched(folder, epochs, partial(made.follow, network.model, pictures, **noted))
    return run, made.weights(graph)


def _told(method: ArithmeticMethod, made: Recipe, graph: Graph) -> str:
    taken = len(made.plan.arithmetic())
    return f"{method.label} in {taken} of {taken + len(made.spared)} convolutions"


def layers_table(method: str, layers: Sequence[Weights]) -> Table:
    """Which layers were rewritten, why others were not, and what their weights take before and after."""
    rows = [
        (
            layer.layer,
            method if layer.spared is None else f"float32: {layer.spared}",
            str(layer.count),
            format_bytes(layer.float_bytes),
            format_bytes(layer.bytes),
        )
        for layer in layers
    ]
    float_bytes, few_bytes = (sum(layer.float_bytes for layer in layers), sum(layer.bytes for layer in layers))
    ratio = f"{float_bytes / few_bytes:.1f}x" if few_bytes else ""
    total = ("total", ratio, str(sum(layer.count for layer in layers)), format_bytes(float_bytes),
             format_bytes(few_bytes))
    return table("weights", ("layer", "arithmetic", "weights", "as float32", "in bits"), rows, last=total)


def _as_json(layers: Sequence[Weights]) -> dict[str, Any]:
    rows = [
        {
            "layer": layer.layer,
            "rewritten": layer.spared is None,
            "spared": layer.spared,
            "weights": layer.count,
            "weight_bits": layer.bits,
            "float_bytes": layer.float_bytes,
            "packed_bytes": layer.bytes,
        }
        for layer in layers
    ]
    return {
        "layers": rows,
        "float_bytes": sum(layer.float_bytes for layer in layers),
        "packed_bytes": sum(layer.bytes for layer in layers),
    }
