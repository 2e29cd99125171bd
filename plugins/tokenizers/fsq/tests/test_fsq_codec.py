"""The quantised autoencoder: the network against flax, the fit, openpi's checkpoint layout, bad input."""

import json
import math
import shutil

import numpy as np
import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from vla_tokenizer_fsq import PART, net
from vla_tokenizer_fsq.codec import FsqCodec
from vla_tokenizer_fsq.config import LEVELS, Fsq

from vla.errors import DataError, DecodeError, SettingsError, StoreError
from vla.testing.closeness import close

H, D, K = 6, 3, 4
SMALL = Fsq(codes=256, num_tokens=K, embed_dim=64, num_layers=1, steps=300)


def smooth(n, seed=0):
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, H)[None, :, None]
    return np.clip(rng.normal(0, 0.5, (n, 1, D)) + rng.normal(0, 0.4, (n, 1, D)) * t, -1, 1).astype(np.float32)


def random_params(layers=1, e=128, seed=0):
    rng = np.random.default_rng(seed)
    shapes = net.shapes(e, D, H, K, layers, 2.0, 2, 64)
    return {
        n: (rng.normal(0, 0.3 if n.endswith("kernel") else 1, s) / (e**0.25)).astype(np.float32)
        for n, s in shapes.items()
    }


@pytest.fixture(scope="module")
def fitted():
    pytest.importorskip("torch")
    return FsqCodec(SMALL).fit(smooth(256))


def test_levels_and_digits():
    for codes, levels in LEVELS.items():
        assert math.prod(levels) == codes
    ids = np.arange(256)
    digits = ids[:, None] // net.places((16, 16)) % np.asarray((16, 16))
    assert np.array_equal((digits * net.places((16, 16))).sum(-1), ids)
    assert digits[17].tolist() == [1, 1]
    assert digits[3].tolist() == [3, 0]  # the first digit counts single


def test_network_equals_flax():
    """The parameter names, axes and maths are flax's own modules'."""
    nn = pytest.importorskip("flax.linen")
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    p = random_params()

    def tree(prefix):
        out = {}
        for name, value in p.items():
            if name.startswith(prefix + "/"):
                *path, leaf = name.removeprefix(prefix + "/").split("/")
                node = out
                for part in path:
                    node = node.setdefault(part, {})
                node[leaf] = value
        return {"params": out}

    def run(module, name, *args):
        return module.apply(tree(name), *args)

    def attention(name, x, y):
        return run(nn.MultiHeadDotProductAttention(num_heads=2), name, x, y, y)

    def read(name, y):
        x = jnp.broadcast_to(p[f"{name}/q_embed"], (len(y), *p[f"{name}/q_embed"].shape))
        y = y + p[f"{name}/y_pos_enc"]
        for i in range(1):
            b = f"{name}/CrossAttentionLayer_{i}"
            a = run(nn.LayerNorm(), f"{b}/LayerNorm_0", x)
            x = x + attention(f"{b}/MultiHeadDotProductAttention_0", a, a)
            x = x + attention(f"{b}/MultiHeadDotProductAttention_1", run(nn.LayerNorm(), f"{b}/LayerNorm_1", x), y)
            a = run(nn.Dense(256), f"{b}/Dense_0", run(nn.LayerNorm(), f"{b}/LayerNorm_2", x))
            a, gate = jnp.split(run(nn.Dense(512), f"{b}/GeGLU_0/Dense_0", a), 2, -1)
            x = x + run(nn.Dense(128), f"{b}/Dense_1", a * nn.gelu(gate))
        return x

    @jax.jit  # one compilation instead of one per operation
    def encode(actions):
        z = jnp.tanh(run(nn.Dense(2), "codebook/proj_down", read("encoder", run(nn.Dense(128), "proj", actions))))
        return jnp.round((z + 1) * 31 / 2).astype(int)

    @jax.jit
    def decode(digits):
        up = run(nn.Dense(128), "codebook/proj_up", digits / 31 * 2 - 1)
        return run(nn.Dense(D), "proj_mean", read("decoder", up)) * p["out_scale"]

    actions = smooth(5)
    digits = encode(actions)
    ids = net.encode(p, actions, (32, 32), 1)
    assert np.array_equal(ids, digits[..., 0] + 32 * digits[..., 1])
    close(net.decode(p, ids, (32, 32), 1), decode(digits), 1e-4)


