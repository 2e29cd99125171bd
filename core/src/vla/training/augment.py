"""Image augmentation: openpi's ranges, once, on the host.

Cameras that are not on a wrist get a random crop of 95 %, resized back, and a rotation of up to 5 degrees; all
cameras get brightness U(0.7, 1.3), contrast U(0.6, 1.4) about the image's mean and saturation U(0.5, 1.5) (the PyTorch
side of openpi; its JAX side draws per sample, which is what we do). All cameras of a sample share one draw.

Why here and not on the device: one implementation in numpy and Pillow is the same in both engines bit for bit, is a
pure function of (seed, step, row), and costs about a millisecond per image: crop, resize and rotation are one affine
resampling, the three colour changes one 3 x 4 matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from attrs import frozen
from PIL import Image

from vla.training.order import generator

CROP = 0.95
ROTATION = 5.0  # degrees
BRIGHTNESS, CONTRAST, SATURATION = 0.3, 0.4, 0.5


@frozen
class Draw:
    """The random numbers of one sample."""

    top: float  # where the crop starts, as a share of what is cut off, 0 .. 1
    left: float
    angle: float  # degrees
    brightness: float
    contrast: float
    saturation: float


def draws(seed: int, step: int, rows: int) -> list[Draw]:
    """The draws of a step, row by row."""
    u = generator(seed, "augment", step).random((rows, 6))
    return [
        Draw(
            float(r[0]),
            float(r[1]),
            ROTATION * (2 * float(r[2]) - 1),
            1 + BRIGHTNESS * (2 * float(r[3]) - 1),
            1 + CONTRAST * (2 * float(r[4]) - 1),
            1 + SATURATION * (2 * float(r[5]) - 1),
        )
        for r in u
    ]


def augment(images: Mapping[str, np.ndarray], draw: Draw) -> dict[str, np.ndarray]:
    """The images of one sample, uint8 [h w 3] each, as `draw` says. Cameras named `wrist` keep their geometry."""
    out = {}
    for name, pixels in images.items():
        image = Image.fromarray(pixels)
        if "wrist" not in name:
            image = image.transform(
                image.size, Image.Transform.AFFINE, _affine(*image.size, draw), Image.Resampling.BILINEAR
            )
        out[name] = np.asarray(_colours(image, draw))
    return out


def _affine(width: int, height: int, draw: Draw) -> tuple[float, ...]:
    """Output pixel -> input pixel: undo the rotation about the centre, then go into the crop. Outside is black."""
    turn = math.radians(draw.angle)
    cos, sin = CROP * math.cos(turn), CROP * math.sin(turn)
    cx, cy = width / 2, height / 2
    # the crop's centre in the input
    x0 = draw.left * (1 - CROP) * width + CROP * cx
    y0 = draw.top * (1 - CROP) * height + CROP * cy
    return (cos, -sin, x0 - cos * cx + sin * cy, sin, cos, y0 - sin * cx - cos * cy)


def _colours(image: Image.Image, draw: Draw) -> Image.Image:
    """Brightness b, contrast c, saturation s as one matrix: c b (s x + (1 - s) grey(x)) + (1 - c) b mean."""
    mean = float(np.asarray(image, np.float32).mean())
    b, c, s = draw.brightness, draw.contrast, draw.saturation
    own, other, shift = b * c * (s + (1 - s) / 3), b * c * (1 - s) / 3, b * (1 - c) * mean
    rows = [own if i == j else other for i in range(3) for j in range(3)]
    return image.convert("RGB", (*rows[:3], shift, *rows[3:6], shift, *rows[6:], shift))
