"""What an absent camera and a padded prompt cost at inference: sampling with and without `pack`, side by side.

    python benchmarks/bench_absent.py [--preset small] [--repeats 7]

Prints a table of process CPU seconds (one thread; medians of interleaved runs) and ratios, as Markdown.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from attrs import evolve

from vla.compose import build
from vla.contracts import pack
from vla.testing.batches import random_batch
from vla.torch_kit.model import build_model, observation_to


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cameras = 'spec.cameras=["base_0_rgb","left_wrist_0_rgb","right_wrist_0_rgb"]'
    variant = build(type="pi05", preset=args.preset, set=(cameras, "spec.max_token_len=200"))
    model = build_model(variant)
    obs, _, _, noise = random_batch(variant, batch=1)
    short = np.arange(200) < 40
    obs = evolve(obs, tokenized_prompt_mask=short[None], image_masks={n: np.ones(1, bool) for n in obs.images})
    absent = evolve(obs, image_masks={**obs.image_masks, "right_wrist_0_rgb": np.zeros(1, bool)})
    cases = {
        "3 cameras, prompt padded to 200": obs,
        "2 of 3 cameras, nothing dropped": absent,
        "3 cameras, prompt trimmed (40 of 200)": pack(obs),
        "2 of 3 cameras, absent one dropped, prompt trimmed": pack(absent),
    }
    noise = torch.as_tensor(noise)
    times = {name: [] for name in cases}
    for _ in range(args.repeats):
        for name, case in cases.items():
            ready, start = observation_to(case, "cpu"), time.process_time()
            model.sample(ready, noise)
            times[name].append(time.process_time() - start)
    base = statistics.median(times["3 cameras, prompt padded to 200"])
    print(f"pi05, preset {args.preset}, batch 1, 10 Euler steps, float32, one thread\n")
    print("| case | CPU ms (median) | ratio |\n|---|---|---|")
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        print(f"| {name} | {middle * 1e3:.0f} | {middle / base:.2f} |")


if __name__ == "__main__":
    main()
