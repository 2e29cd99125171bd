"""One observation given in many wrong ways to every model type: refused with field and value, or right.

What is refused is refused on the host, before a model runs: the fast lane has no model behind the policy. The slow lane
sends the same cases to the models, in both frameworks, and compares what is taken with the chunk of the plain form.
"""

import functools
import io

import numpy as np
import pytest

import vla
from vla import store
from vla.errors import VlaError
from vla.policy import Policy
from vla.tokenizer import open_tokenizer
from vla.transforms.stats import Stats

for needed in ("vla_head_ki", "vla_head_ar", "vla_tokenizer_fast", "vla_backbone_paligemma"):
    pytest.importorskip(needed)

TYPES = ("pi0", "pi05", "pi0_fast", "pi05_ki")
FRONT, WRIST = "base_0_rgb", "left_wrist_0_rgb"
S, A = 6, 4
SMALL = {
    "spec.image_size": [32, 32], "spec.cameras": [FRONT, WRIST], "spec.action_horizon": 4, "spec.max_token_len": 96,
    "backbone.llm.depth": 1, "backbone.vision.depth": 1,
}  # fmt: skip


# ---- the observation, and what is done to it -----------------------------------------------------------------------


def plain():
    rng = np.random.default_rng(0)
    images = {c: rng.integers(0, 255, (32, 40, 3), dtype=np.uint8) for c in (FRONT, WRIST)}
    return {"images": images, "state": rng.normal(size=S).astype(np.float32), "prompt": "touch the red block"}


def torch_of(array, **how):
    torch = pytest.importorskip("torch")
    made = torch.tensor(np.asarray(array))
    return made.to(getattr(torch, how["dtype"])) if "dtype" in how else made.requires_grad_(how.get("grad", False))


def jax_of(array):
    return pytest.importorskip("jax").numpy.asarray(array)


def png(image):
    Image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def with_nan(array, at, value=np.nan):
    out = np.array(array, np.float32)
    out[at] = value
    return out


