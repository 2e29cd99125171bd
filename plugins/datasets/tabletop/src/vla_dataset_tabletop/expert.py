"""The scripted expert: waypoints from the simulator's own state, one small plan per family.

A plan is a generator that yields (goal [3], yaw error in rad, gripper) for one step at a time and reads the
environment anew at each step, so that disturbances and noise are corrected.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vla_dataset_tabletop.config import MOVE_SCALE, TURN_SCALE
from vla_dataset_tabletop.scene import BLOCK

OPEN, CLOSE = -1.0, 1.0
Waypoint = tuple[np.ndarray, float, float]


class Expert:
    """Acts in the episode that `env` is in."""

    def __init__(self, env):
        self.env = env
        self._plan = {"touch": _touch, "push": _push, "lift": _lift, "place": _place}[env.task.family](env)

    def act(self) -> np.ndarray:
        """The next action, float32 [7]. Translation keeps its direction when it is too long for one step."""
        goal, turn, grip = next(self._plan)
        move = (goal - self.env.eef) / MOVE_SCALE
        move /= max(1.0, float(np.linalg.norm(move)))
        return np.array([*move, 0, 0, np.clip(turn / TURN_SCALE, -1, 1), grip], np.float32)


def _near(env, goal: np.ndarray, within: float) -> bool:
    return bool(np.linalg.norm(goal - env.eef) < within)


def _turn_to_block(env) -> float:
    """Yaw in rad that lines the fingers up with the nearest pair of faces of the target."""
    hand = np.arctan2(env.rotation[1, 0], env.rotation[0, 0])
    return float((env.block_yaw(env.target) - hand + np.pi / 4) % (np.pi / 2) - np.pi / 4)


def _above(env, height: float) -> np.ndarray:
    return np.array([*env.block(env.target)[:2], height])


def _touch(env) -> Iterator[Waypoint]:
    while True:  # straight at the top of the block: from the start no other block is on that line; not at full speed
        way = _above(env, 2 * BLOCK) - env.eef
        yield env.eef + way * min(1.0, 0.6 * MOVE_SCALE / float(np.linalg.norm(way))), 0.0, CLOSE


def _push(env) -> Iterator[Waypoint]:
    away = np.array([0, 1 if env.task.where == "left" else -1, 0])  # from the block to the side we start from
    while not _near(env, goal := _above(env, 0.14) + 0.085 * away, 0.02):
        yield goal, 0.0, CLOSE
    while not _near(env, goal := _above(env, BLOCK + 0.01) + 0.085 * away, 0.015):
        yield goal, 0.0, CLOSE
    while True:  # aim a little ahead, at the block's own x, so that it does not slip past the finger
        ahead = env.eef - 0.03 * away
        yield np.array([env.block(env.target)[0], ahead[1], BLOCK + 0.01]), 0.0, CLOSE


def _grasp(env) -> Iterator[Waypoint]:
    """Over the block, down, close; when the block was lost on the way, again from the top."""
    while True:
        while not _near(env, goal := _above(env, 0.12), 0.02) or abs(_turn_to_block(env)) > 0.06:
            yield goal, _turn_to_block(env), OPEN
        for _ in range(15):
            goal = _above(env, BLOCK)
            if _near(env, goal, 0.008):
                break
            yield goal, _turn_to_block(env), OPEN
        for _ in range(3):
            yield env.eef, 0.0, CLOSE
        for _ in range(3):
            yield env.eef + [0, 0, 0.04], 0.0, CLOSE
        if np.linalg.norm(env.block(env.target) - env.eef) < 0.03:
            return


def _lift(env) -> Iterator[Waypoint]:
    while True:
        yield from _grasp(env)
        while np.linalg.norm(env.block(env.target) - env.eef) < 0.04:
            yield np.array([*env.eef[:2], 0.22]), 0.0, CLOSE


def _place(env) -> Iterator[Waypoint]:
    while True:
        yield from _grasp(env)
        while not _near(env, goal := _carry(env, 0.13), 0.02) and _holds(env):
            yield goal, 0.0, CLOSE
        while env.eef[2] > BLOCK + 0.012 and _holds(env):
            yield _carry(env, BLOCK + 0.005), 0.0, CLOSE
        for _ in range(3):
            yield env.eef, 0.0, OPEN
        for _ in range(8):
            yield np.array([*env.eef[:2], 0.18]), 0.0, OPEN


def _holds(env) -> bool:
    return bool(np.linalg.norm(env.block(env.target) - env.eef) < 0.045)


def _carry(env, height: float) -> np.ndarray:
    """Where the hand must be for the block it holds to be over the plate."""
    offset = env.eef[:2] - env.block(env.target)[:2]
    return np.array([*(env.plate()[:2] + offset), height])
