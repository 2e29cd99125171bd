"""Steps on camera images: the robot's cameras onto the model's, bytes, size.

Cameras of a robot have their own names; those of the model are `spec.cameras`. An adapter states, per camera, the names
it may take in a model, best first (`CameraPlaces`), and `camera_steps` fits that to the spec at hand. A user's own
pairs ("base_0_rgb=front") win.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from attrs import frozen

from vla.errors import DataError, SettingsError
from vla.transforms.group import Flat, as_array

CameraPlaces = Mapping[str, tuple[str, ...]]
MOST_PIXELS = 2**26  # of one image


# ---- functions -----------------------------------------------------------------------------------------------------


def to_uint8(image: Any, name: str = "image") -> np.ndarray:
    """uint8 [... h w 3] of an image uint8, or float in [0, 1] (255 * x, cut as openpi does); channels may come first.

    An image is taken as [3 h w] when its first axis is 3 and its last is not.

    Raises:
        DataError: not an RGB image, or float values outside [0, 1].
    """
    x = as_array(image, name)
    if x.ndim >= 3 and x.shape[-1] != 3 and x.shape[-3] == 3:
        x = np.moveaxis(x, -3, -1)
    if x.ndim < 3 or x.shape[-1] != 3:
        raise DataError(
            "not an RGB image", field=name, got=f"{x.dtype} {x.shape}", expected="[height width 3] or [3 height width]"
        )
    if 0 in x.shape:
        raise DataError("an image without pixels", field=name, got=x.shape)
    if (pixels := x.shape[-3] * x.shape[-2]) > MOST_PIXELS:
        raise DataError(
            "an image is larger than any camera's", field=name, got=f"{x.shape[-2]} x {x.shape[-3]}: {pixels} pixels",
            expected=f"at most {MOST_PIXELS}", fix="scale it down where it is taken",
        )  # fmt: skip
    if x.dtype.kind == "f":
        low, high = float(x.min()), float(x.max())  # NaN fails both comparisons
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise DataError(
                "a float image must lie in [0, 1]",
                field=name,
                got=f"{low:g} to {high:g}",
                fix="send uint8, or scale to [0, 1]",
            )
        x = (255 * np.clip(x, 0, 1)).astype(np.uint8)
    if x.dtype != np.uint8:
        raise DataError("an image must be uint8, or float in [0, 1]", field=name, got=x.dtype)
    return x


def resize_with_pad(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [... h w 3] -> [... height width 3]: the whole image in its proportions, centred on black.

    As openpi's client (PIL bilinear). An image of the right size is returned as it is.
    """
    if image.shape[-3:-1] == (height, width):
        return image
    from PIL import Image

    h, w = image.shape[-3:-1]
    ratio = max(w / width, h / height)
    new_h, new_w = max(1, int(h / ratio)), max(1, int(w / ratio))
    top, left = (height - new_h) // 2, (width - new_w) // 2
    rows = image.reshape(-1, h, w, 3)
    out = np.zeros((len(rows), height, width, 3), np.uint8)
    for i, row in enumerate(rows):
        small = Image.fromarray(np.ascontiguousarray(row)).resize((new_w, new_h), Image.Resampling.BILINEAR)
        out[i, top : top + new_h, left : left + new_w] = np.asarray(small)
    return out.reshape(*image.shape[:-3], height, width, 3)


def as_mask(value: Any, name: str) -> bool:
    """Whether a camera is seen: from a bool, 0 or 1, or an array of one of them."""
    x = as_array(value, name)
    if x.size != 1 or x.dtype.kind not in "biu" or x.reshape(-1)[0] not in (0, 1):
        raise DataError("whether a camera is seen is yes or no", field=name, got=repr(value)[:60], expected="a bool")
    return bool(x.reshape(-1)[0])


# ---- steps ---------------------------------------------------------------------------------------------------------