def test_torch_mirror_equals_numpy():
    torch = pytest.importorskip("torch")
    from vla_tokenizer_fsq import torch_impl

    p, x = random_params(), smooth(7)
    there = torch_impl.reconstruct({n: torch.tensor(v) for n, v in p.items()}, torch.tensor(x), (32, 32), 1)
    here = net.decode(p, net.encode(p, x, (32, 32), 1), (32, 32), 1)
    close(there.numpy(), here, 1e-4)
    fresh = torch_impl.initial({n: v.shape for n, v in p.items()}, 0)
    assert {n: tuple(v.shape) for n, v in fresh.items()} == {n: v.shape for n, v in p.items()}


def test_fit_learns_and_is_deterministic(fitted):
    x = smooth(256)
    assert fitted.fit_rmse < 0.7 * x.std()  # the mean alone gives 1
    assert not np.isnan(fitted.fit_max)
    one, two = (FsqCodec(evolve(SMALL, steps=10)).fit(x) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one.encode(x), two.encode(x), strict=True))


@settings(max_examples=500, deadline=None)
@given(
    st.one_of(
        hnp.arrays(np.float32, (H, D), elements=st.floats(0, 1, width=32)),
        st.floats(0, 1, width=32).map(lambda v: np.full((H, D), v, np.float32)),
        st.integers(0, H).map(lambda i: np.where(np.arange(H)[:, None] < i, 0.0, 1.0) * np.ones((1, D))),
    )
)
def test_bound_holds_within_the_fitted_range(fitted, share):
    chunk = fitted._range[0] + share * (fitted._range[1] - fitted._range[0])
    (ids,) = fitted.encode(chunk[None])
    assert ids.shape == (K,)
    assert ids.dtype == np.int32
    back = fitted.decode(ids, H, D)
    assert np.abs(back - chunk).max() <= fitted.error_bound(H, D) + 1e-6
    assert fitted.lengths()[ids].sum() == fitted.total(H, D)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-3, 260), max_size=8), st.sampled_from(["strict", "relaxed"]))
def test_random_ids_decode_or_say_why(fitted, ids, mode):
    try:
        out = fitted.decode(np.asarray(ids, np.int64), H, D, mode)
    except DecodeError:
        return
    assert out.shape == (H, D)
    assert np.isfinite(out).all()
    assert len(ids) == K or (mode == "relaxed" and len(ids) > K)


def test_save_load(fitted, tmp_path):
    fitted.save(tmp_path)
    x = smooth(10, seed=2)
    for again in (FsqCodec(Fsq(codes=256)).load(tmp_path), FsqCodec(Fsq(codes=256, source=str(tmp_path)))):
        assert again.fit_rmse == fitted.fit_rmse
        assert all(np.array_equal(a, b) for a, b in zip(again.encode(x), fitted.encode(x), strict=True))
        assert np.array_equal(again.decode(again.encode(x)[0], H, D), fitted.decode(fitted.encode(x)[0], H, D))
    assert again.fit(x) is again
    with pytest.raises(SettingsError, match="codes=256"):
        FsqCodec(Fsq()).load(tmp_path)
    facts = json.loads((tmp_path / "codec.json").read_text())
    for damage in ({"embed_dim": 128}, {"shape": [H + 1, D]}, {"shape": None}, {"num_layers": 2}):
        (tmp_path / "codec.json").write_text(json.dumps(facts | damage))
        with pytest.raises(StoreError):
            FsqCodec(SMALL).load(tmp_path)


def write_openpi(folder, params):
    """An FSQ checkpoint as orbax lays it out: STEP/params as zarr arrays in one OCDBT store, STEP/config/metadata."""
    ts = pytest.importorskip("tensorstore")
    config = {"embed_dim": 128, "data_dim": D, "data_horizon": H, "num_tokens": K, "num_layers": 1, "target_codebook_size": 1024,
              "causal": False, "mlp_ratio": 2.0, "bound": None, "use_state_conditioning": False}  # fmt: skip
    step = folder / "2000"
    (step / "config").mkdir(parents=True)
    (step / "config" / "metadata").write_text(json.dumps(config))
    item = step / "params"
    item.mkdir()
    leaves = {}
    for name, value in params.items():
        parts = name.split("/")
        leaves[str(tuple(parts))] = {
            "key_metadata": [{"key": part, "key_type": 2} for part in parts],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
        }
        store = {"driver": "ocdbt", "base": item.absolute().as_uri() + "/", "path": ".".join(parts) + "/"}
        ts.open({"driver": "zarr", "kvstore": store}, dtype=ts.float32, shape=value.shape, create=True).result().write(
            value
        ).result()
    (item / "_METADATA").write_text(json.dumps({"tree_metadata": leaves, "use_zarr3": False}))
    return folder


