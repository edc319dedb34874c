"""Networks the field uses, one file each, found by name; weights for them; a head for one's classes."""

from edgetune.models.card import InputSpec, ModelCard
from edgetune.models.head import find_head, head_classes, replace_head
from edgetune.models.layers import Conv2dSame
from edgetune.models.loading import LoadReport, load_weights
from edgetune.models.registry import list_models, load_model, model_card, shipped_weights

__all__ = [
    "Conv2dSame",
    "InputSpec",
    "LoadReport",
    "ModelCard",
    "find_head",
    "head_classes",
    "list_models",
    "load_model",
    "load_weights",
    "model_card",
    "replace_head",
    "shipped_weights",
]
