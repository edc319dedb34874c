"""One training step of an integer network at batch 1, as a C program takes it: every buffer, and one block for all.

What is counted, in bytes:

    maps         int8, from the layer that makes them to the last that reads them
    masks        one bit an output of convolutions, adds and means behind the first layer that learns, until backward
    kept         int8 inputs of convolutions whose weight learns, of the channels that learn; where these are all, and
                 the map exists, it is kept itself
    copies       what the optimizer changes: learning weights int8, biases int32, the head float32. They stay between
                 steps, without momentum (`Stepped`); everything that is frozen is read from flash
    gradients    float32: of maps; and of what learns, until the update

The schedule is the order of execution, then backward in reverse. Assumed of the program:

    an add lies over an operand that ends there, and a gradient is masked and scaled where it lies
    accumulators are registers, one at a time
    with `update_as_it_comes` a layer's gradient ends where it is computed, else all are held until the update

With `streams` also (all of it exact: integers add up to the same in any order; float gradients are summed in another
order, channel by channel):

    a convolution, the depthwise one behind it and the pointwise one behind that are one stage. Forward goes by rows:
    of the first map only as many rows exist as the depthwise kernel has, of the second one pixel. Rows of the result
    lie over rows of the input that are read for the last time (maps are stored h w c), where they fit; a residual add
    of the stage's own input is made pixel by pixel in the same place
    backward such a stage goes by hidden channel: of both inner gradients one channel exists
    a pointwise convolution and the global mean behind it are one stage, which goes by channel in both directions
    gradients of weights exist filter by filter and are used at once; the head's, an outer product, number by number

Left out are code, stack and the picture's float original: the picture is int8 when it comes. With `number_bytes` 4 the
same is told of an engine that computes in float32 and has its norms folded in.
"""

from __future__ import annotations

from collections import defaultdict
from math import prod

from edgetune.methods.backward.sparse_update import SparseUpdate, read_channels, window_axis
from edgetune.overlap import ConvGeometry
from edgetune.quantize.network import Learns
from edgetune.quantize.packing import Arena, Buffer, pack
from edgetune.quantize.record import INPUT, Add, AnyLayer, Clamped, Conv, Linear, QuantizedGraph
from edgetune.quantize.stages import Stage, fits_in_place, stages

FLOAT = 4


def training_arena(graph: QuantizedGraph, learns: Learns, *, update_as_it_comes: bool = True, streams: bool = True,
                   number_bytes: int = 1) -> Arena:
    """The block of memory that one training step takes, all buffers placed; with nothing to learn, of inference."""
    return pack(tuple(_Step(graph, learns, update_as_it_comes, streams, number_bytes).buffers.values()))


def extra_bytes(graph: QuantizedGraph, learns: Learns, *, update_as_it_comes: bool = True, streams: bool = True) -> int:
    """What learning takes beyond inference: the difference of both arenas."""
    training, inference = (training_arena(graph, each, update_as_it_comes=update_as_it_comes, streams=streams)
                           for each in (learns, {}))
    return training.size - inference.size


def added_bytes(graph: QuantizedGraph, learns: Learns) -> int:
    """What learning keeps and copies, added up: masks, kept inputs, copies of what learns; no gradients.

    The memory model of Lin et al. (NeurIPS 2022), whose budgets count so; here the head's own numbers are in it.
    """
    step = _Step(graph, learns, update_as_it_comes=True, streams=False)
    counted = sum(each.size for each in step.buffers.values() if each.kind in ("mask", "kept", "copy"))
    return counted + sum(prod(step.shape(name)) for name in step.kept_maps)


def flash_bytes(graph: QuantizedGraph) -> int:
    """What is stored for good: weights int8, biases int32, multipliers int32 and shifts int8, the head float32."""
    convs = sum(prod(_weight_shape(conv.geometry)) + 9 * conv.geometry.out_channels for conv in graph.convs)
    return convs + sum(FLOAT * layer.out_features * (layer.in_features + 1)
                       for layer in graph.layers if isinstance(layer, Linear))


