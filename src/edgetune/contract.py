"""What a method promises, and what a plan says. The hosts rely on nothing else.

A method is a frozen settings record with a name. It comes in one of two shapes:

    LayerMethod     save(x, geometry) -> kept;  receive(gy, geometry) -> g;
                    grad_input(g, weight, geometry) -> gx;  grad_weight(kept, g, geometry) -> gw
    ArithmeticMethod    quantize_weight(weight, progress), quantize_activation(x, progress), with gradients of their
                    own, and convolve(x, weight, geometry, progress) -> y: the layer's answer changes; with `fits`
                    fitted(x) -> settings, once the layer is trained; unpacked() -> why it has no packed form

Either may take runs of calls as one: claim(graph, plan) -> segments, each with a Rule: forward -> outputs, kept;
backward -> gradients. A KeptMethod stands beside them: it says how what is kept is held, as `codec(state)` does, or
what of it is not held but made again.

Subclasses register themselves by name; `edgetune.methods` imports every file of its folders.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import SerializeAsAny, ValidationError, field_serializer, field_validator
from torch import nn

from edgetune.codecs import Codec
from edgetune.errors import PlanError
from edgetune.graph import Call, Graph
from edgetune.overlap import ConvGeometry
from edgetune.record import Frozen, Record

Tensors = Mapping[str, torch.Tensor]
Kept = torch.Tensor | Tensors
"""What stays of a layer's input: one tensor, or some by name."""
REGISTRY: dict[str, type[Method]] = {}
HEADINGS = ("What it does", "Shapes", "What is kept (bytes)", "What changes in the gradient or the answer",
            "When not to use", "Reference")