@frozen
class ConvertToUint8:
    """Every image as uint8 [h w 3]; see `to_uint8`."""

    reads: ClassVar = ("images/*",)
    writes: ClassVar = ("images/*",)

    def __call__(self, data: Flat) -> Flat:
        return {k: to_uint8(v, k) if k.startswith("images/") else v for k, v in data.items()}


@frozen
class FitCameras:
    """The robot's cameras under the model's names, as uint8; what the robot lacks is masked.

    Attributes:
        pairs: (name in the model, name of the robot).
        known: every camera the robot may send; those without a pair are left out.
        required: cameras of the robot that must come.
        spec_cameras: all cameras of the model.
        mask_absent: False: an absent camera is a black image that counts as seen, as openpi's DROID and LIBERO adapters
            do for pi0_fast.
    """

    pairs: tuple[tuple[str, str], ...]
    known: tuple[str, ...]
    required: tuple[str, ...]
    spec_cameras: tuple[str, ...]
    robot: str
    mask_absent: bool = True
    reads: ClassVar = ("images/*?",)
    writes: ClassVar = ("images/*?", "image_masks/*?")

    @property
    def shapes(self) -> str:
        """Text for the table."""
        return ", ".join(f"{mine} <- {theirs}" if mine != theirs else mine for mine, theirs in self.pairs)

    def _with(self, unknown: Sequence[str], came: Collection[str]) -> str:
        """robot.cameras that also has these, as far as the spec has places; what is known keeps its own."""
        places = {mine: theirs for mine, theirs in self.pairs if theirs in came}
        free = [name for name in self.spec_cameras if name not in places] or list(self.spec_cameras[:1])
        places.update(zip(free, unknown, strict=False))
        return json.dumps([f"{mine}={theirs}" for mine, theirs in places.items()])

    def __call__(self, data: Flat) -> Flat:
        came = {k[len("images/") :]: v for k, v in data.items() if k.startswith("images/")}
        if not came:  # a sample without its images (statistics, fitting a tokenizer); the images stage insists on one
            return data
        if unknown := [name for name in came if name not in self.known]:
            raise DataError(
                f"the robot adapter {self.robot!r} knows no such camera",
                field=f"images[{unknown[0]!r}]",
                got=sorted(came),
                expected=f"any of {list(self.known)}",
                fix=f"say where it belongs, e.g. --set 'robot.cameras={self._with(unknown, came)}'",
            )
        if lacking := [name for name in self.required if name not in came]:
            raise DataError(
                f"the robot adapter {self.robot!r} needs a camera that did not come",
                field=f"images[{lacking[0]!r}]",
                got=sorted(came),
                fix="send every camera of the robot",
            )
        if not any(theirs in came for _, theirs in self.pairs):
            raise DataError(
                "none of the cameras that came is one that the policy looks at",
                field="images",
                got=sorted(came),
                expected=f"any of {[theirs for _, theirs in self.pairs]}",
                fix="send them under these names",
            )
        seen_as = {k[len("image_masks/") :]: as_mask(v, k) for k, v in data.items() if k.startswith("image_masks/")}
        if unknown := [name for name in seen_as if name not in self.known]:
            raise DataError(
                f"the robot adapter {self.robot!r} knows no such camera",
                field=f"image_masks[{unknown[0]!r}]",
                got=sorted(seen_as),
                expected=f"any of {list(self.known)}",
            )
        out = {k: v for k, v in data.items() if not k.startswith(("images/", "image_masks/"))}
        for mine, theirs in self.pairs:
            if theirs in came and seen_as.get(theirs, True):
                out[f"images/{mine}"] = to_uint8(came[theirs], f"images[{theirs!r}]")
        first = next((v for k, v in out.items() if k.startswith("images/")), None)
        for mine in self.spec_cameras:
            seen = f"images/{mine}" in out
            if not seen and not self.mask_absent and first is not None:
                out[f"images/{mine}"] = np.zeros_like(first)
            out[f"image_masks/{mine}"] = seen or not self.mask_absent
        return out


