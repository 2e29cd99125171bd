"""The `hf` tables name every tensor of the stored PyTorch checkpoints of openpi's port and of LeRobot."""

import json

import numpy as np
import pytest
from shared_data import GOLDENS, needs

from vla.compose import build
from vla.interop.paligemma import standard_tree
from vla.params import cover, other_shapes, shapes, table, to_other, to_torch
from vla.store import read_weights

FILES = sorted((GOLDENS / "torch").glob("*/*/*/model.safetensors"))
pytestmark = [pytest.mark.goldens, needs(GOLDENS / "torch", found=bool(FILES))]


def variant_for(case, state_dim, action_dim):
    sizes = {f"backbone.vision.{k}": v for k, v in case["vision"].items() if k != "image_size"}
    sizes |= {f"backbone.llm.{k}": v for k, v in case["llm"].items()}
    sizes |= {"backbone.llm.vocab_size": case["vocab_size"], "spec.state_dim": state_dim, "spec.action_dim": action_dim}
    if case["kind"] != "pi0_fast":
        sizes |= {f"head.{k}": case["expert"][k] for k in ("width", "mlp_dim")}
    return build(type=case["kind"], set=sizes)


@pytest.mark.parametrize("file", FILES or [None], ids=lambda f: f"{f.parts[-4]}-{f.parts[-3]}" if f else "none")
def test_every_tensor_has_a_row(file):
    case = json.loads((file.parents[1] / "case.json").read_text())
    tensors = read_weights(file)
    tree, unused = standard_tree(tensors, str(file))
    width = tree["action_out_proj.bias"].shape[0] if "action_out_proj.bias" in tree else 32
    variant = variant_for(case, width, width)
    rows = table(variant, "hf")
    cover(other_shapes(rows), tree, str(file))
    assert shapes(rows) == shapes(table(variant))
    assert len(tree) + len(unused) == len(tensors)
    assert {line.split()[0] for line in unused} <= {"lm_head.weight", "gemma_expert.lm_head.weight"}
    again = to_other(rows, to_torch(rows, tree))
    assert all(again[name].tobytes() == np.asarray(array).tobytes() for name, array in tree.items())