# name -> the state made of the right one
BAD_STATES = {
    **{f"{n} values": lambda s, n=n: np.resize(s, n) for n in (0, 1, S - 1, S + 1, 8, 32, 1000)},
    **{f"NaN at {i}": lambda s, i=i: with_nan(s, i) for i in (0, 3, S - 1)},
    "inf": lambda s: with_nan(s, 1, np.inf),
    "-inf": lambda s: with_nan(s, 2, -np.inf),
    "too large for float32": lambda s: with_nan(s, 0, 0).astype(np.float64) + 1e300,
    "a row of a batch": lambda s: s[None],
    "a column": lambda s: s[:, None],
    "a batch of batches": lambda s: s[None, None],
    "a number": lambda s: float(s[0]),
    "a 0-d array": lambda s: np.float32(s[0]),
    "an empty list": lambda s: [],
    "words": lambda s: [str(x) for x in s],
    "one word": lambda s: "ready",
    "bytes": lambda s: s.tobytes(),
    "None": lambda s: None,
    "a list with None": lambda s: [*s[:-1].tolist(), None],
    "objects": lambda s: s.astype(object),
    "complex": lambda s: s.astype(complex),
    "dates": lambda s: np.arange(S).astype("datetime64[s]"),
    "durations": lambda s: np.arange(S).astype("timedelta64[s]"),
    "a record": lambda s: np.zeros(S, [("x", float)]),
    "ragged": lambda s: [[1.0], [2.0, 3.0]],
    "a dict": lambda s: dict(enumerate(s.tolist())),
    "a set": lambda s: set(s.tolist()),
    "a generator": lambda s: (x for x in s),
    "a function": lambda s: len,
    "masked": lambda s: np.ma.masked_array(s, [True] + [False] * (S - 1)),
    "torch with a gradient": lambda s: torch_of(s, grad=True),
    "torch bfloat16": lambda s: torch_of(s, dtype="bfloat16"),
    "jax bfloat16": lambda s: jax_of(s).astype("bfloat16"),
}
RIGHT_STATES = {
    "a list": lambda s: s.tolist(),
    "a tuple": lambda s: tuple(s.tolist()),
    "float64": lambda s: s.astype(np.float64),
    "not contiguous": lambda s: np.repeat(s, 2)[::2],
    "backwards in memory": lambda s: s[::-1].copy()[::-1],
    "read only": lambda s: np.frombuffer(s.tobytes(), np.float32),
    "big-endian": lambda s: s.astype(">f4"),
    "torch": torch_of,
    "jax": jax_of,
}
BAD_IMAGES = {
    "grey": lambda i: i[..., 0],
    "grey with an axis": lambda i: i[..., :1],
    "two channels": lambda i: i[..., :2],
    "RGBA": lambda i: np.concatenate([i, i[..., :1]], -1),
    "one row": lambda i: i[0, :, 0],
    "a number": lambda i: 7,
    "a batch of one": lambda i: i[None],
    "a batch of two": lambda i: np.stack([i, i]),
    "five axes": lambda i: i[None, None],
    "no rows": lambda i: i[:0],
    "no columns": lambda i: i[:, :0],
    "int64": lambda i: i.astype(np.int64),
    "int8": lambda i: i.astype(np.int8),
    "uint16": lambda i: i.astype(np.uint16) * 257,
    "bool": lambda i: i > 127,
    "complex": lambda i: i.astype(complex),
    "floats to 255": lambda i: i.astype(np.float32),
    "floats from -1": lambda i: i.astype(np.float32) / 127.5 - 1,
    "floats a little above 1": lambda i: i.astype(np.float32) / 255 + 0.01,
    "NaN": lambda i: with_nan(i / 255, (3, 4, 1)),
    "inf": lambda i: with_nan(i / 255, (3, 4, 1), np.inf),
    "objects": lambda i: i.astype(object),
    "words": lambda i: i.astype(str),
    "a path": lambda i: "front.png",
    "a file": png,
    "raw bytes": lambda i: i.tobytes(),
    "None": lambda i: None,
    "ragged": lambda i: [[[1, 2, 3]], [[1, 2, 3], [4, 5, 6]]],
    "a dict": lambda i: {"rgb": i},
    "masked": lambda i: np.ma.masked_array(i, i > 250),
    "400 million pixels": lambda i: np.broadcast_to(i[:1, :1], (20_000, 20_000, 3)),
    "torch bfloat16": lambda i: torch_of(i / 255, dtype="bfloat16"),
}
RIGHT_IMAGES = {
    "channels first": lambda i: np.moveaxis(i, -1, 0),
    "floats to 1": lambda i: (i / 255).astype(np.float32),
    "lists": lambda i: np.asarray(i.tolist(), np.uint8),
    "not contiguous": lambda i: np.repeat(i, 2, 1)[:, ::2],
    "backwards in memory": lambda i: i[::-1].copy()[::-1],
    "in columns": np.asfortranarray,
    "read only": lambda i: np.frombuffer(i.tobytes(), np.uint8).reshape(i.shape),
    "a PIL image": lambda i: pytest.importorskip("PIL.Image").fromarray(i),
    "torch": torch_of,
    "jax": jax_of,
}
BAD_PROMPTS = {
    "None": None, "empty": "", "blanks": "   ", "a new line": "\n", "an underline": "_ _", "no UTF-8": b"\xff\xfe",
    "a number": 7, "NaN": float("nan"), "yes": True, "a list": ["touch", "it"], "a dict of words": {"text": "touch"},
    "two in an array": np.array(["touch", "it"]), "ids": np.arange(4), "half a pair": "touch \ud83d it",
    "the other half": "\udd16", "too long": "touch it " * 500, "a list of one": ["touch the red block"],
}  # fmt: skip
RIGHT_PROMPTS = {
    "bytes": b"touch the red block", "numpy": np.str_("touch the red block"), "0-d": np.array("touch the red block"),
    "one in an array": np.array(["touch the red block"]), "blanks around": " touch the red block \n",
}  # fmt: skip


def state_as(make):
    return lambda o: {**o, "state": make(o["state"])}


def image_as(make):
    return lambda o: {**o, "images": {**o["images"], FRONT: make(o["images"][FRONT])}}


def put(**values):
    return lambda o: {**o, **values}


