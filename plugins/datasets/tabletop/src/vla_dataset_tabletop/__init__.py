"""`tabletop`: a small language-conditioned MuJoCo tabletop as an environment, a robot and a dataset."""

from vla.parts import Part
from vla_dataset_tabletop.config import DatasetSettings, EnvSettings, RobotSettings

_TINY = {
    "families": ("touch",), "colors": ("red", "green", "blue"), "n_blocks": 3, "image_size": 64, "spread": 0.08,
    "lanes": True, "looks": 1.0,
}  # fmt: skip

PART = Part(
    kind="dataset",
    name="tabletop",
    summary="scripted demonstrations on the built-in tabletop, recorded on first use",
    settings=DatasetSettings,
    presets={"tiny": _TINY},
    offers=lambda settings, inner: {"robot": "tabletop"},
    numpy="vla_dataset_tabletop.dataset:demonstrations",
)

ROBOT = Part(
    kind="robot",
    name="tabletop",
    summary="Franka-like arm of the tabletop: end-effector deltas (7), pose and fingers (8), front and wrist camera",
    settings=RobotSettings,
    presets={"tiny": {"state": "position"}},
    offers=lambda settings, inner: settings.offers(),
    transforms="vla_dataset_tabletop.transforms:steps",
)

ENV = Part(
    kind="env",
    name="tabletop",
    summary="tabletop in MuJoCo: touch, push, lift or place what the instruction names",
    settings=EnvSettings,
    presets={"tiny": _TINY},
    offers=lambda settings, inner: {"robot": "tabletop"},
    numpy="vla_dataset_tabletop.env:make",
)
