"""Meta-World as a Gymnasium environment whose observations are raw samples.

Action [4] in [-1, 1], at 80 Hz: motion of the hand (1 = 1 cm), gripper (-1 opens, +1 closes). State [4]: position of
the hand (m), opening of the gripper (1 = 10 cm): the first four numbers of Meta-World's observation. The rest of it,
the poses of objects and the goal, is seen by the experts only. Success, which ends an episode, is Meta-World's own.

The seed fixes the task and the scene, whatever was played before. (Meta-World's public way, a list of tasks with
pickled scenes, is not used.)
"""

from __future__ import annotations

import string
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

from vla.errors import DataError, PartError
from vla_dataset_metaworld import rendering
from vla_dataset_metaworld.config import (
    ACTION_NAMES,
    ACTION_UNITS,
    CAMERAS,
    HZ,
    STATE_NAMES,
    STATE_UNITS,
    TASKS,
    EnvSettings,
)

KEPT = 4  # tasks whose simulators stay open; making one takes a second


class _Simulator:
    """One task of Meta-World: its environment, which sees the goal, and its expert."""

    def __init__(self, task: str):
        rendering.prepare()
        try:
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS
            from metaworld.policies import ENV_POLICY_MAP
        except ModuleNotFoundError as error:
            raise PartError(
                "the simulator of env 'metaworld' is not installed", field="env", got=f"no module {error.name}",
                fix="pip install 'vla-dataset-metaworld[sim]'",
            ) from error  # fmt: skip
        self.env = ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
        self.policy = ENV_POLICY_MAP[f"{task}-v3"]()
        # Scenes drawn anew by the seed, and the goal in the observation, without the list of prepared tasks.
        self.env._set_task_called, self.env._partially_observable = True, False
        self.env._freeze_rand_vec, self.env.seeded_rand_vec = False, True
        self.env.__dict__.pop("sawyer_observation_space", None)  # computed when the goal was still hidden
        self.renderer: rendering.Renderer | None = None
        self.seen = np.zeros(39)

    def reset(self, seed: int) -> None:
        import mujoco

        self.env.seed(seed)
        self.seen, _ = self.env.reset()
        mujoco.mj_forward(self.env.model, self.env.data)  # marks are drawn where they are now

    def act(self) -> np.ndarray:
        """The expert's action [4]; it asks for more than the hand can do, so it is cut."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.clip(self.policy.get_action(self.seen), -1, 1).astype(np.float32)

    def frame(self, camera: str, size: int) -> np.ndarray:
        if self.renderer is None:
            self.renderer = rendering.Renderer(self.env.model, size)
        frame = self.renderer.frame(self.env.data, CAMERAS[camera])
        return np.ascontiguousarray(frame[::-1, ::-1]) if camera == "front" else frame  # that one hangs upside down

    def close(self) -> None:
        if self.renderer is not None:
            self.renderer.close()
        self.env.close()


class MetaWorldEnv(gymnasium.Env):
    """See the module. `options` of `reset`: {"task": ...}, one of the tasks in the settings."""

    metadata = {
        "render_modes": ["rgb_array"],
        "render_fps": HZ,
        "state_names": STATE_NAMES,
        "action_names": ACTION_NAMES,
        "units": {"state": STATE_UNITS, "actions": ACTION_UNITS},
        "noise_dims": 3,  # a recorder disturbs the motion only
        "relative_dims": 3,  # these actions are motions: 0 holds the arm
    }
    render_mode = "rgb_array"

    def __init__(self, settings: EnvSettings, seed: int | None = None, images: bool = True):
        self.settings, self.images = settings, images
        self._first_seed: int | None = settings.seed if seed is None else seed
        self._simulators: OrderedDict[str, _Simulator] = OrderedDict()
        self._use(settings.tasks[0])  # so that a missing simulator is said now
        space, s = gymnasium.spaces, settings.image_size
        image = {c: space.Box(0, 255, (s, s, 3), np.uint8) for c in CAMERAS} if images else {}
        self.observation_space = space.Dict(
            {
                "images": space.Dict(image),
                "state": space.Box(-10.0, 10.0, (4,), np.float32),
                "prompt": space.Text(max_length=80, charset=string.ascii_lowercase + " "),
            }
        )
        self.action_space = space.Box(-1.0, 1.0, (4,), np.float32)

    # --- Gymnasium

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """A new task and scene; the same seed and options give the same episode."""
        seed, self._first_seed = (self._first_seed if seed is None else seed), None
        super().reset(seed=seed)
        task = self.settings.tasks[int(self.np_random.integers(len(self.settings.tasks)))]
        scene = int(self.np_random.integers(2**31))
        self.task = str((options or {}).get("task", task))
        if self.task not in self.settings.tasks:
            raise DataError(
                "no such task here", field="options['task']", got=self.task, expected=f"one of {self.settings.tasks}"
            )
        self.simulator = self._use(self.task)
        self.simulator.reset(scene)
        self._steps, self._success = 0, False
        return self._observe(), self._info()

    def step(self, action):
        """One eightieth of a second. Reward 1 on success, which ends the episode."""
        action = np.asarray(action, np.float32)
        if action.shape != (4,) or not np.isfinite(action).all():
            raise DataError(
                "the environment cannot execute this action", field="action", got=action, expected="4 finite numbers"
            )
        sim = self.simulator
        sim.seen, _, _, _, info = sim.env.step(np.clip(action, -1, 1))
        self._steps += 1
        self._success = bool(info["success"])
        cut = self._steps >= self.settings.max_steps
        return self._observe(), float(self._success), self._success, cut, self._info()

    def render(self) -> np.ndarray:
        """The front camera, uint8 [s s 3]."""
        return self.simulator.frame("front", self.settings.image_size)

    def close(self) -> None:
        """Free simulators and renderers."""
        while self._simulators:
            self._simulators.popitem()[1].close()

    # --- what experts may look at

    def expert(self) -> Callable[[], np.ndarray]:
        """A callable () -> action [4]: Meta-World's scripted policy for the present task."""
        return self.simulator.act

    # --- inside

    def _use(self, task: str) -> _Simulator:
        if task not in self._simulators:
            while len(self._simulators) >= KEPT:
                self._simulators.popitem(last=False)[1].close()  # the one used longest ago
            self._simulators[task] = _Simulator(task)
        self._simulators.move_to_end(task)
        return self._simulators[task]

    def _observe(self) -> dict[str, Any]:
        size = self.settings.image_size
        images = {camera: self.simulator.frame(camera, size) for camera in CAMERAS} if self.images else {}
        state = np.asarray(self.simulator.seen[:4], np.float32)
        return {"images": images, "state": state, "prompt": TASKS[self.task]}

    def _info(self) -> dict[str, Any]:
        return {"success": self._success, "task": self.task, "instruction": TASKS[self.task]}


def make(settings: EnvSettings, seed: int | None = None, images: bool = True) -> MetaWorldEnv:
    """The environment; `images=False` leaves the cameras out of observations (fast, needs no renderer).

    Raises:
        PartError: Meta-World is not installed.
    """
    return MetaWorldEnv(settings, seed, images)
