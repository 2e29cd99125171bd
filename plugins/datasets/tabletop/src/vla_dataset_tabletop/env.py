"""The tabletop as a Gymnasium environment.

Action [7] in [-1, 1], at 10 Hz, as in LIBERO: translation (1 = 5 cm), rotation vector in the world frame
(1 = 0.5 rad), gripper (negative: open, else close). State [8]: end-effector position (m), axis-angle (rad), two finger
positions (m). Observations are raw samples: {"images": {"front", "wrist": uint8 [s s 3]}, "state", "prompt"}.

Success, always physical and always of what the instruction names:
touch: the fingertips come within 2 cm of the named block's surface before any other block's (that ends the episode).
push: the named block moved 6 cm to the named side (as the front camera sees it), other blocks less than 4 cm.
lift: the named block is 10 cm up, held. place: it rests on the named plate, released, the hand 6 cm up.
"""

from __future__ import annotations

import string
from typing import Any

import gymnasium
import mujoco
import numpy as np
from attrs import frozen

from vla.errors import DataError
from vla_dataset_tabletop.config import (
    ACTION_NAMES,
    ACTION_UNITS,
    CAMERAS,
    COLORS,
    HZ,
    MOVE_SCALE,
    PLATES,
    SIDES,
    STATE_NAMES,
    STATE_UNITS,
    TURN_SCALE,
    EnvSettings,
)
from vla_dataset_tabletop.rendering import Renderer
from vla_dataset_tabletop.scene import BLOCK, LIMITS, TABLE, mjcf

TOUCH = 0.02
HOME = np.array([0, 0.35, 0, -2.1, 0, 2.45, np.pi / 4])
START = np.array([0.36, 0.0, 0.20])
DOWN = np.diag([1.0, -1.0, -1.0])  # the hand points down
AREA = ((0.24, -0.20), (0.50, 0.20))  # where blocks and plates are put
APART = 0.115  # least distance of their centres


@frozen
class Task:
    """What is asked for: the block by colour, and for `place` the plate, for `push` the side."""

    family: str
    block: str
    where: str = ""

    def __str__(self) -> str:
        texts = {
            "touch": f"touch the {self.block} block",
            "lift": f"pick up the {self.block} block",
            "place": f"put the {self.block} block on the {self.where} plate",
            "push": f"push the {self.block} block to the {self.where}",
        }
        return texts[self.family]


