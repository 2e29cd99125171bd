"""The same weights and the same batch in PyTorch and JAX: losses, and gradients weight by weight."""

import numpy as np

import vla
from vla.testing import random_batch
from vla.testing.frameworks import installed, open_model, start_weights

size = {"spec.image_size": [16, 16], "spec.max_token_len": 12, "backbone.vision.depth": 1, "backbone.llm.depth": 1}
variant = vla.build(type="pi05", preset="tiny", set=size)
weights = start_weights(variant)
obs, actions, draws, _ = random_batch(variant)
found = {f: open_model(f, variant).gradients(weights, obs, actions, draws) for f in ("torch", "jax") if installed(f)}
for framework, (losses, _) in found.items():
    print(framework, {name: value.tolist() for name, value in losses.items()})
if len(found) == 2:
    (_, ours), (_, theirs) = found.values()
    apart = max(float(np.abs(ours[n] - theirs[n]).max()) / max(float(np.abs(ours[n]).max()), 1e-6) for n in ours)
    print(f"largest difference of a gradient, relative: {apart:.1e}")
