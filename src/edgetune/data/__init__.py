"""Pictures from folders, npz files and built-in sets, prepared as a network wants them; repeatable views."""

from edgetune.data.augment import augment, batches, chunks, seen
from edgetune.data.chance import generator_for, permutation
from edgetune.data.dataset import Dataset, Pictures
from edgetune.data.drift import drift
from edgetune.data.loading import list_data, load_data, load_eval
from edgetune.data.picture import open_picture
from edgetune.data.preprocess import Preprocess
from edgetune.data.settings import Augment, Camera

__all__ = [
    "Augment",
    "Camera",
    "Dataset",
    "Pictures",
    "Preprocess",
    "augment",
    "batches",
    "chunks",
    "drift",
    "generator_for",
    "list_data",
    "load_data",
    "load_eval",
    "open_picture",
    "permutation",
    "seen",
]
