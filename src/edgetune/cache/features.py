"""Training from features: what the frozen part gives for a picture and view is computed once, and looked up after.

What the rest trains on does not depend on what the cache holds: with a codec that loses something it is always what
the codec gives back, and kernels that round by the size of a batch always see the same size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from edgetune.cache.cut import Cut, find_cut
from edgetune.cache.settings import Cache, CacheUse
from edgetune.cache.store import DiskStore, MemoryStore, Store, room_on_disk
from edgetune.codecs import FIXED, Codec
from edgetune.data import Augment, Dataset, Pictures, chunks, permutation, seen
from edgetune.errors import RunError
from edgetune.units import format_bytes

Forward = Callable[[torch.Tensor], torch.Tensor]
FILES = "*.cache"
AHEAD = 8
"""How many micro-batches are looked through for pictures to compute together."""
Part = Literal["train", "val"]


@dataclass(frozen=True)
class Sight:
    """How training sees its pictures: order and views by `seed`, `batch_size` in a step, `micro_batch` at a time."""

    seed: int
    augment: Augment | None
    batch_size: int
    micro_batch: int


@dataclass
class Features:
    """Pictures behind the frozen part of `model`, by number; `use` counts what was found.

    They are for the mode, training or evaluation, that the model was in when they were opened. `coming` are the
    pictures that an epoch looks up, from place `at` on still to come; `ahead` those computed before their turn.
    """

    model: nn.Module
    cut: Cut
    pictures: Pictures
    sight: Sight
    views: int
    codec: Codec
    store: Store
    use: CacheUse
    sizes: list[int] = field(init=False)
    coming: list[int] = field(default_factory=list)
    at: int = 0
    ahead: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sizes = [self.codec.size((1, *value.shape)) for value in self.cut.values]

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Forward, torch.Tensor, torch.Tensor]]:
        """The batches of an epoch from batch number `start` on: a function from pictures' numbers to the network's
        output, the numbers (n), and the labels y (n)."""
        order = permutation(len(self.pictures), "order", self.sight.seed, epoch)
        yield from self._batches(order, epoch % self.views, start)

    def in_order(self) -> Iterator[tuple[Forward, torch.Tensor, torch.Tensor]]:
        """All pictures once, in their own order; otherwise as `batches`."""
        yield from self._batches(list(range(len(self.pictures))), 0, 0)

    def _batches(
        self, order: list[int], view: int, start: int
    ) -> Iterator[tuple[Forward, torch.Tensor, torch.Tensor]]:
        forward = partial(self.output, view)
        parts = (part for batch in chunks(order, self.sight.batch_size, start)
                 for part in chunks(batch, self.sight.micro_batch) if self._looks_up(part))  # fmt: skip
        self.coming, self.at, self.ahead = [i for part in parts for i in part], 0, {}
        for chosen in chunks(order, self.sight.batch_size, start):
            yield forward, torch.tensor(chosen), torch.tensor([self.pictures.labels[i] for i in chosen])

    def output(self, view: int, numbers: torch.Tensor) -> torch.Tensor:
        """What the network gives for the pictures `numbers` (n), seen in `view`."""
        chosen = numbers.tolist()
        values = self._looked_up(view, chosen) if self._looks_up(chosen) else self._computed(view, chosen)
        return self.cut.suffix(self.model, *values)

    def _looks_up(self, chosen: list[int]) -> bool:
        # a kernel may round differently at another batch size, and exactly means as without a cache
        return len(chosen) == self.sight.micro_batch or not self.codec.exact

    @property
    def room_bytes(self) -> int:
        """What it may come to take."""
        return min(self.views * len(self.pictures), self.store.capacity) * sum(self.sizes)

    def close(self) -> None:
        """Give back memory, or close the file."""
        self.store.close()

    def _count(self, found: int, computed: int) -> None:
        self.use = self.use.model_copy(update={
            "found": self.use.found + found, "computed": self.use.computed + computed, "stored": self.store.stored})

    def _looked_up(self, view: int, chosen: list[int]) -> list[torch.Tensor]:
        self.at += len(chosen)
        rows = {i: self.ahead.pop(i) for i in chosen if i in self.ahead}
        found = {i: row for i in chosen if i not in rows and (row := self._read(view, i)) is not None}
        missing = [i for i in chosen if i not in rows and i not in found]
        if missing:
            self._compute(view, missing)
            rows |= {i: self.ahead.pop(i) for i in missing}
        self._count(len(found), len(rows))
        rows |= found
        return self._decoded(torch.stack([rows[i] for i in chosen]))

    def _compute(self, view: int, missing: list[int]) -> None:
        """Compute what is missing now and, as the batch has to have its usual size, what will be missing soon."""
        soon = self.coming[self.at : self.at + AHEAD * self.sight.micro_batch]
        more = (i for i in soon if i not in self.ahead and self._read(view, i) is None)
        numbers = [*missing, *islice(more, self.sight.micro_batch - len(missing))]
        for i, row in zip(numbers, self._encoded(view, numbers)):
            self.store.write(self._slot(view, i), row)
            self.ahead[i] = row

    def _read(self, view: int, number: int) -> torch.Tensor | None:
        return self.store.read(self._slot(view, number))

    def _slot(self, view: int, number: int) -> int:
        return view * len(self.pictures) + number

    def _encoded(self, view: int, numbers: list[int]) -> torch.Tensor:
        """uint8 (n size) on the CPU; computed in a batch of the usual size, filled up with repetitions."""
        x = self._seen(view, numbers)
        values = self._prefix(x[torch.arange(self.sight.micro_batch) % len(x)])
        parts = []
        for value in values:
            kept = value[: len(x)].float()
            reason = self.codec.refuse(kept)
            if reason is not None:
                names = ", ".join(f"'{self.pictures.names[i]}'" for i in numbers[:3])
                raise RunError(f"a picture among {names} {reason}: keep features with codec float32")
            parts.append(torch.stack([self.codec.encode(sample) for sample in kept.split(1)]))
        return torch.cat(parts, 1).cpu()

    def _decoded(self, packed: torch.Tensor) -> list[torch.Tensor]:
        parts = packed.to(_device(self.model)).split(self.sizes, 1)
        return [
            torch.cat([self.codec.decode(sample, (1, *value.shape)) for sample in part]).to(
                dtype=value.dtype,
                memory_format=torch.channels_last if value.channels_last else torch.preserve_format,
            )
            for part, value in zip(parts, self.cut.values, strict=True)
        ]

    def _computed(self, view: int, chosen: list[int]) -> tuple[torch.Tensor, ...]:
        self._count(0, len(chosen))
        return self._prefix(self._seen(view, chosen))

    def _prefix(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.set_grad_enabled(self.model.training):  # in training the planned code runs, not the network's own
            return self.cut.prefix(self.model, x.to(_device(self.model)))

    def _seen(self, view: int, chosen: list[int]) -> torch.Tensor:
        return seen(self.pictures, chosen, seed=self.sight.seed, view=view, settings=self.sight.augment)


def open_features(
    model: nn.Module, data: Dataset, cache: Cache, sight: Sight, folder: Path, tell: Callable[[str], None],
    part: Part = "train", taken_bytes: int = 0,
) -> Features:  # fmt: skip
    """The pictures of one part of `data` behind the frozen part of `model`, in the mode that it is in.

    `folder` is the run's own; of the cache's room `taken_bytes` are promised already. Pictures to validate take half
    of it at most, as float32, so that what is measured is the network itself. `tell` hears, once each, what a person
    should know of the pictures to train. Raises Refusal where nothing frozen lies in front of what learns.
    """
    training = part == "train"
    name = cache.codec if training else "float32"
    cut, codec = find_cut(model, data.preprocess.shape), FIXED[name]
    pictures = data.train if training else data.val
    views = cache.views if sight.augment is not None else 1
    size = sum(codec.size((1, *value.shape)) for value in cut.values)
    key = identity(model, cut, data, name, sight, part)
    path = Path(cache.folder or folder) / f"{part}-{key[:16]}.cache"
    room = min(cache.size_bytes, room_on_disk(path)) if cache.keep == "disk" else cache.size_bytes
    room = room - taken_bytes if training else room // 2
    wanted, capacity = views * len(pictures), max(room, 0) // size
    if training and capacity < wanted:
        tell(
            f"the cache has room for {capacity} of {wanted} samples of {format_bytes(size)}: the others are computed; "
            "allow more with --cache-size, or fewer --cache-views"
        )
    store: Store
    if cache.keep == "disk":
        store = DiskStore(path, key, size, capacity, tell if training else _silent)
    else:
        store = MemoryStore(capacity)
    use = CacheUse(layers=cut.layers, sample_bytes=size)
    return Features(model, cut, pictures, sight, views, codec, store, use)


def _silent(sentence: str) -> None:
    """The pictures to train have said it already."""


def identity(model: nn.Module, cut: Cut, data: Dataset, codec: str, sight: Sight, part: Part) -> str:
    """A hash of all that features depend on: the frozen part and its weights, the pictures and how they are seen."""
    digest = hashlib.sha256(cut.code.encode())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in cut.held:
        if name in tensors:
            digest.update(_bytes(tensors[name]))
    probe = torch.rand((1, *data.preprocess.shape), generator=torch.Generator().manual_seed(0))
    with torch.set_grad_enabled(model.training):
        for value in cut.prefix(model, probe.to(next(model.parameters()))):
            digest.update(_bytes(value))
    seen_as = {
        "fingerprint": data.fingerprint,
        "preprocess": data.preprocess.model_dump(mode="json"),
        "augment": None if sight.augment is None else [sight.augment.model_dump(mode="json"), sight.seed],
        "part": [part, data.counts[part]],
        "micro_batch": sight.micro_batch,
        "codec": codec,
        "torch": str(torch.__version__),
    }
    digest.update(json.dumps(seen_as, sort_keys=True).encode())
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
