"""`metaworld`: the tasks of Meta-World with instructions, as an environment, a robot and a dataset."""

from vla.parts import Part
from vla_dataset_metaworld.config import MT10, TASKS, DatasetSettings, EnvSettings, RobotSettings, robot_offers

_PRESETS = {
    "tiny": {"tasks": ("drawer-open", "button-press-topdown"), "image_size": 64, "max_steps": 150},
    "mt10": {"tasks": MT10},
    "mt50": {"tasks": tuple(TASKS)},
}

PART = Part(
    kind="dataset",
    name="metaworld",
    summary="demonstrations by Meta-World's scripted experts, recorded on first use",
    settings=DatasetSettings,
    presets=_PRESETS,
    offers=lambda settings, inner: {"robot": "metaworld"},
    numpy="vla_dataset_metaworld.dataset:demonstrations",
)

ROBOT = Part(
    kind="robot",
    name="metaworld",
    summary="Sawyer of Meta-World: hand motion and gripper (4), hand position and opening (4), front and wrist camera",
    settings=RobotSettings,
    offers=robot_offers,
    transforms="vla_dataset_metaworld.transforms:steps",
)

ENV = Part(
    kind="env",
    name="metaworld",
    summary="Meta-World (the sim extra): 50 tasks of a Sawyer arm, scenes drawn by the seed",
    settings=EnvSettings,
    presets=_PRESETS,
    offers=lambda settings, inner: {"robot": "metaworld"},
    numpy="vla_dataset_metaworld.env:make",
)