class Method(Frozen):
    """Settings of one method on one layer; units stand in the field names."""

    method: ClassVar[str] = ""
    family: ClassVar[Literal["backward", "kept", "arithmetic", "structure"]] = "backward"
    forward_is: ClassVar[Literal["identical", "bounded", "changed"]] = "identical"
    learns_as: ClassVar[Mapping[str, str]] = {}
    """Role -> the role that learns in its place: a parameter that `prepare` gives to the layer."""
    rewrites: ClassVar[bool] = False
    """Whether the plan gives it to blocks (see `edgetune.blocks`), whose layers `rewrite` changes."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        if not cls.__dict__.get("method"):
            return
        known = REGISTRY.get(cls.method)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise TypeError(f"two methods call themselves '{cls.method}': {known.__module__} and {cls.__module__}")
        REGISTRY[cls.method] = cls

    @classmethod
    def explain(cls) -> str:
        """The method's page: the docstring of its file, under the six headings."""
        return inspect.getdoc(inspect.getmodule(cls)) or ""

    def refuse(self, call: Call) -> str | None:
        """Why this layer cannot be taken, as "reason: way out", or None."""
        return None

    @property
    def label(self) -> str:
        """The method and what matters of its settings, in a few words for tables and legends."""
        return self.method.replace("_", " ")

    def exact_on(self, graph: Graph) -> bool:
        """Whether on this network every gradient that the method computes is the exact one, or a part of it."""
        return False

    def idle_on(self, graph: Graph) -> str | None:
        """Why on this network it would do nothing that is its own, as "reason: way out", or None."""
        return None

    def part(self, weight: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
        """What of weight (o i u v) learns: a view of it, all of it unless another parameter learns in its place."""
        return weight

    def placed(self, worth: torch.Tensor, geometry: ConvGeometry) -> Method:
        """The same method, its part where `worth` (o i u v), such as a weight or its gradient, has most energy."""
        return self

    @classmethod
    def claim(cls, graph: Graph, plan: Plan) -> list[Segment]:
        """The runs of calls that methods of this kind take as one, of the layers which the plan gives to them."""
        return []

    def state_of(self, call: Call) -> dict[str, torch.Tensor]:
        """What the method remembers of a layer from step to step, as it is at first: role -> tensor.

        The layer holds it in buffers that its state_dict leaves out, so copies of the model have their own.
        """
        return {}

    def rewrite(self, module: nn.Module, block: Call) -> Callable[[], None]:
        """Change the layers of a block, before the network is traced for its plan; returns the way back.

        What was there keeps its names and its answer. Copies of the model compute with their own parameters.
        """
        raise TypeError(f"method '{self.method}' declares no rewrite")

    def last_blocks(self, graph: Graph, count: int | None) -> Plan:
        """The plan in which the last `count` blocks (None: all) are rewritten, and what learns then."""
        raise TypeError(f"method '{self.method}' rewrites no blocks")

    def prepare(self, module: nn.Module, call: Call) -> Callable[[], None]:
        """Give a layer the parameters of `learns_as`, before anything is routed; returns the way back."""
        raise TypeError(f"method '{self.method}' lets other parameters learn, but declares no prepare")


class LayerMethod(Method):
    """A method that changes what one convolution keeps for backward and how its gradients are computed."""

    def save(self, x: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
        """What stays of the input x (n c h w) until backward."""
        return x

    def keep(self, x: torch.Tensor, geometry: ConvGeometry, state: Tensors) -> Kept:
        """The same for methods with a state (see `state_of`), which it may change in place."""
        return self.save(x, geometry)

    def rule(self, call: Call) -> Rule | None:
        """What goes forward and backward in this convolution, where that is more than the host makes of the method."""
        return None

    def receive(self, gy: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
        """What both gradients need of gy (n o h w), computed once."""
        return gy

    def grad_input(self, g: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
        """The gradient of the input, gx (n c h w), from what `receive` gave."""
        raise TypeError(f"method '{self.method}' declares no grad_input")

    def grad_weight(self, kept: Any, g: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
        """The gradient of the weight, gw (o i u v), from what `save` or `keep`, and `receive` gave."""
        raise TypeError(f"method '{self.method}' declares no grad_weight")

    def gradients(self, kept: Any, g: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry,
                  wants_input: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """gx if wanted and, where something was kept, gw: for methods whose two gradients share work."""
        return (self.grad_input(g, weight, geometry) if wants_input else None,
                None if kept is None else self.grad_weight(kept, g, geometry))


@dataclass(frozen=True)
class Needs:
    """Which gradients autograd asks for: one flag an input, and the names of the parameters."""

    inputs: tuple[bool, ...]
    params: frozenset[str]


class Rule(Protocol):
    """The forward and backward of a segment, as pure functions on tensors."""

    def forward(self, segment: Segment, xs: Sequence[torch.Tensor], params: Tensors,
                needs: Needs) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
        """Outputs, and the named tensors to keep for backward."""
        ...

    def backward(self, segment: Segment, kept: Tensors, gys: Sequence[torch.Tensor | None], params: Tensors,
                 needs: Needs) -> tuple[tuple[torch.Tensor | None, ...], dict[str, torch.Tensor]]:
        """Gradients of the inputs, and of the parameters by name."""
        ...


@dataclass(frozen=True)
class Segment:
    """A run of calls that goes forward and backward as one.

    `inputs` and `outputs` are node names, `params` the qualified names of the tensors it reads, `state` of those that
    it changes as well (see `Method.state_of`); it holds no modules. A rule finds both under `params`.
    """

    rule: Rule = field(repr=False)
    calls: tuple[Call, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    params: tuple[str, ...]
    state: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The layers it spans, for messages and listings."""
        first, last = self.calls[0].name, self.calls[-1].name
        return first if first == last else f"{first} ... {last}"


UNNAMED = "x"
"""The one value that a call reads inside a submodule that could not be followed."""


def one_call(rule: Rule, call: Call) -> Segment:
    """A segment of a single call."""
    return Segment(rule=rule, calls=(call,), inputs=call.inputs or (UNNAMED,), outputs=(call.node,),
                   params=tuple(call.params.values()), state=tuple(call.state.values()))


_DRAWS_NOTHING = frozenset({"conv", "linear", "norm", "activation", "max_pool", "mean", "add", "scale", "subsample",
                            "pad", "flatten"})


@dataclass(frozen=True)
class Stretch:
    """Calls that follow one another and run again in backward: of all of them only what they read is kept."""

    calls: tuple[Call, ...]

    @property
    def name(self) -> str:
        """The first of its layers, for messages and listings."""
        return next((call.name for call in self.calls if call.params), self.calls[0].name)

    @property
    def may_draw(self) -> bool:
        """Whether there may be a call in it that draws numbers, which must be the same ones again."""
        return any(call.kind not in _DRAWS_NOTHING for call in self.calls)


class ArithmeticMethod(Method):
    """A method that changes the numbers a convolution computes with, in training and ever after.

    The layer becomes an `edgetune.hosts.arithmetic.ArithmeticConv2d`, which keeps its parameters and their names.
    `progress` () is the share of the training that is over, 0..1; 1 in a trained network.
    """

    family = "arithmetic"
    forward_is = "changed"
    recipe: ClassVar[Mapping[str, Any]] = {}
    """How a network by this method is trained unless someone says otherwise: settings of `edgetune.train`."""
    clips: ClassVar[bool] = False
    """Whether activations in front become clips to -1 and 1, and pools move in front of their norms."""
    fits: ClassVar[bool] = False
    """Whether settings are fitted to what a trained layer reads (`fitted`), and norms estimated anew after that."""

    @property
    def weight_bits(self) -> int:
        """Bits of a weight in the packed network."""
        return 32

    @property
    def activation_bits(self) -> int:
        """Bits of what the layer reads in the packed network."""
        return 32

    def refuse(self, call: Call) -> str | None:
        return None if call.kind == "conv" else f"is a {call.kind}, not a convolution: leave it out of the plan"

    def spares(self, call: Call) -> str | None:
        """Why a convolution is better left as it is unless someone asks for it, or None."""
        return None

    def quantize_weight(self, weight: torch.Tensor, progress: torch.Tensor) -> torch.Tensor:
        """What the layer multiplies by in place of weight (o i u v); the gradient is the method's surrogate."""
        return weight

    def quantize_activation(self, x: torch.Tensor, progress: torch.Tensor) -> torch.Tensor:
        """What the layer reads in place of x (n c h w); the gradient is the method's surrogate."""
        return x

    def convolve(self, x: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry,
                 progress: torch.Tensor) -> torch.Tensor:
        """x (n c h w), weight (o i u v) -> y (n o p q), differentiable: the layer's answer but for its bias."""
        raise TypeError(f"method '{self.method}' declares no convolve")

    def unpacked(self) -> str | None:
        """Why a layer by these settings has no packed form, as "reason: way out", or None where it has one."""
        return "has no packed form: run the network as it was trained"

    def fitted(self, x: torch.Tensor) -> ArithmeticMethod:
        """The same method, its settings fitted to a batch x (n c h w) of what the layer reads, beside those before."""
        return self

class KeptMethod(Method):
    """A method that leaves gradients to others, and says how what a layer keeps is held until backward."""

    family = "kept"

    @classmethod
    def choices(cls) -> tuple[KeptMethod, ...]:
        """The settings that a planner weighs."""
        return (cls(),)

    @classmethod
    def stretches(cls, graph: Graph, plan: Plan) -> list[Stretch]:
        """What is to run again in backward, around the segments of all methods; in the order of the graph."""
        return []


class CodedMethod(KeptMethod):
    """What a layer keeps is written by a codec, once for all that read it."""

    def codec(self, x: torch.Tensor | None, state: Tensors) -> Codec:
        """How the values x (n ...) are written, or with None how bytes are read. `state` is that of the layer which
        reads the values (see `state_of`), by role; empty where none does."""
        raise TypeError(f"method '{self.method}' declares no codec")

    def learn(self, x: torch.Tensor, gy: torch.Tensor, gw: torch.Tensor, state: Tensors) -> None:
        """Look at what a convolution made of the values x (n c h w) that it read: gy (n o h w), gw (o i u v)."""


class Plan(Record):
    """Which layers learn, and how each one's gradient is computed: a file a person can read, diff and edit.

    `layers` maps a layer, or a block, to its stack of method settings, `learns` a layer to the parameters that train
    (weight, bias); what is in neither is frozen. `micro_batch` samples go through at a time, None meaning all. Batch
    norms keep their running statistics ("frozen") or take those of each batch and go on learning them ("batch").
    """

    input_shape: tuple[int, ...]
    layers: dict[str, tuple[SerializeAsAny[Method], ...]] = {}
    learns: dict[str, tuple[str, ...]] = {}
    micro_batch: int | None = None
    norms: Literal["frozen", "batch"] = "frozen"

    @field_validator("layers", mode="before")
    @classmethod
    def _read_methods(cls, layers: Any) -> Any:
        if not isinstance(layers, Mapping):
            return layers
        return {name: tuple(_read_method(name, entry) for entry in stack) for name, stack in layers.items()}

    @field_serializer("layers")
    def _write_methods(self, layers: dict[str, tuple[Method, ...]]) -> dict[str, list[dict[str, Any]]]:
        return {name: [{"method": m.method, **m.model_dump()} for m in stack] for name, stack in layers.items()}

    def settings(self, layer: str, family: type[Method]) -> Method | None:
        """The settings of `family` (a class) that the plan gives to a layer, or None."""
        return next((m for m in self.layers.get(layer, ()) if isinstance(m, family)), None)

    def rewritten(self) -> dict[str, tuple[Method, ...]]:
        """The blocks that methods rewrite, with those methods."""
        stacks = {name: tuple(m for m in stack if m.rewrites) for name, stack in self.layers.items()}
        return {name: stack for name, stack in stacks.items() if stack}

    def arithmetic(self) -> dict[str, ArithmeticMethod]:
        """The layers whose numbers a method changes, with that method."""
        found = {name: self.settings(name, ArithmeticMethod) for name in self.layers}
        return {name: method for name, method in found.items() if isinstance(method, ArithmeticMethod)}

    def listed(self) -> frozenset[str]:
        """Qualified names of the parameters under `learns`."""
        return frozenset(qualified(layer, role) for layer, roles in self.learns.items() for role in roles)

    def learned(self) -> frozenset[str]:
        """Qualified names of the parameters that train: those under `learns`, or what a method puts in their place."""
        return frozenset(qualified(layer, self.stand_ins(layer).get(role, role))
                         for layer, roles in self.learns.items() for role in roles)

    def stand_ins(self, layer: str) -> dict[str, str]:
        """The roles of a layer that learn through another parameter: role -> that one's role."""
        return {role: other for method in self.layers.get(layer, ()) for role, other in method.learns_as.items()
                if role in self.learns.get(layer, ())}


def qualified(layer: str, role: str) -> str:
    """The name of a layer's parameter as the model knows it; the model itself is the layer ''."""
    return f"{layer}.{role}" if layer else role


def known_methods() -> dict[str, type[Method]]:
    """Every method by name; the folders are walked on first need."""
    importlib.import_module("edgetune.methods")
    return REGISTRY


def _read_method(layer: str, entry: Any) -> Method:
    if isinstance(entry, Method):
        return entry
    known_methods()
    if not isinstance(entry, Mapping) or entry.get("method") not in REGISTRY:
        named = entry.get("method") if isinstance(entry, Mapping) else entry
        raise PlanError(f"the plan gives layer '{layer}' the method '{named}', which is not known: "
                        f"choose from {', '.join(sorted(REGISTRY))}")
    given = dict(entry)
    kind = REGISTRY[given.pop("method")]
    try:
        return kind(**given)
    except ValidationError as failure:
        first = failure.errors()[0]
        raise PlanError(f"the plan's settings of '{kind.method}' for layer '{layer}' do not hold: "
                        f"{'.'.join(map(str, first['loc']))}: {first['msg']}; mend that entry") from failure
