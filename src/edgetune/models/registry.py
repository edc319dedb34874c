"""Networks by name: every file of this folder that has `CARDS` and `build`, the zoos, a user's own code."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from torch import nn

from edgetune.errors import EdgetuneError, ModelError
from edgetune.models.card import ModelCard
from edgetune.models.zoo import ZOOS, own_callable, zoo_card

Builder = Callable[..., nn.Module]


@cache
def _found() -> dict[str, tuple[ModelCard, Builder]]:
    package = importlib.import_module("edgetune.models")
    found: dict[str, tuple[ModelCard, Builder]] = {}
    for entry in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"edgetune.models.{entry.name}")
        for card in getattr(module, "CARDS", ()):
            found[card.name] = (card, module.build)
    return dict(sorted(found.items()))


def list_models() -> list[ModelCard]:
    """The cards of all built-in networks; those whose `build` takes a width also answer to NAME_0.35."""
    return [card for card, _ in _found().values()]


def model_card(name: str) -> ModelCard:
    """What a network is and which pictures it expects. Raises ModelError for an unknown name."""
    return zoo_card(name) if ":" in name else _resolve(name)[0]


def load_model(name: str, num_classes: int | None = None, **options: Any) -> nn.Module:
    """Build a network, freshly initialised, in eval mode.

    `name` is a built-in name (`mobilenet_v2`, `mobilenet_v2_0.35`), `timm:NAME`, `torchvision:NAME`, or
    `package.module:callable` for one's own; `num_classes` is the card's count unless given. `options` go to
    the builder. Raises ModelError for an unknown name, with the nearest ones, or options it does not take.
    """
    if ":" in name:
        return _from_zoo(name, num_classes, options)
    card, build = _resolve(name)
    chosen = {**card.options, **options}
    taken = set(inspect.signature(build).parameters) - {"num_classes"}
    if unknown := sorted(set(chosen) - taken):
        raise ModelError(
            f"model '{name}' has no option '{unknown[0]}': it takes {', '.join(sorted(taken)) or 'none'}"
        )
    try:
        return build(card.classes if num_classes is None else num_classes, **chosen).eval()
    except (KeyError, TypeError, ValueError) as failure:
        raise ModelError(
            f"model '{name}' cannot be built with {chosen} ({failure}): correct the options"
        ) from failure


def shipped_weights(name: str) -> Path | None:
    """The weights file that comes with the package for a built-in network, or None."""
    card = model_card(name)
    if card.weights is None:
        return None
    return Path(str(resources.files("edgetune.models") / "weights" / card.weights))


def _resolve(name: str) -> tuple[ModelCard, Builder]:
    found = _found()
    if name in found:
        return found[name]
    match = re.fullmatch(r"(.+)_(\d+(?:\.\d+)?)", name)
    if match and match[1] in found and float(match[2]) > 0:
        card, build = found[match[1]]
        if "width" in inspect.signature(build).parameters:
            options = {**card.options, "width": float(match[2])}
            return card.model_copy(update={"name": name, "options": options, "weights": None}), build
        raise ModelError(f"model '{match[1]}' has no width to scale: write '{match[1]}' alone")
    near = difflib.get_close_matches(name, found, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(found)}"
    raise ModelError(
        f"model '{name}' is unknown: {hint} (timm:NAME, torchvision:NAME and package.module:callable "
        "work too)"
    )


def _from_zoo(name: str, num_classes: int | None, options: dict[str, Any]) -> nn.Module:
    prefix, _, rest = name.partition(":")
    build = ZOOS.get(prefix) or own_callable(prefix, rest)
    try:
        model = build(rest, num_classes, **options)
    except EdgetuneError:
        raise
    except Exception as failure:  # whatever a foreign builder raises, a person gets one sentence
        raise ModelError(
            f"model '{name}' cannot be built ({type(failure).__name__}: {failure}): "
            "check its name and options"
        ) from failure
    if not isinstance(model, nn.Module):
        raise ModelError(f"'{name}' gave a {type(model).__name__}: it must return a torch.nn.Module")
    return model.eval()
