"""All stored outputs of openpi's transforms and robot adapters, case by case, within 1e-6.

Adapters below say which of our steps an openpi case stands for. openpi gives absent cameras as black images with a mask;
ours leave them out, so the comparison fills them in.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from shared_data import GOLDENS, needs
from vla_robot_aloha import transforms as aloha
from vla_robot_aloha.config import AlohaSettings
from vla_robot_droid import transforms as droid
from vla_robot_droid.config import DroidSettings
from vla_robot_libero import transforms as libero
from vla_robot_libero.config import LiberoSettings

from vla.contracts import Spec
from vla.testing.closeness import close
from vla.transforms import (
    AbsoluteActions,
    DeltaActions,
    Group,
    Normalize,
    ResizeImages,
    Stats,
    SubsampleActions,
    Unnormalize,
    Unpad,
    flatten,
    make_bool_mask,
    pad_to,
    resize_with_pad,
    to_uint8,
)
from vla.transforms.group import order

FILE = GOLDENS / "tokenizers/openpi_transforms.npz"
BASE, LEFT, RIGHT = "base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"
FAST_CAMERAS = ("base_0_rgb", "base_1_rgb", "wrist_0_rgb")

pytestmark = [pytest.mark.goldens, needs(FILE)]


def load_cases():
    if not FILE.is_file():
        return []
    stored = np.load(FILE)
    cases = json.loads(str(stored["meta_json"]))
    for case in cases:
        prefix = f"{case['case']:03d}/"
        case["arrays"] = {k[len(prefix) :]: stored[k] for k in stored.files if k.startswith(prefix)}
    return cases


CASES = load_cases()


def stats_from(ins):
    names = sorted({k.split("/")[1] for k in ins if k.startswith("norm_stats/")})
    return {n: Stats(*(ins[f"norm_stats/{n}/{f}"] for f in ("mean", "std", "q01", "q99"))) for n in names}


def with_norm(step_class):
    def run(ins, params):
        norm = "quantile" if params["use_quantiles"] else "zscore"
        return step_class(stats_from(ins), norm)({k: v for k, v in ins.items() if not k.startswith("norm_stats/")})

    return run


def with_mask(step_class):
    def run(ins, params):
        mask = make_bool_mask(*params["make_bool_mask"])
        np.testing.assert_array_equal(mask, ins.pop("mask"))
        return step_class(mask)(ins)

    return run


def group_of(steps, part, settings, cameras):
    context = SimpleNamespace(variant=SimpleNamespace(spec=Spec(cameras=cameras)))
    return Group(*order([(part, steps(settings, context))]))


def robot_inputs(steps, name, settings, ins, cameras=(BASE, LEFT, RIGHT)):
    """Our robot stage, with openpi's names and its black images for absent cameras."""
    out = flatten(group_of(steps, name, settings, cameras).inputs(ins, until="robot"))
    done = {}
    for key, value in out.items():
        group, slash, rest = key.partition("/")
        done[{"images": "image", "image_masks": "image_mask"}.get(group, group) + slash + rest] = value
    first = next(v for k, v in done.items() if k.startswith("image/"))
    for camera in cameras:
        done.setdefault(f"image/{camera}", np.zeros_like(first))
    return done


def aloha_inputs(ins, params):
    settings = AlohaSettings(adapt_to_pi=params["adapt_to_pi"], delta=False)
    return robot_inputs(aloha.steps, "aloha", settings, ins)


def droid_inputs(ins, params):
    fast = params["model_type"] == "pi0_fast"
    cameras = FAST_CAMERAS if fast else (BASE, LEFT, RIGHT)
    return robot_inputs(droid.steps, "droid", DroidSettings(mask_absent=not fast), ins, cameras)


def libero_inputs(ins, params):
    return robot_inputs(libero.steps, "libero", LiberoSettings(mask_absent=params["model_type"] != "pi0_fast"), ins)


def robot_outputs(steps, name, settings, dims):
    def run(ins, params):
        made = settings(params)
        group = group_of(steps, name, made, (BASE, LEFT, RIGHT))
        return group.outputs(Unpad(dims, dims)(ins))

    return run


def converter(function, key):
    return lambda ins, params: {key: function(ins[key]) if params["adapt_to_pi"] else ins[key]}


def images(ins, params):
    step = ResizeImages(params["height"], params["width"], tuple(k.split("/")[1] for k in ins))
    out = step({k.replace("image/", "images/"): v for k, v in ins.items()})
    return {k.replace("images/", "image/"): v for k, v in out.items() if k.startswith("images/")}


ADAPTERS = {
    "normalize": with_norm(Normalize),
    "unnormalize": with_norm(Unnormalize),
    "delta_actions": with_mask(DeltaActions),
    "absolute_actions": with_mask(AbsoluteActions),
    "resize_with_pad": lambda ins, p: {"image": resize_with_pad(ins["image"], p["height"], p["width"])},
    "convert_to_uint8": lambda ins, p: {"image": to_uint8(ins["image"])},
    "resize_images": images,
    "pad_states_and_actions": lambda ins, p: {k: pad_to(v, p["model_action_dim"], k) for k, v in ins.items()},
    "subsample_actions": lambda ins, p: SubsampleActions(p["stride"])(ins),
    "aloha_decode_state": converter(aloha.decode_state, "state"),
    "aloha_encode_actions": converter(aloha.encode_actions, "actions"),
    "aloha_encode_actions_inv": converter(aloha.encode_actions_reversed, "actions"),
    "aloha_inputs": aloha_inputs,
    "aloha_outputs": robot_outputs(
        aloha.steps, "aloha", lambda p: AlohaSettings(adapt_to_pi=p["adapt_to_pi"], delta=False), 14
    ),
    "droid_inputs": droid_inputs,
    "libero_inputs": libero_inputs,
    "droid_outputs": robot_outputs(droid.steps, "droid", lambda p: DroidSettings(), 8),
    "libero_outputs": robot_outputs(libero.steps, "libero", lambda p: LiberoSettings(), 7),
}


def test_all_cases_are_there():
    assert len(CASES) == 57
    assert {c["name"] for c in CASES} == set(ADAPTERS)


@pytest.mark.parametrize("case", CASES or [None], ids=lambda c: f"{c['case']:03d}-{c['name']}" if c else "none")
def test_openpi_transform(case):
    from vla.transforms import ReadPrompt

    ins = {k[3:]: v for k, v in case["arrays"].items() if k.startswith("in/")}
    before = {k: np.array(v) for k, v in ins.items()}
    want = {k[4:]: v for k, v in case["arrays"].items() if k.startswith("out/")}
    texts = case.get("strings") or {}
    for key, text in texts.items():
        if key.startswith("in/"):
            raw = text.removeprefix("bytes:")
            ins[key[3:]] = raw.encode() if raw != text else raw
    got = ADAPTERS[case["name"]](dict(ins), case["params"])
    assert want
    for key, value in want.items():
        x = np.asarray(got[key])
        assert x.shape == value.shape, key
        if value.dtype == np.uint8 or value.dtype == bool:
            np.testing.assert_array_equal(x, value, err_msg=key)
        else:
            close(x, value, 1e-6, key)
    extra = {k for k in got if k.startswith(("image/", "image_mask/"))} - set(want)
    assert not extra, "cameras that openpi does not give"
    for key, text in texts.items():
        if key == "out/prompt":
            assert ReadPrompt()(got)["prompt"] == text
    for key, value in before.items():
        np.testing.assert_array_equal(ins[key], value, err_msg=f"{key} was changed in place")
