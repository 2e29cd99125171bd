"""`lerobot`: LeRobotDataset v2.0, v2.1 and v3.0 from a local folder or the hub cache; writes v3.0.

`LeRobotDataset` (reader) and `LeRobotWriter` can be imported from here; they load numpy, pyarrow and PyAV on first use.
"""

from typing import TYPE_CHECKING, Any

from vla.parts import Part
from vla_dataset_lerobot.config import LeRobotSettings

if TYPE_CHECKING:
    from vla_dataset_lerobot.reader import LeRobotDataset
    from vla_dataset_lerobot.writer import LeRobotWriter

__all__ = ["PART", "LeRobotDataset", "LeRobotSettings", "LeRobotWriter"]

PART = Part(
    kind="dataset",
    name="lerobot",
    summary="LeRobotDataset v2.0, v2.1, v3.0 (folder or hub cache), images or video",
    settings=LeRobotSettings,
    offers=lambda settings, inner: {"robot": settings.robot},
    numpy="vla_dataset_lerobot.reader:LeRobotDataset",
)


def __getattr__(name: str) -> Any:
    if name == "LeRobotDataset":
        from vla_dataset_lerobot.reader import LeRobotDataset

        return LeRobotDataset
    if name == "LeRobotWriter":
        from vla_dataset_lerobot.writer import LeRobotWriter

        return LeRobotWriter
    raise AttributeError(name)