def images(change):
    return lambda o: {**o, "images": change(dict(o["images"]))}


def renamed(old, new):
    return lambda o: {new if k == old else k: v for k, v in o.items()}


def masks(**values):
    return put(image_masks={FRONT: True, WRIST: True, **values})


# name -> (what is done to the observation, a pattern of the field that the error names)
REFUSED = {
    **{f"state: {n}": (state_as(f), r"state") for n, f in BAD_STATES.items()},
    **{f"image: {n}": (image_as(f), r"image") for n, f in BAD_IMAGES.items()},
    **{f"prompt: {n}": (put(prompt=p), r"prompt") for n, p in BAD_PROMPTS.items()},
    **{f"key: {old} as {new}": (renamed(old, new), rf"{new}|images|state|prompt") for old, new in (
        ("state", "states"), ("state", "observation.state"), ("state", "observation/state"), ("state", "State"),
        ("images", "image"), ("images", "observation.images"), ("images", "pixels"), ("prompt", "promt"),
        ("prompt", "task"), ("prompt", "instruction"),
    )},
    **{f"key: {name} besides": (put(**{name: 1}), name) for name in ("reward", "timestamp", "task_index", "wrist", "action")},
    "no state": (lambda o: {k: v for k, v in o.items() if k != "state"}, "state"),
    "no images": (lambda o: {k: v for k, v in o.items() if k != "images"}, "image"),
    "no prompt": (lambda o: {k: v for k, v in o.items() if k != "prompt"}, "prompt"),
    "no camera": (put(images={}), "image"),
    "one camera of two": (images(lambda i: {FRONT: i[FRONT]}), "images"),
    "the other camera of two": (images(lambda i: {WRIST: i[WRIST]}), "images"),
    "a camera too many": (images(lambda i: {**i, "ceiling": i[FRONT]}), "ceiling"),
    "a camera under another name": (images(lambda i: {"front": i[FRONT], WRIST: i[WRIST]}), "front"),
    "a camera's name in capitals": (images(lambda i: {FRONT.upper(): i[FRONT], WRIST: i[WRIST]}), "BASE"),
    "a camera's name with a blank": (images(lambda i: {FRONT + " ": i[FRONT], WRIST: i[WRIST]}), "base_0_rgb "),
    "cameras by number": (images(lambda i: dict(enumerate(i.values()))), "images"),
    "images in a list": (images(lambda i: list(i.values())), "images"),
    "one image for all": (images(lambda i: i[FRONT]), "images"),
    "images None": (put(images=None), "images"),
    "images below a folder": (images(lambda i: {"rgb": i}), "images"),
    "mask: of no camera": (masks(ceiling=True), "image_masks"),
    "mask: a camera is not seen": (masks(**{FRONT: False}), "images"),
    "mask: a word": (masks(**{FRONT: "False"}), "image_masks"),
    "mask: None": (masks(**{FRONT: None}), "image_masks"),
    "mask: two": (masks(**{FRONT: 2}), "image_masks"),
    "mask: of a batch": (masks(**{FRONT: np.array([True, True])}), "image_masks"),
    "mask: a float": (masks(**{FRONT: 1.0}), "image_masks"),
    "masks in a list": (put(image_masks=[True, True]), "image_masks"),
    "nothing": (lambda o: {}, "images|state|prompt"),
    **{f"not a dict: {type(x).__name__}": (lambda o, x=x: x, "observation") for x in (None, 7, "obs", [1], (1,), {1})},
    "a list of observations": (lambda o: [o], "observation"),
}  # fmt: skip
RIGHT = {
    **{f"state: {n}": state_as(f) for n, f in RIGHT_STATES.items()},
    **{f"image: {n}": image_as(f) for n, f in RIGHT_IMAGES.items()},
    **{f"prompt: {n}": put(prompt=p) for n, p in RIGHT_PROMPTS.items()},
    "masks all True": masks(),
    "masks 0-d": masks(**{FRONT: np.array(True)}),
    "recorded actions": put(actions=np.full((4, A), 9.0), actions_is_pad=np.zeros(4, bool), episode=0, frame=3),
}
OPTIONS = {
    "seed: negative": ({"seed": -1}, "seed"), "seed: a word": ({"seed": "1"}, "seed"), "seed: half": ({"seed": 1.5}, "seed"),
    "seed: yes": ({"seed": True}, "seed"), "noise: of another shape": ({"noise": np.zeros((3, 3))}, "noise"),
    "noise: a word": ({"noise": "loud"}, "noise"), "noise: objects": ({"noise": np.full((4, 8), None)}, "noise"),
    "noise: ragged": ({"noise": [[1], [1, 2]]}, "noise"), "noise: a number": ({"noise": 1.0}, "noise"),
}  # fmt: skip