class TabletopEnv(gymnasium.Env):
    """See the module. `options` of `reset`: {"family": ...} or {"instruction": ...}, one of `instructions()`."""

    metadata = {
        "render_modes": ["rgb_array"],
        "render_fps": HZ,
        "state_names": STATE_NAMES,
        "action_names": ACTION_NAMES,
        "units": {"state": STATE_UNITS, "actions": ACTION_UNITS},
        "noise_dims": 3,  # a recorder disturbs the translation only
        "relative_dims": 6,  # these actions are motions: 0 holds the arm
    }
    render_mode = "rgb_array"

    def __init__(self, settings: EnvSettings, seed: int | None = None, images: bool = True):
        self.settings, self.images = settings, images
        self._first_seed: int | None = settings.seed if seed is None else seed
        plates = 2 if "place" in settings.families else 0
        self.model = mujoco.MjModel.from_xml_string(mjcf(settings.n_blocks, plates))
        self.data = mujoco.MjData(self.model)
        self._plan = mujoco.MjData(self.model)  # where inverse kinematics tries joint angles
        self._renderer: Renderer | None = None
        self._site = self.model.site("eef").id
        self._fingers = [self.model.joint(f).qposadr[0] for f in ("left", "right")]
        self._blocks = [self.model.joint(f"block{i}").qposadr[0] for i in range(settings.n_blocks)]
        self._n_plates = plates
        self._substeps = round(1 / HZ / self.model.opt.timestep)
        s = settings.image_size
        space = gymnasium.spaces
        image = {c: space.Box(0, 255, (s, s, 3), np.uint8) for c in CAMERAS} if images else {}
        self.observation_space = space.Dict(
            {
                "images": space.Dict(image),
                "state": space.Box(-10.0, 10.0, (8,), np.float32),
                "prompt": space.Text(max_length=80, charset=string.ascii_lowercase + " "),
            }
        )
        self.action_space = space.Box(-1.0, 1.0, (7,), np.float32)

    # --- Gymnasium

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """A new scene and instruction; the same seed and options give the same episode."""
        seed, self._first_seed = (self._first_seed if seed is None else seed), None
        super().reset(seed=seed)
        self._draw_scene()
        tasks = self._feasible()
        chosen = self.settings.families[int(self.np_random.integers(len(self.settings.families)))]
        pick = int(self.np_random.integers(2**31))
        options = options or {}
        wanted = [t for t in tasks if t.family == options.get("family", chosen)] or tasks
        if "instruction" in options:
            wanted = [t for t in tasks if str(t) == options["instruction"]]
            if not wanted:
                raise DataError(
                    "this scene has no such instruction",
                    field="options['instruction']",
                    got=options["instruction"],
                    expected=f"one of {[str(t) for t in tasks]}",
                )
        self.task = wanted[pick % len(wanted)]
        self.target = self.colors.index(self.task.block)
        self._start = np.array([self.block(i) for i in range(len(self._blocks))])
        self._steps = 0
        self._touched = ""
        if self.settings.looks:  # last, so that the same seed is the same task however it looks
            self._draw_looks()
        return self._observe(), self._info()

    def step(self, action):
        """One tenth of a second. Reward 1 on success, which ends the episode."""
        action = np.asarray(action, np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise DataError(
                "the environment cannot execute this action", field="action", got=action, expected="7 finite numbers"
            )
        action = np.clip(action, -1, 1)
        goal = np.clip(self.eef + MOVE_SCALE * action[:3], *LIMITS)
        turn = TURN_SCALE * action[3:6]
        if (angle := np.linalg.norm(turn)) > 1e-9:
            quat, mat = np.zeros(4), np.zeros(9)
            mujoco.mju_axisAngle2Quat(quat, turn / angle, angle)
            mujoco.mju_quat2Mat(mat, quat)
            self.rotation = mat.reshape(3, 3) @ self.rotation
        self._plan.qpos[:7] = self.data.ctrl[:7]
        self.data.ctrl[:7] = self._solve(goal, self.rotation)
        self.data.ctrl[7:] = 0.04 if action[6] < 0 else 0.0
        if self.task.family == "touch":  # a tip that passes by within one step counts too
            for _ in range(5):
                mujoco.mj_step(self.model, self.data, self._substeps // 5)
                self._touched = self._touched or self._touching()
        else:
            mujoco.mj_step(self.model, self.data, self._substeps)
        self._steps += 1
        done = self.success()
        ended = done or (self.task.family == "touch" and bool(self._touched))
        return self._observe(), float(done), ended, self._steps >= self.settings.steps, self._info()

    def render(self) -> np.ndarray:
        """The front camera, uint8 [s s 3]."""
        return self.frame("front")

    def close(self) -> None:
        """Free the renderer."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    # --- what experts and reports may look at

    def instructions(self) -> list[str]:
        """Every instruction that could be given in the present scene."""
        return [str(t) for t in self._feasible()]

    def expert(self):
        """A callable () -> action [7] that solves the present episode from the simulator's own state."""
        from vla_dataset_tabletop.expert import Expert

        return Expert(self).act

    def frame(self, camera: str) -> np.ndarray:
        """uint8 [s s 3]."""
        if self._renderer is None:
            self._renderer = Renderer(self.model, self.settings.image_size)
        return self._renderer.frame(self.data, camera)

    @property
    def eef(self) -> np.ndarray:
        """Position of the fingertips [3]."""
        return self.data.site_xpos[self._site].copy()

    def block(self, i: int) -> np.ndarray:
        """Position of block i [3]."""
        return self.data.qpos[self._blocks[i] : self._blocks[i] + 3].copy()

    def block_yaw(self, i: int) -> float:
        """Rotation of block i about the vertical, up to quarter turns, in [-pi/4, pi/4)."""
        w, x, y, z = self.data.qpos[self._blocks[i] + 3 : self._blocks[i] + 7]
        yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
        return float((yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4)

    def moved(self, i: int) -> np.ndarray:
        """How far block i is from where it started [3]."""
        return self.block(i) - self._start[i]

    def plate(self) -> np.ndarray:
        """Position of the plate that the task names [3]."""
        return self.data.mocap_pos[self.plates.index(self.task.where)].copy()

    def state(self) -> np.ndarray:
        """float32 [8], see the module."""
        quat, turn = np.zeros(4), np.zeros(3)
        mujoco.mju_mat2Quat(quat, self.data.site_xmat[self._site])
        mujoco.mju_quat2Vel(turn, quat, 1.0)
        if turn[0] < 0:  # the hand points down: pi about x, and -pi about x is the same; keep one of them
            turn -= 2 * np.pi * turn / np.linalg.norm(turn)
        return np.concatenate([self.eef, turn, self.data.qpos[self._fingers]]).astype(np.float32)

    def success(self) -> bool:
        """Whether the instruction is fulfilled now."""
        task, block = self.task, self.block(self.target)
        if task.family == "touch":
            return self._touched == task.block
        if task.family == "lift":
            return bool(block[2] > BLOCK + 0.08 and np.linalg.norm(block - self.eef) < 0.05)
        if task.family == "place":
            on = np.linalg.norm(block[:2] - self.plate()[:2]) < 0.045 and block[2] < BLOCK + 0.015
            return bool(on and self.data.qpos[self._fingers[0]] > 0.032 and self.eef[2] > 0.06)
        others = [np.linalg.norm(self.moved(i)[:2]) for i in range(len(self._blocks)) if i != self.target]
        sideways = self.moved(self.target)[1] * (-1 if task.where == "left" else 1)
        return bool(sideways > 0.06 and all(far < 0.04 for far in others))

    # --- inside

    def _draw_scene(self) -> None:
        rng, m, d = self.np_random, self.model, self.data
        mujoco.mj_resetData(m, d)
        self.colors = [str(c) for c in rng.choice(list(self.settings.colors), len(self._blocks), replace=False)]
        if self.settings.lanes:
            self.colors.sort(key=self.settings.colors.index)
        self.plates = [str(p) for p in rng.permutation(list(PLATES))][: self._n_plates]
        for i, color in enumerate(self.colors):
            m.geom(f"block{i}").rgba[:3] = COLORS[color]
        for i, color in enumerate(self.plates):
            m.geom(f"plate{i}").rgba[:3] = PLATES[color]
        spots = self._spots(len(self._blocks) + self._n_plates)
        for i, address in enumerate(self._blocks):
            yaw = rng.uniform(-np.pi / 5, np.pi / 5)
            d.qpos[address : address + 7] = [*spots[i], BLOCK, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        for i in range(self._n_plates):
            d.mocap_pos[i] = [*spots[len(self._blocks) + i], 0.002]
        d.qpos[:7], d.qpos[self._fingers] = HOME, 0.04
        self.rotation = DOWN.copy()
        self._plan.qpos[:] = d.qpos
        start = START + self.settings.spread * rng.uniform(-1, 1, 3) * (1, 1, 0.4)
        d.qpos[:7] = self._solve(start, self.rotation, 200)
        d.ctrl[:7], d.ctrl[7:] = d.qpos[:7], 0.04
        mujoco.mj_forward(m, d)

    def _draw_looks(self) -> None:
        """Another table and another light, so far from the usual ones as `looks` says."""
        rng, m, far = self.np_random, self.model, self.settings.looks
        m.geom("table").rgba[:3] = np.clip(TABLE + far * rng.uniform(-0.35, 0.25, 3), 0, 1)
        bright = 1 + far * rng.uniform(-0.4, 0.2)
        m.vis.headlight.ambient[:] = m.vis.headlight.diffuse[:] = 0.475 * bright
        m.light_pos[0] = (0.3, -0.5 + far * rng.uniform(0, 1), 1.6)
        mujoco.mj_camlight(m, self.data)

    def _spots(self, n: int) -> list[np.ndarray]:
        if self.settings.lanes:
            (near, left), (far, right) = AREA
            across = 0.75 * np.linspace(left, right, n) + self.np_random.uniform(-0.03, 0.03, n)
            return list(np.stack([self.np_random.uniform(near, far, n), across], 1))
        while True:  # draw again from scratch when the table is badly filled
            spots: list[np.ndarray] = []
            for _ in range(200):
                spot = self.np_random.uniform(*AREA)
                if all(np.linalg.norm(spot - other) > APART for other in spots):
                    spots.append(spot)
                    if len(spots) == n:
                        return spots

    def _feasible(self) -> list[Task]:
        tasks = []
        for color in self.colors:
            for family in self.settings.families:
                choices = {"place": self.plates, "push": SIDES}.get(family, ("",))
                tasks += [Task(family, color, c) for c in choices if family != "push" or self._lane_free(color, c)]
        return tasks

    def _lane_free(self, color: str, side: str) -> bool:
        """Whether no other block is where the hand comes down or where the pushed block goes."""
        sign = -1 if side == "left" else 1
        i = self.colors.index(color)
        for j in range(len(self._blocks)):
            gap = self.block(j) - self.block(i)
            if j != i and abs(gap[0]) < 0.10 and -0.15 < sign * gap[1] < 0.18:
                return False
        return True

    def _touching(self) -> str:
        """Colour of the block whose surface the fingertips are within `TOUCH` of, or ""."""
        for i, color in enumerate(self.colors):
            rotation = np.zeros(9)
            mujoco.mju_quat2Mat(rotation, self.data.qpos[self._blocks[i] + 3 : self._blocks[i] + 7])
            local = rotation.reshape(3, 3).T @ (self.eef - self.block(i))
            if np.linalg.norm(np.maximum(np.abs(local) - BLOCK, 0)) < TOUCH:
                return color
        return ""

    def _solve(self, position: np.ndarray, rotation: np.ndarray, iterations: int = 12) -> np.ndarray:
        """Joint angles [7] that bring the fingertips there: damped least squares, pulled to HOME in the null space."""
        m, d = self.model, self._plan
        move, turn = np.zeros((3, m.nv)), np.zeros((3, m.nv))
        for _ in range(iterations):
            mujoco.mj_kinematics(m, d)
            mujoco.mj_comPos(m, d)
            gap = position - d.site_xpos[self._site]
            r = rotation @ d.site_xmat[self._site].reshape(3, 3).T
            twist = 0.5 * np.array([r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]])
            if np.abs(gap).max() < 5e-4 and np.abs(twist).max() < 2e-3:
                break
            mujoco.mj_jacSite(m, d, move, turn, self._site)
            jac = np.vstack([move, turn])[:, :7]
            damped = np.linalg.solve(jac @ jac.T + 1e-4 * np.eye(6), np.eye(6))
            step = jac.T @ (damped @ np.concatenate([gap, twist]))
            step += (np.eye(7) - jac.T @ damped @ jac) @ (0.05 * (HOME - d.qpos[:7]))
            d.qpos[:7] = np.clip(d.qpos[:7] + step, m.jnt_range[:7, 0], m.jnt_range[:7, 1])
        return d.qpos[:7].copy()

    def _observe(self) -> dict[str, Any]:
        images = {c: self.frame(c) for c in CAMERAS} if self.images else {}
        return {"images": images, "state": self.state(), "prompt": str(self.task)}

    def _info(self) -> dict[str, Any]:
        return {"success": self.success(), "task": self.task.family, "instruction": str(self.task)}


def make(settings: EnvSettings, seed: int | None = None, images: bool = True) -> TabletopEnv:
    """The environment; `images=False` leaves the cameras out of observations (fast, needs no renderer)."""
    return TabletopEnv(settings, seed, images)
