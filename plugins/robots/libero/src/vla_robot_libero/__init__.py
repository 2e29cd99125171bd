"""`libero`: the simulated Franka of LIBERO: end-effector actions (7), pose and gripper state (8), two cameras."""

from vla.parts import Part
from vla_robot_libero.config import LiberoSettings, offers

PART = Part(
    kind="robot",
    name="libero",
    summary="LIBERO: end-effector actions (7), state (8), an outer and a wrist camera",
    settings=LiberoSettings,
    offers=offers,
    transforms="vla_robot_libero.transforms:steps",
)
