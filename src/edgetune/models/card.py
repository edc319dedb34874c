"""What a model file says about its networks: a name, a sentence, and the pictures they expect."""

from __future__ import annotations

from edgetune.record import Record


class InputSpec(Record):
    """The pictures a network was trained on; the fields are those of `edgetune.data.Preprocess`.

    `value_range` is what black and white pixels become before `mean` is subtracted and `std` divides.
    """

    size: tuple[int, int] = (224, 224)
    resize: str = "crop"
    crop_fraction: float = 0.875
    channels: int = 3
    value_range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


IMAGENET = InputSpec()
"""224 px photos, scaled to [0, 1], with the channel means and deviations of ImageNet."""

TENSORFLOW = InputSpec(value_range=(-1.0, 1.0), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
"""224 px photos as TensorFlow's ImageNet networks want them: x / 127.5 - 1."""


class ModelCard(Record):
    """One named network of a model file.

    `options` are the arguments that the file's `build` gets besides the class count; `weights` names a file
    that ships in the package, if one does.
    """

    name: str
    description: str
    classes: int = 1000
    input: InputSpec = IMAGENET
    options: dict[str, int | float | bool | str | tuple[int, ...]] = {}
    weights: str | None = None
