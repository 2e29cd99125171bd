"""`droid`: a Franka arm with a gripper (8 values), one outer and one wrist camera."""

from vla.parts import Part
from vla_robot_droid.config import DroidSettings, offers

PART = Part(
    kind="robot",
    name="droid",
    summary="DROID: Franka, 7 joints and a gripper (8), one outer and one wrist camera, 15 Hz",
    settings=DroidSettings,
    offers=offers,
    transforms="vla_robot_droid.transforms:steps",
)