@frozen
class ResizeImages:
    """Images of the model's size; a mask for every camera of the model. Resizes only what has another size."""

    height: int
    width: int
    cameras: tuple[str, ...]
    reads: ClassVar = ("images/*", "image_masks/*?")
    writes: ClassVar = ("images/*", "image_masks/*")

    @property
    def shapes(self) -> str:
        """Text for the table."""
        return f"images [{self.height} {self.width} 3], image_masks []"

    def __call__(self, data: Flat) -> Flat:
        out = dict(data)
        for key, value in data.items():
            group, _, name = key.partition("/")
            if group == "images":
                if name not in self.cameras:
                    raise DataError(
                        "an image of a camera that this policy does not know",
                        field=f"images[{name!r}]",
                        got=sorted(k[7:] for k in data if k.startswith("images/")),
                        expected=f"any of {list(self.cameras)}",
                        fix=f"rename it, e.g. --set 'robot.cameras=[\"{self.cameras[0]}={name}\"]'",
                    )
                out[key] = resize_with_pad(to_uint8(value, f"images[{name!r}]"), self.height, self.width)
        for name in self.cameras:
            mask = out.setdefault(f"image_masks/{name}", f"images/{name}" in out)
            if not as_mask(mask, f"image_masks/{name}"):
                out.pop(f"images/{name}", None)  # masked: nobody looks at it
        if not any(k.startswith("images/") for k in out):
            raise DataError("every camera of the sample is masked", field="image_masks", got=sorted(data))
        return out


def camera_steps(
    robot: str,
    places: CameraPlaces,
    spec_cameras: Sequence[str],
    *,
    override: Sequence[str] = (),
    required: Sequence[str] = (),
    mask_absent: bool = True,
) -> list[tuple[str, Any]]:
    """`FitCameras` in its stage.

    Args:
        places: camera of the robot -> names it may take in a model, best first; none: accepted and left out.
        spec_cameras: `variant.spec.cameras`.
        override: the user's "model=robot" pairs, instead of `places`. A name without "=" means the same on both sides.
        required: cameras of the robot that must come.

    Raises:
        SettingsError: a pair names no camera of the model, or two cameras take one place, or none fits at all.
    """
    spec_cameras = tuple(spec_cameras)
    pairs: list[tuple[str, str]] = []
    if override:
        for text in override:
            mine, _, theirs = str(text).partition("=")
            pairs.append((mine.strip(), (theirs or mine).strip()))
            if pairs[-1][0] not in spec_cameras:
                raise SettingsError(
                    "a pair names no camera of the model",
                    field="robot.cameras",
                    got=text,
                    expected=f"one of {list(spec_cameras)} on the left, e.g. {spec_cameras[0]}={pairs[-1][1]}",
                )
    else:
        for theirs, names in places.items():
            free = [n for n in names if n in spec_cameras and n not in [mine for mine, _ in pairs]]
            if free:
                pairs.append((free[0], theirs))
    mine_names = [mine for mine, _ in pairs]
    if twice := [name for name in mine_names if mine_names.count(name) > 1]:
        raise SettingsError("two cameras of the robot for one of the model", field="robot.cameras", got=twice[0])
    if not pairs:
        raise SettingsError(
            f"no camera of the robot {robot!r} fits a camera of the model",
            field="robot.cameras",
            got=f"robot: {list(places)}, model: {list(spec_cameras)}",
            fix=f"say which is which: --set 'robot.cameras=[\"{spec_cameras[0]}=NAME\"]'",
        )
    known = dict.fromkeys([*places, *(theirs for _, theirs in pairs)])
    used = {theirs for _, theirs in pairs}
    needed = tuple(name for name in required if name in used)
    return [("inputs.robot", FitCameras(tuple(pairs), tuple(known), needed, spec_cameras, robot, mask_absent))]
