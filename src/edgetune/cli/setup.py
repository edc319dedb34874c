"""From what a person writes after --model, --weights, --data and --method to a network, pictures and a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.cli.program import say
from edgetune.units import parse_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

    from edgetune.contract import KeptMethod, Method, Plan
    from edgetune.data import Dataset, Preprocess
    from edgetune.graph import Graph
    from edgetune.plan import Budget, Planner
    from edgetune.prospect import Found

DEMO_MODEL, DEMO_DATA = "digits_net", "digits"


@dataclass(frozen=True)
class Network:
    """A network ready to be adapted: its head fits the classes, and `story` says in a line where it comes from."""

    model: nn.Module
    weights: Path | None
    story: str


def preprocess_for(name: str, size: int | None) -> Preprocess:
    """The pictures that a network expects, at another size where asked for. Raises ModelError for an unknown name."""
    from edgetune.data import Preprocess
    from edgetune.models import model_card

    recipe = Preprocess.from_input(model_card(name).input)
    return recipe if size is None else recipe.model_copy(update={"size": (size, size)})


def open_network(
    name: str,
    weights: Path | None,
    classes: int | None,
    *,
    trust_pickle: bool = False,
    allow_partial: bool = False,
    seed: int = 0,
) -> Network:
    """Build a network, load its weights, and give it a head for `classes` (None: the one it comes with).

    Raises ModelError for an unknown name and WeightsError for a file that does not fit.
    """
    import torch

    from edgetune.models import head_classes, load_model, load_weights, replace_head, shipped_weights

    torch.manual_seed(seed)
    model = load_model(name, classes)
    path = weights if weights is not None else shipped_weights(name)
    if classes is not None and head_classes(model) != classes:
        replace_head(model, classes, seed=seed)
    if path is None:
        return Network(model, None, f"{name}, from random weights: name pretrained ones with --weights")
    loaded = load_weights(model, path, trust_pickle, allow_partial)
    story = f"{name}, {loaded.loaded} tensors from {path.name}"
    if loaded.head is not None and not loaded.head_loaded:
        count = head_classes(model)
        replace_head(model, count, seed=seed)
        theirs = "another" if loaded.file_classes is None else f"{loaded.file_classes} classes"
        story += f"; its head ({theirs}) is replaced by a new one for {count} classes"
    return Network(model, path, story)


def one_batch(data: Dataset, batch_size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pictures a plan is calibrated and costs are measured on: x (n c h w) and y (n)."""
    from edgetune.data import batches

    return next(batches(data.train, min(batch_size, len(data.train)), seed=seed))


def built(kind: type[Method], settings: dict[str, Any], spelt: Callable[[str], str]) -> Method:
    """A method with these settings, each `spelt` in messages as on the command line.

    Raises PlanError naming a setting that it does not have, or a value that it does not take.
    """
    from pydantic import ValidationError

    from edgetune.errors import PlanError

    if strangers := sorted(set(settings) - set(kind.model_fields)):
        raise PlanError(
            f"method '{kind.method}' has no {spelt(strangers[0])}: it takes "
            f"{', '.join(spelt(field) for field in kind.model_fields) or 'no settings'}"
        )
    try:
        return kind(**settings)
    except ValidationError as failure:
        first = failure.errors()[0]
        option = spelt(".".join(map(str, first["loc"])))
        raise PlanError(
            f"{option} {first['input']} does not hold for method '{kind.method}' ({first['msg']}): "
            f"see `edgetune explain {kind.method}`"
        ) from failure


def method_named(name: str, **settings: Any) -> Method:
    """A method with those of `settings` that are given. Raises PlanError for a setting that it does not take."""
    from edgetune.cli.explain import find_method

    given = {key: value for key, value in settings.items() if value is not None}
    return built(find_method(name), given, lambda field: "--" + field.replace("_", "-"))


