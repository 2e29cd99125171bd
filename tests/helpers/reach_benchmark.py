"""A benchmark of `vla-eval`, as small as can be: the state has to reach a target that only the picture shows."""

import numpy as np
from vla_eval.benchmarks.base import StepBenchmark, StepResult


class Reach(StepBenchmark):
    def __init__(self, send_state=False, send_wrist_image=False):
        super().__init__()
        self.send_state = send_state

    def get_tasks(self):
        return [{"name": "left", "suite": "reach"}, {"name": "right", "suite": "reach"}]

    def reset(self, task):
        self.target = np.array([-0.5, 0.25]) if task["name"] == "left" else np.array([0.5, 0.75])
        self.at = np.zeros(2)
        self.steps = 0
        return self.at

    def step(self, action):
        self.at = np.asarray(action["actions"], np.float64)
        self.steps += 1
        reached = bool(np.abs(self.at - self.target).max() <= 0.02)
        return StepResult(obs=self.at, reward=float(reached), done=reached, info={"success": reached})

    def make_obs(self, raw_obs, task):
        picture = np.zeros((32, 32, 3), np.uint8)
        picture[0, 0, :2] = np.round((self.target + 1) * 100)
        state = {"state": np.array([*raw_obs, 0.0], np.float32)} if self.send_state else {}
        return {"images": {"agentview": picture, "hand": picture}, "task_description": task["name"], **state}

    def get_step_result(self, step_result):
        return {"success": bool(step_result.info.get("success"))}

    def get_metadata(self):
        return {"max_steps": 12}

    def get_action_spec(self):
        return {}

    def get_observation_spec(self):
        return {}
