"""The host of runs whose kept values are written by a codec: forward and backward exact, part by part.

A value that several parts read in backward is written once. What an activation or a product gave is made again from
what was written of its inputs. Values in front of a convolution are written as that layer's method says, with what it
remembers of the layer; after backward it may look at what the values did (`CodedMethod.learn`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from edgetune import kernels
from edgetune.contract import UNNAMED, CodedMethod, LayerMethod, Needs, Plan, Segment, Tensors
from edgetune.graph import Call, Graph
from edgetune.hosts.conv import state_of
from edgetune.hosts.cursor import working_on
from edgetune.hosts.parts import can_join, parts_of
from edgetune.hosts.pointwise import activate
from edgetune.hosts.runs import convex_runs, segment_of
from edgetune.hosts.values import live_values
from edgetune.recognise import SMOOTH

SMALL_BYTES = 1024
"""Values that take no more are kept as they are."""


@dataclass(frozen=True)
class Owner:
    """Whose method writes a value; `call` is the convolution that reads it, None where none does."""

    method: CodedMethod
    call: Call | None = None

    def state(self, params: Tensors) -> Tensors:
        """What is remembered of the layer that reads the value."""
        return {} if self.call is None else state_of(self.call, params)


@dataclass(frozen=True)
class CodedRule:
    """Forward part by part; backward part by part, from values decoded for as long as a part still reads them.

    `owners` and `recipes` are by node: who writes its value, and which activation or product can make it again.
    """

    parts: tuple[Segment, ...]
    owners: Mapping[str, Owner]
    recipes: Mapping[str, Call]

    def forward(self, segment: Segment, xs: Sequence[torch.Tensor], params: Tensors,
                needs: Needs) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
        live, values = live_values(segment, needs), dict(zip(segment.inputs, xs, strict=True))
        last_use = {node: part.outputs[0] for part in self.parts for node in part.inputs}
        book = _Writer(self, params)
        for part in self.parts:
            working_on(part.calls[-1])
            ys, kept = part.rule.forward(part, [values[node] for node in part.inputs], params,
                                         _part_needs(part, live, needs))
            values[part.outputs[0]] = ys[0]
            book.write(part, kept, values)
            for node in part.inputs:
                if last_use[node] == part.outputs[0] and node not in segment.outputs:
                    values.pop(node, None)
        return tuple(values[node] for node in segment.outputs), book.kept

    def backward(self, segment: Segment, kept: Tensors, gys: Sequence[torch.Tensor | None], params: Tensors,
                 needs: Needs) -> tuple[tuple[torch.Tensor | None, ...], dict[str, torch.Tensor]]:
        live, grads = live_values(segment, needs), dict[str, torch.Tensor]()
        flows = {node: gy for node, gy in zip(segment.outputs, gys, strict=True) if gy is not None}
        book = _Reader(self, kept)
        for part in reversed(self.parts):
            if part.outputs[0] in live and part.outputs[0] in flows:
                working_on(part.calls[-1])
                for name, grad in self._back(part, book, flows, params, _part_needs(part, live, needs)).items():
                    grads[name] = grads[name] + grad if name in grads else grad
        return tuple(flows.get(node) if wanted else None
                     for node, wanted in zip(segment.inputs, needs.inputs, strict=True)), grads

    def _back(self, part: Segment, book: _Reader, flows: dict[str, torch.Tensor], params: Tensors,
              needs: Needs) -> dict[str, torch.Tensor]:
        """Take the gradient of a part's output out of `flows` and add those of its inputs; its parameters' gradients.

        Who calls holds no map that backward may let go of meanwhile.
        """
        given, learner = book.read(part), self._learner(part)
        gy = None if learner is None else flows[part.outputs[0]]
        gxs, found = part.rule.backward(part, given, (flows.pop(part.outputs[0]),), params, needs)
        gw = found.get(part.calls[-1].params.get("weight", ""))
        if learner is not None and gy is not None and gw is not None and "x" in given:
            learner.method.learn(given["x"], gy, gw, learner.state(params))
        for source, gx in zip(part.inputs, gxs, strict=True):
            if gx is not None:
                flows[source] = flows[source] + gx if source in flows else gx
        return found

    def _learner(self, part: Segment) -> Owner | None:
        """Who writes what a convolution reads, and may look at what came of it."""
        owner = self.owners.get(part.inputs[0])
        return owner if owner is not None and owner.call == part.calls[-1] else None


def _part_needs(part: Segment, live: frozenset[str], needs: Needs) -> Needs:
    return Needs(tuple(node in live for node in part.inputs), needs.params & set(part.params))


@dataclass
class _Writer:
    """Fills `kept`, by names. `PART>NAME` is a tensor of a part's own, `PART>NAME=VALUE` says that it is a value;
    `raw:VALUE` is that value as it is, or `code:VALUE` its bytes and `like:VALUE` an empty tensor of its type, whose
    shape is that of the value, 0, and 1 if it lies channels last."""

    rule: CodedRule
    params: Tensors
    kept: dict[str, torch.Tensor] = field(default_factory=dict)

    def write(self, part: Segment, kept: Tensors, values: Tensors) -> None:
        """Put down what a part keeps; what is a value of the run is written once for all."""
        nodes = {id(value): node for node, value in values.items()}
        for name, tensor in kept.items():
            key = f"{part.outputs[0]}>{name}"
            if (node := nodes.get(id(tensor))) is not None:
                self._value(node, values)
                self.kept[f"{key}={node}"] = tensor.new_empty(0)
            elif tensor.is_floating_point() and not _is_small(tensor):
                owner = self.rule.owners[part.inputs[0]]
                self._code(key, tensor, Owner(owner.method))
                self.kept[f"{key}={key}"] = tensor.new_empty(0)
            else:
                self.kept[key] = tensor

    def _value(self, node: str, values: Tensors) -> None:
        if _is_written(node, self.kept):
            return
        recipe = self.rule.recipes.get(node)
        if recipe is not None and all(of in values or _is_written(of, self.kept) for of in recipe.inputs):
            for of in recipe.inputs:
                self._value(of, values)
        elif _is_small(values[node]):
            self.kept[f"raw:{node}"] = values[node]
        else:
            self._code(node, values[node], self.rule.owners[node])

    def _code(self, name: str, x: torch.Tensor, owner: Owner) -> None:
        last = kernels.is_channels_last(x)
        rows = (x.permute(0, 2, 3, 1) if last else x.contiguous()).float()
        self.kept[f"code:{name}"] = owner.method.codec(rows, owner.state(self.params)).encode(rows)
        self.kept[f"like:{name}"] = x.new_empty((*x.shape, 0, int(last)))


def _is_small(x: torch.Tensor) -> bool:
    return x.numel() * x.element_size() <= SMALL_BYTES


def _is_written(node: str, kept: Tensors) -> bool:
    return f"raw:{node}" in kept or f"code:{node}" in kept


class _Reader:
    """Gives parts what they kept; a value stays decoded until the last part that reads it has been served."""

    def __init__(self, rule: CodedRule, kept: Tensors) -> None:
        self.rule, self.kept, self.decoded = rule, kept, dict[str, torch.Tensor]()
        self.entries: dict[str, dict[str, str]] = {}
        for key in kept:
            part, arrow, entry = key.partition(">")
            if arrow:
                name, _, node = entry.partition("=")
                self.entries.setdefault(part, {})[name] = node
        self.uses = Counter(of for entries in self.entries.values() for node in entries.values() if node
                            for of in self._written(node))

    def read(self, part: Segment) -> dict[str, torch.Tensor]:
        """What the part's own forward kept, by name."""
        out = part.outputs[0]
        return {name: self._value(node) if node else self.kept[f"{out}>{name}"]
                for name, node in self.entries.get(out, {}).items()}

    def _written(self, node: str) -> list[str]:
        """The written values from which a value comes."""
        if _is_written(node, self.kept):
            return [node]
        return [of for source in self.rule.recipes[node].inputs for of in self._written(source)]

    def _value(self, node: str) -> torch.Tensor:
        if not _is_written(node, self.kept):
            recipe = self.rule.recipes[node]
            sources = [self._value(of) for of in recipe.inputs]
            return sources[0] * sources[1] if recipe.kind == "scale" else activate(recipe.function, sources[0])
        if node not in self.decoded:
            self.decoded[node] = self._decode(node)
        self.uses[node] -= 1
        return self.decoded[node] if self.uses[node] else self.decoded.pop(node)

    def _decode(self, node: str) -> torch.Tensor:
        if f"raw:{node}" in self.kept:
            return self.kept[f"raw:{node}"]
        like = self.kept[f"like:{node}"]
        *shape, _, last = like.shape
        order = [shape[0], *shape[2:], shape[1]] if last else shape
        owner = self.rule.owners[node.partition(">")[0]]
        rows = owner.method.codec(None, {}).decode(self.kept[f"code:{node}"], order).to(like.dtype)
        return rows.permute(0, 3, 1, 2) if last else rows


