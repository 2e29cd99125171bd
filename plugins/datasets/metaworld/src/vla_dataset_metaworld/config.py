"""Settings and constants of Meta-World. Tasks go by Meta-World's names without the version: `drawer-open`.

Meta-World has no instructions of its own; those below are ours. In its scenes there is one thing to do, so the pictures
alone name the task: what a policy does here says little about whether it listens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import field, frozen

from vla.errors import SettingsError
from vla.settings import Between, size

TASKS = {
    "assembly": "pick up the wrench and put its ring over the peg",
    "basketball": "dunk the basketball into the hoop",
    "bin-picking": "pick up the object and place it in the other bin",
    "box-close": "pick up the lid and put it on the box",
    "button-press": "press the button on the front of the box",
    "button-press-topdown": "press the button on top of the box",
    "button-press-topdown-wall": "reach over the wall and press the button on top of the box",
    "button-press-wall": "reach past the wall and press the button on the front of the box",
    "coffee-button": "press the button of the coffee machine",
    "coffee-pull": "pull the mug away from the coffee machine to the mark",
    "coffee-push": "push the mug under the coffee machine",
    "dial-turn": "turn the dial",
    "disassemble": "lift the ring of the wrench off the peg",
    "door-close": "close the door",
    "door-lock": "lock the door by turning the lock",
    "door-open": "open the door",
    "door-unlock": "unlock the door by turning the lock",
    "drawer-close": "close the drawer",
    "drawer-open": "open the drawer",
    "faucet-close": "turn the faucet to close it",
    "faucet-open": "turn the faucet to open it",
    "hammer": "pick up the hammer and drive the nail in",
    "hand-insert": "put the block into the hole with the hand",
    "handle-press": "press the handle down",
    "handle-press-side": "press the handle at the side down",
    "handle-pull": "pull the handle up",
    "handle-pull-side": "pull the handle at the side up",
    "lever-pull": "pull the lever up",
    "peg-insert-side": "pick up the peg and insert it into the hole from the side",
    "peg-unplug-side": "pull the peg out of the hole",
    "pick-out-of-hole": "pick the puck out of the hole and bring it to the mark",
    "pick-place": "pick up the puck and bring it to the mark",
    "pick-place-wall": "pick up the puck and bring it over the wall to the mark",
    "plate-slide": "slide the plate into the cabinet",
    "plate-slide-back": "slide the plate back out of the cabinet",
    "plate-slide-back-side": "slide the plate sideways out of the cabinet",
    "plate-slide-side": "slide the plate sideways into the cabinet",
    "push": "push the puck to the mark",
    "push-back": "pull the puck back to the mark",
    "push-wall": "push the puck around the wall to the mark",
    "reach": "move the hand to the mark",
    "reach-wall": "move the hand over the wall to the mark",
    "shelf-place": "pick up the puck and place it on the shelf",
    "soccer": "push the ball into the goal",
    "stick-pull": "pull the box with the stick",
    "stick-push": "push the box with the stick",
    "sweep": "sweep the puck off the table",
    "sweep-into": "sweep the puck into the hole",
    "window-close": "slide the window shut",
    "window-open": "slide the window open",
}
# Meta-World's own selection of ten.
MT10 = (
    "reach", "push", "pick-place", "door-open", "drawer-open", "drawer-close", "button-press-topdown",
    "peg-insert-side", "window-open", "window-close",
)  # fmt: skip
FEW = ("drawer-open", "drawer-close", "window-open", "button-press-topdown", "pick-place")

HZ = 80
LIMIT = 500  # steps after which Meta-World itself ends an episode
CAMERAS = {"front": "corner4", "wrist": "gripperPOV"}  # ours -> Meta-World's
PLACES = {"front": ("base_0_rgb",), "wrist": ("left_wrist_0_rgb", "wrist_0_rgb")}  # camera -> its name in a model
ACTION_NAMES = ("dx", "dy", "dz", "gripper")
ACTION_UNITS = ("1 cm",) * 3 + ("-1 open, +1 close",)
STATE_NAMES = ("x", "y", "z", "opening")
STATE_UNITS = ("m",) * 3 + ("10 cm",)


def _known_tasks(settings: object, attribute: Any, value: tuple[str, ...]) -> None:
    unknown = [name for name in value if name not in TASKS]
    if unknown or not value:
        raise SettingsError(
            "no such task" if unknown else "no task", field=attribute.name, got=unknown or value,
            expected=f"some of {', '.join(TASKS)}",
        )  # fmt: skip


@frozen
class EnvSettings:
    """The environment.

    Attributes:
        tasks: Meta-World's names without the version; an episode's task is drawn from them evenly.
        image_size: height and width of both cameras in pixels.
        max_steps: steps at 80 Hz after which an episode is cut; Meta-World's own limit is 500. The experts need 35 to
            210, in push-back up to 350.
        seed: the seed of the first `reset()` that is not given one.
    """

    tasks: tuple[str, ...] = field(default=FEW, converter=tuple, validator=_known_tasks)
    image_size: int = field(default=96, validator=Between(16, 640))
    max_steps: int = field(default=250, validator=Between(1, LIMIT))
    seed: int = size(0, most=2**63 - 1, least=0)


@frozen
class RobotSettings:
    """The robot adapter.

    Attributes:
        cameras: "model=robot" pairs instead of the usual places, e.g. "base_0_rgb=wrist".
    """

    cameras: tuple[str, ...] = ()


@frozen
class DatasetSettings:
    """Demonstrations by the scripted experts: the environment's settings, and how many.

    Attributes:
        path: folder of the LeRobotDataset; recorded there when it does not exist. "": a cache folder.
        episodes: demonstrations to record.
        noise: sd of the noise added to the executed motion in half of the episodes, while the recorded action stays the
            expert's (as in DART, Laskey et al. 2017): the policy sees how to recover.
        workers: processes that record.
    """

    path: str = ""
    episodes: int = field(default=100, validator=Between(1, 1_000_000))
    noise: float = field(default=0.1, validator=Between(0, 1))
    workers: int = field(default=2, validator=Between(1, 64))
    tasks: tuple[str, ...] = field(default=FEW, converter=tuple, validator=_known_tasks)
    image_size: int = field(default=96, validator=Between(16, 640))
    max_steps: int = field(default=250, validator=Between(1, LIMIT))
    seed: int = size(0, most=2**63 - 1, least=0)

    def env(self) -> EnvSettings:
        """The settings of the environment that is recorded."""
        return EnvSettings(tasks=self.tasks, image_size=self.image_size, max_steps=self.max_steps, seed=self.seed)


def robot_offers(settings: RobotSettings, inner: Mapping[str, Any]) -> dict[str, object]:
    """Facets of the robot; `cameras` are the names in a model that it can fill."""
    cameras = tuple(pair.partition("=")[0].strip() for pair in settings.cameras)
    cameras = cameras or tuple(names[0] for names in PLACES.values())
    return {"state_dim": len(STATE_NAMES), "action_dim": len(ACTION_NAMES), "cameras": cameras, "hz": HZ}