@dataclass(frozen=True)
class Wish:
    """What a person says of the plan: a file, a method by hand, a published scheme, or a budget for the planner;
    nothing means a quarter of the training memory of plain back-propagation."""

    memory: str | None = None
    step_ms: float | None = None
    method: str | None = None
    patch_px: int | None = None
    taps: str | None = None
    last: int | None = None
    last_blocks: int | None = None
    file: Path | None = None
    scheme: str | None = None
    kept: str | None = None
    hold: str | None = None

    @property
    def by_hand(self) -> bool:
        by_hand = (self.method, self.patch_px, self.taps, self.last, self.last_blocks)
        return any(value is not None for value in by_hand)

    def check(self) -> None:
        """Refuse wishes that contradict each other, and budgets that are none, before anything is loaded."""
        from edgetune.errors import BudgetError, PlanError

        planner = self.memory is not None or self.step_ms is not None
        if self.file is not None and (planner or self.by_hand):
            raise PlanError(
                "--plan names a finished plan: leave out --memory, --step-ms, --method, --patch-px, --taps, --last "
                "and --last-blocks"
            )
        if self.file is not None and self.hold is not None:
            raise PlanError("--plan names a finished plan, which says itself how values are held: leave out --hold")
        if self.by_hand and planner:
            raise PlanError(
                "--method, --patch-px, --taps, --last and --last-blocks make the plan by hand: leave out --memory and "
                "--step-ms, which the planner would keep to"
            )
        if self.method is not None:
            _refuse_arithmetic(self.method)
        if self.last is not None and self.last_blocks is not None:
            raise PlanError("--last counts convolutions and --last-blocks blocks: give one of them")
        if self.scheme is not None and (planner or self.by_hand):
            raise PlanError(
                "--scheme names a published plan: leave out --memory, --step-ms, --method, --patch-px, --taps, "
                "--last and --last-blocks"
            )
        if self.kept is not None:
            if self.method != "asi" or self.last_blocks is not None:
                raise PlanError("--kept chooses the ranks of asi: say --method asi, with --last or without")
            parse_bytes(self.kept)
        if self.hold is not None:
            hold_named(self.hold)
        if self.memory is not None:
            parse_bytes(self.memory)
        if self.step_ms is not None and self.step_ms <= 0:
            raise BudgetError(
                f"--step-ms {self.step_ms:g} leaves no time at all: give a positive number of milliseconds"
            )


def _refuse_arithmetic(name: str) -> None:
    from edgetune.cli.explain import find_method
    from edgetune.errors import PlanError

    kind = find_method(name)
    if kind.family == "arithmetic":
        raise PlanError(f"method '{kind.method}' changes the numbers that layers compute with, not how they learn: "
                        f"use `edgetune compress --method {kind.method}`")


@dataclass(frozen=True)
class Planned:
    """A plan, the budget it was made under and, where the planner made it, the planner and its choice."""

    plan: Plan
    budget: Budget
    planner: Planner | None = None
    found: Found | None = None


def make_plan(model: nn.Module, x: torch.Tensor, y: torch.Tensor, wish: Wish) -> tuple[Plan, Budget]:
    """The plan for a network and a batch x (n c h w), y (n), with the budget that it was made under."""
    made = planned(model, x, y, wish)
    return made.plan, made.budget


