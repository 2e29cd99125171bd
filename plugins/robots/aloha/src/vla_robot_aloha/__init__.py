"""`aloha`: two 6-joint arms with grippers (14 values), up to four cameras."""

from vla.parts import Part
from vla_robot_aloha.config import AlohaSettings, offers

PART = Part(
    kind="robot",
    name="aloha",
    summary="ALOHA: two arms of 6 joints and a gripper (14), cam_high and wrist cameras, in pi's joint conventions",
    settings=AlohaSettings,
    offers=offers,
    transforms="vla_robot_aloha.transforms:steps",
)
