"""Settings and constants of the tabletop. Lengths in metres, angles in radians."""

from __future__ import annotations

from attrs import field, frozen, validators

from vla.errors import SettingsError
from vla.settings import Between, number, size

FAMILIES = ("touch", "push", "lift", "place")
# Far apart in hue, so that 64 x 64 pixels are enough to tell them apart.
COLORS = {
    "red": (0.86, 0.10, 0.10),
    "green": (0.08, 0.62, 0.16),
    "blue": (0.12, 0.28, 0.92),
    "yellow": (0.97, 0.83, 0.08),
    "purple": (0.62, 0.18, 0.78),
    "cyan": (0.10, 0.78, 0.85),
}
PLATES = {"white": (0.97, 0.97, 0.97), "black": (0.07, 0.07, 0.07)}
SIDES = ("left", "right")  # as the front camera sees it: left is -y, right is +y

HZ = 10
MOVE_SCALE = 0.05  # metres of motion asked for by a translation action of 1
TURN_SCALE = 0.5  # radians of rotation asked for by a rotation action of 1
CAMERAS = ("front", "wrist")
PLACES = {"front": ("base_0_rgb",), "wrist": ("left_wrist_0_rgb", "wrist_0_rgb")}  # camera -> its name in a model
ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
ACTION_UNITS = ("5 cm",) * 3 + ("0.5 rad",) * 3 + ("-1 open, +1 close",)
POSITION = 3  # of the numbers of the state, those that say where the hand is
STATE_NAMES = ("x", "y", "z", "rx", "ry", "rz", "finger_left", "finger_right")
STATE_UNITS = ("m",) * 3 + ("rad",) * 3 + ("m",) * 2


def _known(allowed: tuple[str, ...]):
    def check(settings: object, attribute: object, value: tuple[str, ...]) -> None:
        unknown = [v for v in value if v not in allowed]
        if unknown or not value:
            raise SettingsError(f"{attribute.name}: {unknown or 'an empty list'} is not among {list(allowed)}")

    return check


@frozen
class EnvSettings:
    """The environment.

    Attributes:
        families: what instructions ask for, drawn evenly. `touch` is the easy one.
        colors: block colours that occur; a scene shows `n_blocks` different ones.
        image_size: height and width of both cameras in pixels.
        n_blocks: blocks in a scene.
        spread: how far from the middle of the table the hand starts, in metres: up to this much forth, back and to each
            side, and 0.4 of it in height. Where starts differ little, the pose tells a policy where it was going.
        lanes: every block has a lane of its own from near to far, in the order of `colors`, and stands anywhere along
            it: the instruction then names the lane, and only the pictures say where in it. Otherwise a policy has to
            find the named colour first, which takes a small one far longer. Needs families without plates.
        looks: how much scenes differ in the colour of the table and in the light, from 0 (all alike) to 1. What looks
            alike pixel by pixel is then no longer what is alike.
        max_steps: steps at 10 Hz after which an episode is cut; 0: 30 for touch alone, else 80.
        seed: the seed of the first `reset()` that is not given one.
    """

    families: tuple[str, ...] = field(default=FAMILIES, converter=tuple, validator=_known(FAMILIES))
    colors: tuple[str, ...] = field(default=tuple(COLORS), converter=tuple, validator=_known(tuple(COLORS)))
    image_size: int = field(default=96, validator=Between(16, 640))
    n_blocks: int = field(default=3, validator=Between(1, 4))
    spread: float = field(default=0.03, validator=Between(0, 0.15))
    lanes: bool = False
    looks: float = field(default=0.0, validator=Between(0, 1))
    max_steps: int = field(default=0, validator=Between(0, 10_000))
    seed: int = size(0, most=2**63 - 1, least=0)

    def __attrs_post_init__(self) -> None:
        if self.lanes and "place" in self.families:
            raise SettingsError(
                "lanes leave no room for plates", field="lanes", got=True, fix='families without "place"'
            )
        if len(set(self.colors)) < self.n_blocks:
            raise SettingsError(
                "fewer colours than blocks", field="colors", got=self.colors, expected=f"at least {self.n_blocks}"
            )

    @property
    def steps(self) -> int:
        """The length at which an episode is cut."""
        return self.max_steps or (30 if self.families == ("touch",) else 80)


@frozen
class RobotSettings:
    """The robot adapter.

    Attributes:
        cameras: "model=robot" pairs instead of the usual places, e.g. "base_0_rgb=wrist".
        state: what a policy is told of the arm: "full" (8 numbers) or "position" (the first 3). In the easy family the
            hand never turns or grips; normalised, the other five numbers are amplified noise.
    """

    cameras: tuple[str, ...] = ()
    state: str = field(default="full", validator=validators.in_(("full", "position")))

    def offers(self) -> dict[str, object]:
        """Facets of a robot; `cameras` are the names in a model that it can fill."""
        cameras = tuple(pair.partition("=")[0].strip() for pair in self.cameras)
        cameras = cameras or tuple(names[0] for names in PLACES.values())
        width = len(STATE_NAMES) if self.state == "full" else POSITION
        return {"state_dim": width, "action_dim": len(ACTION_NAMES), "cameras": cameras, "hz": HZ}


@frozen
class DatasetSettings:
    """Demonstrations by the scripted expert: the environment's settings, and how many.

    Attributes:
        path: folder of the LeRobotDataset; recorded there when it does not exist. "": a cache folder.
        episodes: demonstrations to record.
        noise: sd of the noise added to the executed translation in half of the episodes, while the recorded
            action stays the expert's (as in DART, Laskey et al. 2017): the policy sees how to recover.
        workers: processes that record.
    """

    path: str = ""
    episodes: int = field(default=200, validator=Between(1, 1_000_000))
    noise: float = number(0.15, most=10)
    workers: int = field(default=2, validator=Between(1, 64))
    families: tuple[str, ...] = field(default=FAMILIES, converter=tuple, validator=_known(FAMILIES))
    colors: tuple[str, ...] = field(default=tuple(COLORS), converter=tuple, validator=_known(tuple(COLORS)))
    image_size: int = field(default=96, validator=Between(16, 640))
    n_blocks: int = field(default=3, validator=Between(1, 4))
    spread: float = field(default=0.03, validator=Between(0, 0.15))
    lanes: bool = False
    looks: float = field(default=0.0, validator=Between(0, 1))
    max_steps: int = field(default=0, validator=Between(0, 10_000))
    seed: int = size(0, most=2**63 - 1, least=0)

    def env(self) -> EnvSettings:
        """The settings of the environment that is recorded."""
        return EnvSettings(
            families=self.families,
            colors=self.colors,
            image_size=self.image_size,
            n_blocks=self.n_blocks,
            spread=self.spread,
            lanes=self.lanes,
            looks=self.looks,
            max_steps=self.max_steps,
            seed=self.seed,
        )