@pytest.fixture(scope="module")
def openpi(tmp_path_factory):
    return write_openpi(tmp_path_factory.mktemp("openpi"), random_params())


def test_openpi_checkpoint(openpi, tmp_path):
    p, x = random_params(), smooth(9)
    codec = FsqCodec(Fsq(source=str(openpi), num_tokens=K, num_layers=7))
    want = net.encode(p, x, (32, 32), 1)
    assert np.array_equal(np.stack(codec.encode(x)), want)
    close(codec.decode(want[0], H, D), net.decode(p, want[:1], (32, 32), 1)[0], 1e-6)
    assert codec.error_bound(H, D) == math.inf
    assert codec.fit(x) is codec
    codec.save(tmp_path)
    assert np.array_equal(np.stack(FsqCodec(Fsq()).load(tmp_path).encode(x)), want)
    with pytest.raises(SettingsError, match="num_tokens=4"):
        FsqCodec(Fsq(source=str(openpi)))
    with pytest.raises(SettingsError, match="codes=1024"):
        FsqCodec(Fsq(source=str(openpi), codes=256, num_tokens=K))
    with pytest.raises(SettingsError, match="no FSQ checkpoint"):
        FsqCodec(Fsq(source=str(tmp_path / "absent")))


def test_openpi_checkpoint_that_does_not_fit(openpi, tmp_path):
    step = shutil.copytree(openpi, tmp_path / "copy") / "2000"
    settings_file, listing = step / "config" / "metadata", step / "params" / "_METADATA"
    config = json.loads(settings_file.read_text())
    wanted = Fsq(source=str(step.parent), num_tokens=K)
    for change, error, says in (
        ({"causal": True}, SettingsError, "causal"),
        ({"use_state_conditioning": True}, SettingsError, "use_state_conditioning"),
        ({"num_layers": 2}, StoreError, "CrossAttentionLayer_1"),
        ({"data_horizon": H + 1}, StoreError, "q_embed|y_pos_enc"),
        ({"data_dim": "many"}, StoreError, "config of an FSQ checkpoint"),
    ):
        settings_file.write_text(json.dumps(config | change))
        with pytest.raises(error, match=says):
            FsqCodec(wanted)
    settings_file.write_text(json.dumps(config))
    leaves = json.loads(listing.read_text())
    del leaves["tree_metadata"]["('proj', 'bias')"]
    listing.write_text(json.dumps(leaves))
    with pytest.raises(StoreError, match="proj/bias"):
        FsqCodec(wanted)


def test_bad_input_is_named(fitted):
    with pytest.raises(SettingsError, match="not fitted") as e:
        FsqCodec(SMALL).encode(smooth(1))
    assert "vla tokenizer fit" in str(e.value)
    with pytest.raises(DataError, match="other dims"):
        fitted.encode(np.zeros((1, H + 1, D)))
    with pytest.raises(DataError, match="other dims"):
        fitted.decode(np.zeros(K, int), H, D + 1)
    with pytest.raises(DataError, match="NaN"):
        fitted.encode(np.full((1, H, D), np.nan))
    with pytest.raises(DataError, match="no chunks"):
        FsqCodec(SMALL).fit(np.zeros((0, H, D)))
    with pytest.raises(SettingsError, match="levels"):
        Fsq(codes=1000)
    with pytest.raises(SettingsError, match="multiple of 64"):
        Fsq(embed_dim=96)
    with pytest.raises(SettingsError, match="out of bounds"):
        Fsq(steps=0)


def test_bound_setting_clips(fitted):
    codec = FsqCodec(Fsq(codes=256, num_tokens=K, embed_dim=64, num_layers=1, steps=1, bound=0.5)).fit(smooth(8))
    far = codec.encode(np.full((1, H, D), 9.0))
    assert np.array_equal(far[0], codec.encode(np.full((1, H, D), 0.5))[0])


def test_part():
    (need,) = PART.needs_of(Fsq(codes=4096))
    assert not need.met_by({"vocab_size": 4096})
    for preset in PART.presets.values():
        FsqCodec(Fsq(**preset))
