"""`vla demo`: the whole story on this machine, offline, without questions.

Every stage is one call of the public API; what is printed between them is all this file adds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vla.cli import console
from vla.errors import SettingsError

# Demonstrations, training steps, episodes per evaluation. The budget is steps, not minutes: a slow machine that stopped
# after 930 of them reached 43 of 50, and 12 of 50 with the pictures of another scene.
FULL = {"demonstrations": 1500, "steps": 1600, "episodes": 50}
QUICK = {"demonstrations": 40, "steps": 20, "episodes": 6}
EXECUTE = 4  # steps executed of each chunk
BATCH = 32
# From scratch, a convolutional encoder sees in half the steps of a SigLIP of its size. Four (noise, time) draws per
# observation cost a tenth of a step and steady the chunk loss.
SETTINGS = {"backbone.vision": "convnet", "head.actions.draws": 4}
NOISE = 0.3  # on executed actions in half of the demonstrations, so that they show how to recover
HELD_OUT_SEED = 1  # of demonstrations that training does not see
CALIBRATION = 30  # steps that measure this machine


def demo(quick: bool = False, out: Path = Path("runs/demo"), steps: int = 0, seed: int = 0) -> int:
    """Compose a policy with knowledge insulation from plugins, train it on demonstrations, watch it act.

    Args:
        quick: a minute in all: too little to learn, enough to see that everything works.
        out: the folder for everything that is made; an earlier demo in it is replaced.
        steps: of training; 0: 1,600 (how long they take on this machine is said first), or 20 with --quick.
        seed: everything random follows from it.
    """
    plan: dict[str, Any] = dict(QUICK if quick else FULL)
    if steps < 0:
        raise SettingsError("no number of steps", field="--steps", got=steps, expected="0 or more")
    plan["steps"] = steps or plan["steps"]
    began = time.perf_counter()
    page = run(out.expanduser(), plan, seed)
    took = (time.perf_counter() - began) / 60
    console.note(f"\ndone in {took:.1f} minutes. Open this in a browser:\n  {page.resolve()}")
    return 0


def run(out: Path, plan: dict[str, Any], seed: int = 0) -> Path:
    """The stages; gives the path of the page."""
    import vla
    from vla.cli.show import variant_page
    from vla.datasets import open_dataset
    from vla.evaluation import MeanAction, NearestNeighbour
    from vla.evaluation.summary import name_of
    from vla.files import refuse_taken
    from vla.policy import untrained
    from vla.report.story import KIND, Story, write_story

    refuse_taken(out / "report", KIND, True)  # now, not after the minutes of training
    _one_thread()
    say = _Stages(6)
    say(
        "compose: vla build --head ki --tokenizer fast --backbone paligemma --set backbone.vision=convnet "
        "--robot tabletop --preset tiny"
    )
    variant = vla.build(
        head="ki", tokenizer="fast", backbone="paligemma", robot="tabletop", preset="tiny", set=SETTINGS
    )
    console.show(*variant_page(variant))

    say(f"demonstrations: {plan['demonstrations']} by a scripted expert (recorded once, then reused)")
    task = {"part": "tabletop", "preset": "tiny"}
    data = open_dataset({**task, "episodes": plan["demonstrations"], "noise": NOISE})
    unseen = open_dataset({**task, "episodes": 5, "seed": HELD_OUT_SEED})
    console.note(f"{len(data.episodes)} episodes, {len(data)} frames: {', '.join(data.info.tasks)}")

    say("train: statistics, FAST tokenizer, then both losses in one pass")
    steps = plan["steps"]
    if steps > CALIBRATION:
        console.note(_forecast(variant, data, steps, seed))
    history: list[dict[str, Any]] = []
    result = vla.train(
        variant, data, out=out / "train", config=config(steps, seed), overwrite=True,
        listeners=[lambda event, record: history.append({"event": event, **record})],
    )  # fmt: skip

    losses = ", ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in result.metrics.items() if k.startswith("loss/"))
    console.note(f"after {result.step} steps: {losses}; {result.metrics['samples_per_s']:.0f} samples/s")

    say(f"reopen: vla.open({str(result.model)!r})")
    policy = vla.open(result.model, seed=seed)
    beginner = untrained(variant, policy.model.stats, policy.model.tokenizer, seed=seed)

    say(f"act: {plan['episodes']} episodes each, closed loop, scenes that no demonstration showed")
    films: list[Any] = []
    found = []
    contestants: list[tuple[Any, dict[str, Any]]] = [
        (policy, {}), (policy, {"instruction": "shuffled"}), (policy, {"pictures": "swapped"}),
        (beginner, {}), (MeanAction(data, EXECUTE), {}), (NearestNeighbour(data, EXECUTE), {}),
    ]  # fmt: skip
    for acting, control in contestants:
        one = vla.evaluate(
            acting, task, episodes=plan["episodes"], seed=seed, execute=EXECUTE, num_envs=10, **control,
            clips=3 if not films else 0, on_clip=films.append,
        )  # fmt: skip
        found.append(one)
        console.note(f"  {name_of(one)}: {one}")

    say("write the page")
    story = Story(variant, data, unseen, policy, history, found, films, steps)
    return write_story(out / "report", story)


def _one_thread() -> None:
    """A model this small is fastest on one core: two threads took twice the time per step, waiting for each other."""
    import torch

    torch.set_num_threads(1)


def config(steps: int, seed: int) -> Any:
    """The training run of the demo."""
    from vla.training.config import TrainConfig

    return TrainConfig(
        steps=steps, batch_size=BATCH, seed=seed, lr=2e-3, precision="bfloat16", ema_decay=0.99, log_every=5,
        save_every=max(steps, 1), keep_last=1, device="auto",
    )  # fmt: skip


def _forecast(variant: Any, data: Any, steps: int, seed: int) -> str:
    """How long the steps will take, measured by doing a few."""
    import tempfile

    import vla

    speeds: list[float] = []
    with tempfile.TemporaryDirectory(prefix="vla-demo-") as scratch:
        vla.train(
            variant, data, out=scratch, config=config(CALIBRATION, seed),
            listeners=[lambda event, record: speeds.append(record["samples_per_s"]) if event == "step" else None],
        )  # fmt: skip
    speed = max(speeds)  # what else runs here now may be over soon
    minutes = steps * BATCH / speed / 60
    return f"{speed:.0f} samples/s on this machine: {steps} steps of {BATCH} take about {minutes:.0f} minutes"


class _Stages:
    """Numbers what is going on, with the time since the start."""

    def __init__(self, count: int, clock: Callable[[], float] = time.perf_counter):
        self.count, self.now, self.clock, self.began = count, 0, clock, clock()

    def __call__(self, text: str) -> None:
        self.now += 1
        console.note(f"\n[{self.now}/{self.count}] {self.clock() - self.began:4.0f} s  {text}")


def main(argv: list[str]) -> int:
    """The verb."""
    return console.call(demo, "demo", argv)
