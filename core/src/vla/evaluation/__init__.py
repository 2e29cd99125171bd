"""Closed-loop evaluation: rollouts, baselines, videos. It talks to the `Acts` interface of `vla.policy` only."""

from vla.evaluation.baselines import MeanAction, NearestNeighbour
from vla.evaluation.results import Episode, Evaluation, wilson
from vla.evaluation.rollout import Clip, evaluate

__all__ = ["Clip", "Episode", "Evaluation", "MeanAction", "NearestNeighbour", "evaluate", "wilson"]