def test_there_are_more_than_120():
    assert len(REFUSED) + len(RIGHT) + len(OPTIONS) > 150


# ---- policies ------------------------------------------------------------------------------------------------------


@functools.cache
def parts_of(type):
    """(variant, statistics, tokenizer) of a small model of this type."""
    rng = np.random.default_rng(1)

    def one(width):
        mean = rng.normal(size=width)
        return Stats(mean=mean, std=np.full(width, 0.5), q01=mean - 1, q99=mean + 1)

    variant = vla.build(type=type, preset="tiny", set=SMALL)
    stats = {"state": one(S), "actions": one(A)}
    tokenizer = open_tokenizer(variant.parts["tokenizer"], variant.spec, None)
    return variant, stats, tokenizer.fit(np.sin(rng.uniform(0, 6, (64, 4, A))))


class NoModel:
    def sample(self, *given, **options):
        raise AssertionError("a wrong observation reached the model")


@functools.cache
def without_model(type):
    variant, stats, tokenizer = parts_of(type)
    record = {"cameras": [FRONT, WRIST]}
    model = store.ModelDir(None, variant, None, stats, tokenizer, record, "")
    return Policy(model, NoModel())


@pytest.fixture(scope="module")
def with_model(tmp_path_factory):
    """(type, framework) -> a policy; both frameworks have the same weights."""

    @functools.cache
    def folder_of(type):
        from vla.interop.start import fresh_weights

        folder = tmp_path_factory.mktemp(type) / "model"
        store.save_model(
            folder,
            parts_of(type)[0],
            fresh_weights(parts_of(type)[0], 3),
            *parts_of(type)[1:],
            record={"cameras": [FRONT, WRIST]},
        )
        return folder

    @functools.cache
    def opened(type, framework):
        pytest.importorskip("torch")
        pytest.importorskip("flax" if framework == "jax" else "torch")
        return vla.open(folder_of(type), framework, device="cpu", num_steps=2, guard=None)

    return opened


def refuse(policy, observation, field, **options):
    with pytest.raises(VlaError) as caught:
        policy.infer(observation, **options)
    text = str(caught.value)
    assert "\n  field: " in text and "\n  got: " in text, f"names no field or no value:\n{text}"
    import re

    assert re.search(field, caught.value.field), f"the field is {caught.value.field!r}, not {field}\n{text}"
    assert len(text) < 2000


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_it_is_refused_before_a_model_runs(name):
    make, field = REFUSED[name]
    for type in TYPES:
        refuse(without_model(type), make(plain()), field)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_refused_before_a_model_runs(name):
    options, field = OPTIONS[name]
    for type in TYPES:
        refuse(without_model(type), plain(), field, **options)


def check_right(policy):
    want = policy.infer(plain(), seed=5)["actions"]
    assert want.shape == (4, A) and np.isfinite(want).all()
    for name, make in RIGHT.items():
        got = policy.infer(make(plain()), seed=5)["actions"]
        if name == "image: floats to 1":  # a float image is cut to bytes, as openpi does: some are one less
            assert np.abs(got - want).max() < 0.2, name
        else:
            np.testing.assert_array_equal(got, want, err_msg=name)


def test_what_is_taken_is_right(with_model):
    check_right(with_model("pi05", "torch"))


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("type", TYPES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_way_with_the_models(with_model, type, framework):
    policy = with_model(type, framework)
    check_right(policy)
    for make, field in REFUSED.values():
        refuse(policy, make(plain()), field)
    for options, field in OPTIONS.values():
        refuse(policy, plain(), field, **options)
    check_right(policy)
