"""Settings of what happens to pictures between the file and the network."""

from __future__ import annotations

from pydantic import Field

from edgetune.record import Record


class Augment(Record):
    """Random views in training: mirrored half of the time, a crop of at least `crop_scale` of the area blown
    up to the full size, and a shift of up to `shift_px` pixels."""

    flip: bool = True
    crop_scale: float = Field(default=1.0, gt=0, le=1)
    shift_px: int = Field(default=0, ge=0)


class Camera(Record):
    """What another camera does to pictures. Lengths are fractions of the picture's height, brightness that of
    white.

    Every picture is turned by `turn_degrees` give or take `turn_spread_degrees`, blurred (Gaussian, `blur`),
    squeezed around mid-grey by `contrast`, lifted by `brightness`, lit unevenly (`shade` from one side to the
    other, from a direction of its own), inverted if `inverted`, and made noisy (`noise`, one standard
    deviation).
    """

    turn_degrees: float = 0.0
    turn_spread_degrees: float = 0.0
    blur: float = Field(default=0.0, ge=0)
    contrast: float = Field(default=1.0, gt=0)
    brightness: float = 0.0
    shade: float = Field(default=0.0, ge=0)
    noise: float = Field(default=0.0, ge=0)
    inverted: bool = False


PHOTO_CAMERA = Camera(
    turn_spread_degrees=4.0, blur=0.015, contrast=0.7, brightness=0.05, shade=0.2, noise=0.015
)
"""A cheap camera in poor light, for photos."""

DIGITS_CAMERA = Camera(
    turn_degrees=20.0, turn_spread_degrees=10.0, blur=0.03, contrast=0.8, shade=0.2, noise=0.05
)
"""A badly mounted camera over a form, for digits."""
