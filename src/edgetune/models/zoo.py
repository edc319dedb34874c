"""Networks that others keep: timm's and torchvision's zoos, a user's own callable; imported when named."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from torch import nn

from edgetune.errors import ModelError
from edgetune.models.card import IMAGENET, InputSpec, ModelCard
from edgetune.models.torchvision_ops import import_torchvision_aware


def _zoo_module(name: str) -> ModuleType:
    try:
        return import_torchvision_aware(name)
    except ImportError as failure:
        raise ModelError(
            f"'{name.split('.')[0]}' cannot be imported ({failure}): "
            "install it with pip install 'edgetune[zoo]'"
        ) from failure


def _known(zoo: str, name: str, names: Iterable[str]) -> None:
    known = list(names)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise ModelError(
            f"{zoo} has no model '{name}': "
            + (f"did you mean {' or '.join(near)}?" if near else f"see {zoo}'s own list of models")
        )


def from_timm(name: str, num_classes: int | None, **options: Any) -> nn.Module:
    """`timm.create_model`, not downloading anything unless `pretrained=True` is among the options."""
    timm = _zoo_module("timm")
    _known("timm", name.split(".")[0], timm.list_models())
    given = {} if num_classes is None else {"num_classes": num_classes}
    return timm.create_model(name, **given, **options)


def from_torchvision(name: str, num_classes: int | None, **options: Any) -> nn.Module:
    """`torchvision.models.get_model`, not downloading anything unless `weights=` is among the options."""
    models = _zoo_module("torchvision.models")
    _known("torchvision", name, models.list_models(module=models))
    given: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if (
        "init_weights" in inspect.signature(models.get_model_builder(name)).parameters
        or name in _WARNS_WITHOUT_INIT
    ):
        given["init_weights"] = True
    return models.get_model(name, **{"weights": None, **given, **options})


# these two take `init_weights` through **kwargs and warn for seconds-long initialisation unless it is said
_WARNS_WITHOUT_INIT = ("googlenet", "inception_v3")


def own_callable(module_name: str, attribute: str) -> Callable[..., nn.Module]:
    """A builder around `package.module:callable`, looked for in the working directory too."""
    module = _import_own(module_name, f"{module_name}:{attribute}")
    target = module
    for part in attribute.split("."):
        if not hasattr(target, part):
            public = [name for name in dir(module) if not name.startswith("_")]
            near = difflib.get_close_matches(attribute, public, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else "check its spelling"
            raise ModelError(f"module '{module_name}' has no '{attribute}': {hint}")
        target = getattr(target, part)
    if not callable(target):
        raise ModelError(
            f"'{module_name}:{attribute}' is not callable: name a function or class that returns a network"
        )

    def build(_: str, num_classes: int | None, **options: Any) -> nn.Module:
        given = {"num_classes": num_classes} if num_classes is not None and _takes_classes(target) else {}
        return target(**given, **options)  # type: ignore[operator]

    return build


def _takes_classes(target: Any) -> bool:
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters)


def _import_own(module_name: str, name: str) -> Any:
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except Exception as failure:  # importing runs foreign code, which may raise anything
        raise ModelError(
            f"'{name}' cannot be imported ({type(failure).__name__}: {failure}): give "
            "package.module:callable as Python would import it from here"
        ) from failure
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


ZOOS: dict[str, Callable[..., nn.Module]] = {"timm": from_timm, "torchvision": from_torchvision}


def zoo_card(name: str) -> ModelCard:
    """A card for a network named with a colon; the pictures are ImageNet's unless the zoo or callable says
    more.

    One's own callable may carry an attribute `card`, a ModelCard.
    """
    prefix, _, rest = name.partition(":")
    describe = _CARDS.get(prefix)
    if describe is not None:
        return describe(name, rest)
    target: Any = _import_own(prefix, name)
    for part in rest.split("."):
        target = getattr(target, part, None)
    card = getattr(target, "card", None)
    if isinstance(card, ModelCard):
        return card
    return ModelCard(name=name, description="a network of one's own")


def _timm_card(name: str, rest: str) -> ModelCard:
    timm = _zoo_module("timm")
    _known("timm", rest.split(".")[0], timm.list_models())
    config = timm.get_pretrained_cfg(rest)
    if config is None:
        return ModelCard(name=name, description="a network of timm's zoo")
    channels, height, width = config.input_size
    spec = InputSpec(
        size=(height, width),
        crop_fraction=config.crop_pct,
        channels=channels,
        mean=tuple(config.mean),
        std=tuple(config.std),
    )
    return ModelCard(name=name, description="a network of timm's zoo", classes=config.num_classes, input=spec)


def _torchvision_card(name: str, rest: str) -> ModelCard:
    models = _zoo_module("torchvision.models")
    _known("torchvision", rest, models.list_models(module=models))
    return ModelCard(name=name, description="a network of torchvision's zoo", input=IMAGENET)


_CARDS: dict[str, Callable[[str, str], ModelCard]] = {"timm": _timm_card, "torchvision": _torchvision_card}