def coded_runs(graph: Graph, plan: Plan, kind: type[CodedMethod], otherwise: LayerMethod) -> list[Segment]:
    """The runs around the convolutions which the plan gives to methods of this kind, each a segment of its own.

    `otherwise` computes the gradients of those for which the plan names no other method.
    """
    methods = {call.node: own for call in graph.layers("conv")
               if isinstance(own := plan.settings(call.name, kind), kind)}
    inner = {call.node for call in graph.calls if call.node in methods and call.followed}
    runs = convex_runs(graph, inner | {call.node for call in graph.calls if can_join(call, graph)}, anchors=inner)
    alone = [(call,) for call in graph.layers("conv") if call.node in methods and not call.followed]
    return [segment_of(run, _rule(run, plan, methods, otherwise)) for run in (*runs, *alone)]


def _rule(run: tuple[Call, ...], plan: Plan, methods: Mapping[str, CodedMethod], otherwise: LayerMethod) -> CodedRule:
    def gradients_of(call: Call) -> LayerMethod:
        own = plan.settings(call.name, LayerMethod)
        return own if isinstance(own, LayerMethod) else otherwise

    parts = parts_of(run, gradients_of, plan.learned(), _any(run, methods).codec(None, {}).keeps_zeros)
    recipes = {call.node: call for call in run if call.kind == "scale" or call.function in SMOOTH}
    return CodedRule(parts, _owners(run, methods), recipes)


def _owners(run: tuple[Call, ...], methods: Mapping[str, CodedMethod]) -> dict[str, Owner]:
    """Who writes each value: the convolution that reads it, else the last one in front of it."""
    owners, method = dict[str, Owner](), _any(run, methods)
    for call in run:
        method = methods.get(call.node, method)
        owners[call.node] = Owner(method)
        for node in call.inputs:
            owners.setdefault(node, Owner(method))
    for call in reversed(run):
        if call.kind == "conv":
            owners[(*call.inputs, UNNAMED)[0]] = Owner(methods[call.node], call)
    return owners


def _any(run: tuple[Call, ...], methods: Mapping[str, CodedMethod]) -> CodedMethod:
    return next(methods[call.node] for call in run if call.node in methods)
