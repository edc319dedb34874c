"""The order of updates: every parameter takes its step as soon as its gradient is there, and the gradient goes.

Back-propagation first needs all gradients only where something is computed from all of them, such as their norm.
Without that the step is the same to the bit: when a gradient is complete, what reads its parameter has already run.
Then no more than a few gradients exist at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def as_it_comes(model: nn.Module, step: Callable[[nn.Parameter], object]) -> Iterator[None]:
    """Inside, backward passes call `step(parameter)` for each gradient once it is complete, and then drop it.

    An optimizer's own `step()` serves, since it passes over what has no gradient; so start without any. Each backward
    pass is a step of its own: gradients of micro-batches do not add up.
    """

    def finish(parameter: nn.Parameter) -> None:
        step(parameter)
        parameter.grad = None

    # torch calls it after all uses of a parameter have given their part
    handles = [p.register_post_accumulate_grad_hook(finish) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