class _Step:
    """The buffers of one step by name; moments count stages forward, then backward, then the update."""

    def __init__(self, graph: QuantizedGraph, learns: Learns, update_as_it_comes: bool, streams: bool,
                 number_bytes: int = 1) -> None:
        self.graph, self.early, self.streams, self.number_bytes = graph, update_as_it_comes, streams, number_bytes
        self.learns = {name: roles for name, roles in learns.items() if roles}
        self.stages = stages(graph, streams)
        self.stage_of = {layer.name: i for i, stage in enumerate(self.stages) for layer in stage}
        self.readers: dict[str, list[int]] = defaultdict(list)
        self.carries = {INPUT: False}
        for layer in graph.layers:
            self.carries[layer.name] = layer.name in self.learns or any(self.carries[each] for each in layer.sources)
            for source in layer.sources:
                self.readers[source].append(self.stage_of[layer.name])
        self.end = 2 * len(self.stages) if self.learns else len(self.stages) - 1
        self.kept_maps: set[str] = set()
        self.buffers: dict[str, Buffer] = {}
        for layer in graph.layers:
            self._keep(layer)
            self._copy(layer)
        self._maps()
        for index, stage in enumerate(self.stages):
            self._scratch(index, stage)
            self._gradients(index, stage)

    def _put(self, name: str, kind: str, size: int, first: int, last: int, over: str | None = None) -> None:
        if size:
            self.buffers[name] = Buffer(name, kind, size, first, last, over)

    def _back(self, index: int) -> int:
        """The moment at which a stage goes backward."""
        return 2 * len(self.stages) - 1 - index

    def _whole(self, name: str) -> bool:
        """Whether a map exists as a whole: the input's, and those between stages."""
        return name == INPUT or self.stages[self.stage_of[name]][-1].name == name

    def shape(self, name: str) -> tuple[int, int, int]:
        """(c h w) of a map."""
        layer = None if name == INPUT else self.graph[name]
        assert not isinstance(layer, Linear)
        return self.graph.input_shape[1:] if layer is None else layer.shape

    def _keep(self, layer: AnyLayer) -> None:
        now = self.stage_of[layer.name]
        if isinstance(layer, Clamped) and self.carries[layer.name]:
            self._put(f"mask of {layer.name}", "mask", -(-prod(layer.shape) // 8), now, self._back(now))
        if isinstance(layer, Linear) and "weight" in self.learns.get(layer.name, ()):
            self.kept_maps.add(layer.sources[0])
        channels = read_by_learning(layer, self.learns.get(layer.name, ()))
        if channels and isinstance(layer, Conv):
            source = layer.sources[0]
            if channels == layer.geometry.in_channels and self._whole(source):
                self.kept_maps.add(source)
            else:
                size = self.number_bytes * channels * prod(layer.geometry.in_hw)
                self._put(f"input of {layer.name}", "kept", size, now, self._back(now))

    def _copy(self, layer: AnyLayer) -> None:
        weights, biases = learning_numbers(layer, self.learns.get(layer.name, ()))
        size = FLOAT * (weights + biases) if isinstance(layer, Linear) else self.number_bytes * weights + 4 * biases
        self._put(f"copy of {layer.name}", "copy", size, 0, self.end)

    def _maps(self) -> None:
        for name in (INPUT, *(stage[-1].name for stage in self.stages)):
            made = 0 if name == INPUT else self.stage_of[name]
            last = max(self.readers[name], default=made)
            if name in self.kept_maps:
                last = max(self._back(reader) for reader in self.readers[name])
            if name != INPUT and isinstance(layer := self.graph[name], Linear):
                self._put(name, "map", FLOAT * layer.out_features, made, self._back(made) if self.learns else made)
            else:
                size = self.number_bytes * prod(self.shape(name))
                self._put(name, "map", size, made, last, self._beneath(name))

    def _beneath(self, name: str) -> str | None:
        """The map over which this one lies: one that ends with the stage that makes this one."""
        if name == INPUT:
            return None
        stage, now = self.stages[self.stage_of[name]], self.stage_of[name]
        last = stage[-1]
        candidates = last.sources if isinstance(last, Add) and len(stage) == 1 else ()
        if len(stage) > 2:
            (channels, _, width), (out, _, out_width) = self.shape(stage[0].sources[0]), self.shape(name)
            if fits_in_place(stage, channels * width, out * out_width):
                candidates = (stage[0].sources[0],)
        return next((each for each in candidates if each in self.buffers and self.buffers[each].last == now), None)

    def _scratch(self, index: int, stage: Stage) -> None:
        """The parts of inner maps and gradients that exist in a stage of several layers."""
        if len(stage) < 3:
            return
        hidden, depthwise = stage[0], stage[1]
        assert isinstance(hidden, Conv) and isinstance(depthwise, Conv)
        channels, _, width = hidden.shape
        numbers = channels * (depthwise.geometry.kernel[0] * width + 1)
        self._put(f"rows of {hidden.name}", "scratch", self.number_bytes * numbers, index, index)
        inner = sum(prod(layer.shape[1:]) for layer in (hidden, depthwise) if self.carries[layer.name])
        self._put(f"channel of {hidden.name}", "gradient", FLOAT * inner, self._back(index), self._back(index))

    def _gradients(self, index: int, stage: Stage) -> None:
        now = self._back(index)
        for layer in stage:
            weights, biases = learning_numbers(layer, self.learns.get(layer.name, ()))
            numbers = weights + biases
            if self.early and self.streams:
                numbers = 0 if isinstance(layer, Linear) else max(self._filter(layer) if weights else 0, bool(biases))
            last = now if self.early else self.end
            self._put(f"gradient of {layer.name}'s own", "gradient", FLOAT * numbers, now, last)
        name = stage[-1].name
        if self.carries[name] and not isinstance(stage[-1], Linear):
            first = self._back(max(self.readers[name], default=index))
            self._put(f"gradient of {name}", "gradient", FLOAT * prod(self.shape(name)), first, now,
                      self._gradient_beneath(name, first))

    def _filter(self, layer: AnyLayer) -> int:
        """Learning numbers of one filter, or of one hidden channel's filters."""
        assert isinstance(layer, Conv)
        weights, _ = learning_numbers(layer, self.learns[layer.name])
        filters = _learning_shape(layer.geometry, self.learns[layer.name])[0]
        inner = self.stages[self.stage_of[layer.name]].index(layer) == 2
        return layer.geometry.out_channels if inner else weights // filters

    def _gradient_beneath(self, name: str, first: int) -> str | None:
        """A gradient that an add hands on lies where the add's own does; one of two does."""
        reader = self.stages[2 * len(self.stages) - 1 - first]
        if len(reader) > 1 or not isinstance(add := reader[0], Add):
            return None
        able = [each for each in add.sources
                if self.carries[each] and self._back(max(self.readers[each])) == first]
        return f"gradient of {add.name}" if able and able[0] == name else None


def learning_numbers(layer: AnyLayer, roles: tuple[str | SparseUpdate, ...]) -> tuple[int, int]:
    """How many numbers of a layer's weight and bias learn."""
    if isinstance(layer, Linear):
        return layer.in_features * layer.out_features * ("weight" in roles), layer.out_features * ("bias" in roles)
    if not isinstance(layer, Conv):
        return 0, 0
    return prod(_learning_shape(layer.geometry, roles)), layer.geometry.out_channels * ("bias" in roles)


def read_by_learning(layer: AnyLayer, roles: tuple[str | SparseUpdate, ...]) -> int:
    """How many channels of a convolution's input its learning weight reads."""
    if not isinstance(layer, Conv) or not prod(_learning_shape(layer.geometry, roles)):
        return 0
    method = next((role for role in roles if isinstance(role, SparseUpdate)), None)
    if method is None:
        return layer.geometry.in_channels
    start, stop = read_channels(layer.geometry, method.first, method.count(layer.geometry))
    return stop - start


def _weight_shape(geometry: ConvGeometry) -> tuple[int, ...]:
    return geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel


def _learning_shape(geometry: ConvGeometry, roles: tuple[str | SparseUpdate, ...]) -> tuple[int, ...]:
    """The shape of what learns of a weight (o i u v); with a 0 in it where nothing does."""
    method = next((role for role in roles if isinstance(role, SparseUpdate)), None)
    shape = list(_weight_shape(geometry))
    if method is not None:
        shape[window_axis(geometry)[0]] = method.count(geometry)
    elif "weight" not in roles:
        shape[0] = 0
    return tuple(shape)