def planned(model: nn.Module, x: torch.Tensor, y: torch.Tensor, wish: Wish) -> Planned:
    """The same, with the planner that can say more of it."""
    from edgetune.contract import Plan
    from edgetune.draft import held_by
    from edgetune.errors import PlanError
    from edgetune.methods.backward.checkpoint import Checkpoint
    from edgetune.plan import Budget, Planner, best
    from edgetune.stretches import checkpointed

    wish.check()
    if wish.file is not None:
        import edgetune.methods  # noqa: F401  (methods register themselves)

        return Planned(Plan.load(wish.file, PlanError), Budget())
    hold = None if wish.hold is None else hold_named(wish.hold)
    if wish.by_hand or wish.scheme is not None:
        graph = graph_of(model, x)
        made = _without_planner(model, graph, (x, y), wish)
        if isinstance(hold, Checkpoint):
            return Planned(checkpointed(model, x, made, graph=graph), Budget())
        return Planned(held_by(made, graph, hold), Budget())
    again, holds = isinstance(hold, Checkpoint), () if hold is None else hold.choices()
    planners = [Planner(model, x, (x, y), progress=say, hold=own, recompute=again) for own in (None, *holds)]
    if wish.memory is None and wish.step_ms is None:
        return _planned_by_default(planners, model, x)
    budget = Budget(memory_bytes=None if wish.memory is None else parse_bytes(wish.memory), step_ms=wish.step_ms)
    planner, found = best(planners, budget)
    return Planned(found.made, budget, planner, found)


def hold_named(name: str) -> KeptMethod:
    """The method that says how what is kept is held. Raises PlanError where the name is of no such method."""
    from edgetune.contract import KeptMethod, known_methods
    from edgetune.errors import PlanError

    method = method_named(name)
    if not isinstance(method, KeptMethod):
        known = sorted(each for each, kind in known_methods().items() if issubclass(kind, KeptMethod))
        raise PlanError(f"--hold names how kept values are held, and '{method.method}' says nothing of that: "
                        f"choose from {', '.join(known)}")  # fmt: skip
    return method


def _without_planner(model: nn.Module, graph: Graph, batch: tuple[torch.Tensor, torch.Tensor], wish: Wish) -> Plan:
    """A published scheme, ranks chosen for a number of bytes, or one method for all."""
    from edgetune.lowrank import choose_ranks
    from edgetune.sparse import released_plan

    if wish.scheme is not None:
        return released_plan(model, graph, wish.scheme)
    if wish.kept is not None:
        return choose_ranks(model, batch, parse_bytes(wish.kept), last=wish.last, graph=graph)
    return _by_hand(graph, wish)


def _by_hand(graph: Graph, wish: Wish) -> Plan:
    """One method for every layer that learns. Raises PlanError where it would do nothing, or the network has less."""
    from edgetune.errors import PlanError
    from edgetune.methods.backward.mobiletl import last_blocks
    from edgetune.plan import last_layers

    usual = "pooled_chain" if wish.last_blocks is None else "mobiletl"
    method = method_named(wish.method or usual, patch_px=wish.patch_px, taps=wish.taps)
    if (reason := method.idle_on(graph)) is not None:
        raise PlanError(reason)
    if method.rewrites and wish.last is not None:
        raise PlanError(f"method '{method.method}' is given to blocks: say how many with --last-blocks, not --last")
    if method.rewrites:
        return method.last_blocks(graph, wish.last_blocks)
    if wish.last_blocks is not None:
        return last_blocks(graph, wish.last_blocks, method)
    return last_layers(graph, wish.last, method)


DEFAULT_SHARES = (0.25, 0.5, 1.0)
"""What training may take when nothing is said, as shares of plain back-propagation: the first that is enough."""


def _planned_by_default(planners: Sequence[Planner], model: nn.Module, x: torch.Tensor) -> Planned:
    import copy

    from edgetune.costs import unrestrained
    from edgetune.errors import BudgetError
    from edgetune.plan import Budget, best
    from edgetune.profile import profile

    plain = profile(unrestrained(copy.deepcopy(model)), x).peak_bytes
    for share in DEFAULT_SHARES:
        budget = Budget(memory_bytes=int(share * plain))
        try:
            planner, found = best(planners, budget)
            return Planned(found.made, budget, planner, found)
        except BudgetError:  # a very small network: its head alone needs a good part
            if share == DEFAULT_SHARES[-1]:
                raise
    raise AssertionError("the last share either fits or is refused")


def graph_of(model: nn.Module, x: torch.Tensor) -> Graph:
    """The network as its calls on a batch x (n c h w)."""
    from edgetune.graph import trace

    return trace(model, x)
