"""The stored cases of goldens/openpi: found by walking VLA_GOLDENS, every size taken from case.json."""

import json

import numpy as np
import pytest
from shared_data import GOLDENS as ROOT
from shared_data import needs

from vla.contracts import observation_from

KINDS = ("pi0", "pi05", "pi0_fast")
OUTPUT_BOUND = 1e-4  # of the largest magnitude in the array
GRAD_REL, GRAD_ABS = 1e-3, 1e-5


def folders():
    """Every openpi case, as pytest parameters; one skipped parameter with the reason when there is none."""
    found = [
        path.parent
        for path in sorted(ROOT.rglob("case.json"))
        if json.loads(path.read_text()).get("kind") in KINDS and (path.parent / "params").is_dir()
    ]
    if not found:
        return [pytest.param(None, marks=needs(ROOT / "openpi", found=False))]
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in found]


class Case:
    """One case: its sizes, inputs, expected outputs, and the variant and weights that `vla import openpi` reads."""

    def __init__(self, folder):
        from vla.interop.openpi import import_openpi

        self.sizes = json.loads((folder / "case.json").read_text())
        self.kind = self.sizes["kind"]
        self.inputs, self.outputs = (dict(np.load(folder / f"{name}.npz")) for name in ("inputs", "outputs"))
        spec = {
            "action_horizon": self.sizes["action_horizon"],
            "action_dim": self.sizes["action_dim"],
            "max_token_len": self.sizes["max_token_len"],
            "cameras": tuple(k.removeprefix("image/") for k in self.inputs if k.startswith("image/")),
        }
        steps = (
            () if self.kind == "pi0_fast" else ("head.mask_padding=false", f"head.num_steps={self.sizes['num_steps']}")
        )
        self.variant, self.weights = import_openpi(folder / "params", spec=spec, set=steps)

    def observation(self, tokens=None):
        """The stored observation; with `tokens`, only that many of the prompt."""
        z = self.inputs
        prompt = ("tokenized_prompt", "tokenized_prompt_mask", "token_ar_mask", "token_loss_mask")
        return observation_from(
            {
                "images": {k.removeprefix("image/"): v for k, v in z.items() if k.startswith("image/")},
                "image_masks": {k.removeprefix("image_mask/"): v for k, v in z.items() if k.startswith("image_mask/")},
                "state": z["state"],
                **{k: z[k][:, :tokens] for k in prompt if k in z},
            }
        )

    def draws(self):
        """Noise and time as one draw per observation."""
        return {k: self.inputs[k][:, None] for k in ("noise", "time") if k in self.inputs}

    def compare(self, name, got):
        """The stored output against ours."""
        want = self.outputs[name]
        got = np.asarray(got)
        assert got.shape == want.shape, (name, got.shape, want.shape)
        error = np.abs(got - want).max() / np.abs(want).max()
        assert error <= OUTPUT_BOUND, f"{name}: off by {error:.2e} of the largest magnitude"

    def compare_gradients(self, gradients):
        """gradients: our weight name -> array; compared as norms over openpi's own arrays."""
        from vla.params import table, to_other

        tree = to_other(table(self.variant, "openpi"), gradients)
        want = {k.removeprefix("grad_norm/"): float(v) for k, v in self.outputs.items() if k.startswith("grad_norm/")}
        assert {k.removesuffix("/value") for k in tree} == set(want)
        for path, norm in want.items():
            got = float(np.linalg.norm(np.asarray(tree[path], np.float64)))
            assert abs(got - norm) <= max(GRAD_REL * norm, GRAD_ABS), f"gradient of {path}: {got} against {norm}"
