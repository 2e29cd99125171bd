"""A third party's day: a package made with `vla new`, outside the repository, works everywhere, and core knows nothing of it.

The fresh environment is a virtual environment of its own, into which pip builds and installs the package as for anybody
else; what is installed here already (the frameworks, core, our parts) is seen through it and not installed again.
"""

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

from vla.cli import main
from vla.cli.new import KINDS, problem_of, write
from vla.errors import SettingsError, StoreError

ROOT = Path(__file__).parents[1]
EXAMPLES = [ROOT / "examples" / "third_party" / name for name in ("l1", "diffusion")]

TRAIN = """
import sys
import numpy as np
import vla
from vla.training.config import TrainConfig
from vla_dataset_day_data.dataset import write_episode

framework, folder = sys.argv[1:]
rng = np.random.default_rng(0)
for number in range(3):
    state, action = (rng.standard_normal((9, dim)).astype(np.float32) for dim in (4, 3))
    images = {"front": rng.integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)}
    write_episode(folder, number, state, action, "push the block", images)

variant = vla.build(head="day", preset="tiny", set={
    "spec.cameras": ["front"], "spec.image_size": [16, 16], "spec.action_horizon": 4, "spec.max_token_len": 80,
    "backbone.llm.depth": 1, "backbone.vision.depth": 1,
})
config = TrainConfig(steps=3, batch_size=2, framework=framework, progress=False, log_every=1, lr=1e-3)
run = vla.train(variant, f"day-data:{folder}", out=f"{folder}/{framework}", config=config)
policy = vla.open(run.model, framework=framework)
seen = {"images": {"front": images["front"][0]}, "state": state[0], "prompt": "push the block"}
chunk = policy.infer(seen)["actions"]
assert chunk.shape == (4, 3) and np.isfinite(chunk).all(), chunk
print("trained", framework, run.step)
"""


def python(*words, path=(), timeout=300, cwd=None):
    """Run Python in a subprocess: that of an environment among `path`, if there is one; other folders go on its path."""
    runs = next((p / "bin" / "python" for p in path if (p / "bin" / "python").exists()), sys.executable)
    folders = [str(p) for p in path if not (p / "bin" / "python").exists()]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [runs, *map(str, words)], capture_output=True, text=True, env=env, timeout=timeout, cwd=cwd
    )
    return done.returncode, done.stdout + done.stderr


def install(target, *packages):
    """A fresh environment with these packages, built and installed by pip; what they depend on is seen through it."""
    venv.create(target, with_pip=False)
    site = sysconfig.get_path("purelib", vars={"base": str(target)})
    Path(site, "seen_through.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    words = ["-m", "pip", "--python", target / "bin" / "python", "--disable-pip-version-check", "install", "-q"]
    code, text = python(*words, "--no-deps", "--no-build-isolation", "--no-index", *packages)
    assert code == 0, text


def kit(place, tests, *options):
    """Run conformance tests with `place` on the path, away from this repository's settings."""
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-c", os.devnull]
    return python(*words, "--rootdir", place, *options, *tests, path=[place], cwd=place)


def core_status():
    """What git says about core; None outside a clone."""
    done = subprocess.run(["git", "status", "--porcelain", "core"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    """A head and a dataset format, written by `vla new`, installed."""
    folder = tmp_path_factory.mktemp("day")
    before = core_status()
    assert main(["new", "head", "day", "--dir", str(folder)]) == 0
    assert main(["new", "dataset", "day-data", "--dir", str(folder)]) == 0
    packages = [folder / "vla-head-day", folder / "vla-dataset-day-data"]
    install(folder / "site", *packages)
    assert core_status() == before, "a new package changed core"
    return folder


def test_the_new_head_is_listed_and_fits(day):
    code, text = python("-m", "vla.cli", "list", "head", path=[day / "site"])
    assert code == 0 and re.search(r"day +ok +vla-head-day 0\.1\.0 +torch jax", text), text
    code, text = python("-m", "vla.cli", "build", "--head", "day", "--preset", "tiny", path=[day / "site"])
    assert code == 0 and 'from = "vla-head-day 0.1.0"' in text and "runs in: torch, jax" in text, text


def test_a_misfit_of_the_new_head_shows_its_own_reason(day):
    words = ["-m", "vla.cli", "build", "--head", "day", "--preset", "tiny", "--set", "tokenizer.prompt=pi0"]
    code, text = python(*words, path=[day / "site"])
    assert code == 2 and "it has no other way to see the robot's state than the prompt" in text, text


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_the_new_head_trains_and_acts(day, tmp_path, framework):
    pytest.importorskip(framework)
    before = core_status()
    (tmp_path / "train.py").write_text(TRAIN)
    code, text = python(tmp_path / "train.py", framework, tmp_path, path=[day / "site"], cwd=tmp_path)
    assert code == 0 and f"trained {framework} 3" in text, text
    assert core_status() == before, "training a third party's head changed core"


def test_the_new_head_passes_the_kit(day):
    code, text = kit(day / "site", [day / "vla-head-day" / "tests"])
    assert code == 0 and int(re.search(r"(\d+) passed", text)[1]) >= 60, text


def test_the_kit_needs_no_file(day):
    code, text = python("-m", "vla.cli", "check", "head", "day", "--only", "settings or need", path=[day / "site"])
    assert code == 0 and " passed" in text, text
    code, text = python("-m", "vla.cli", "check", "head", "day", "--only", "no_such_check", path=[day / "site"])
    assert code == 2 and "no check has such a name" in text, text


def test_another_contract_is_refused_with_both_numbers(day, tmp_path):
    package = write("head", "tomorrow", tmp_path)
    init = package / "src" / "vla_head_tomorrow" / "__init__.py"
    init.write_text(init.read_text().replace("contract=2", "contract=7"))
    install(tmp_path / "site", package)
    code, text = python("-m", "vla.cli", "build", "--head", "tomorrow", path=[tmp_path / "site"])
    assert code == 2 and "speaks head contract 7, this vla-core speaks 2: upgrade vla-core" in text, text


# ---- the kit finds what is wrong ------------------------------------------------------------------------------------

# name -> (file, what stands there, what a careless author writes, the check that must fail)
BREAKAGES = {
    "heavy": ("config.py", "from attrs import", "import numpy\nfrom attrs import", "test_importing_it_is_light"),
    "reasonless": (
        "__init__.py", '"it has no other way to see the robot\'s state than the prompt"', '""', "test_every_need_has_a_reason",
    ),
    "vacuous": ("__init__.py", 'has("tokenizer", "emits", "state"', 'has("tokenizer", "emits", "text"', "test_every_need_can_fail"),
    "unpadded": ("torch_impl.py", "masked_mean(error, mask)", "masked_mean(error, None)", "test_padded_steps_and_dims"),
    "scalar": ("torch_impl.py", "masked_mean(error, mask)", "error.mean()", "test_losses_are_finite_and_one_per_row"),
    "mixed": ("torch_impl.py", "- values  # [B H A]", "- values + obs_mean(hidden)", "test_rows_of_a_batch_do_not_meet"),
    "random": ("torch_impl.py", '(tokens)["query"])', '(tokens)["query"]) + torch.rand(1)', "test_sample_is_a_function_of_its_noise"),
    "looking": ("torch_impl.py", 'error = self.actions(hidden["query"])', 'assert float(hidden["query"].sum()) < 1e9\n        error = self.actions(hidden["query"])', "test_compiles_once"),
    "unnamed": ("params.py", '    Row("fc2.bias", "fc2/bias", "a"),\n', "", "test_name_table_covers_every_weight"),
    "dead": ("torch_impl.py", "self.fc2(F.silu(self.fc1(hidden)))", "self.fc2(F.silu(self.fc1(hidden)).detach())", "test_every_weight_of_it_learns"),
    "cut": ("torch_impl.py", "x = self.queries.expand", "x = self.queries.detach().expand", "test_every_weight_of_it_learns"),
    "shape": ("torch_impl.py", "chunk if real is None", "chunk[:, 1:] if real is not None", "test_sample_gives_what_it_offers"),
    "misnamed": ("__init__.py", '"losses": {"actions": "query"}', '"losses": {"action": "query"}', "test_losses_are_those_it_offers"),
    "greedy": ("config.py", "image   backbone  image prompt", "image   backbone  image prompt query", "test_images_and_prompt_do_not_look_ahead"),
}  # fmt: skip


def test_the_kit_finds_what_is_wrong(tmp_path):
    """Fourteen careless heads: in each, the check that is there for it fails. (PyTorch; the checks are the same in JAX.)"""
    packages = []
    for name, (file, old, new, _) in BREAKAGES.items():
        package = write("head", f"broken-{name}", tmp_path)
        path = package / "src" / f"vla_head_broken_{name}" / file
        text = path.read_text()
        assert old in text, f"the template has changed: {old!r}"
        text = text.replace(old, new)
        if "obs_mean" in new:
            text += "\n\ndef obs_mean(hidden: Any) -> Tensor:\n    return hidden['query'].mean()\n"
        path.write_text(text)
        packages.append(package)
    install(tmp_path / "site", *packages)
    tests = [package / "tests" / "test_conformance.py" for package in packages]
    code, text = kit(tmp_path / "site", tests, "-k", "not jax and not both", "-rf", "--tb=no")
    assert code == 1, text
    for name, (*_, check) in BREAKAGES.items():
        failed = re.findall(rf"FAILED \S*::TestBroken{name.capitalize()}::(test_\w+)", text)
        assert any(found.startswith(check) for found in failed), f"{name}: {check} should fail; failed: {failed}\n{text}"


OTHERS = {
    ("tokenizer", "proud"): ("codec.py", "return float(max(edge[0] - edge[1], edge[1] - edge[2]))", "return 1e-4", "test_errors_stay_within_the_bound"),
    ("tokenizer", "lax"): ("codec.py", 'raise DecodeError("the answer stands', 'raise ValueError("the answer stands', "test_garbage"),
    ("tokenizer", "lossy"): ("codec.py", '{"codes": self.settings.codes, "mu": self.settings.mu}', '{"codes": self.settings.codes, "mu": 3.0}', "test_saved_it_gives_the_same_ids"),
    ("dataset", "leaky"): ("dataset.py", "self.episodes[number].stop, horizon)", "len(self), horizon)", "test_chunks_do_not_run_into_the_next_episode"),
    ("dataset", "shared"): ("dataset.py", "self._states[index].copy()", "self._states[index]", "test_samples_belong_to_who_asked"),
    ("dataset", "mute"): ("dataset.py", "DataError(\"no episodes are here\"", "KeyError(\"no episodes are here\"", "test_a_wrong_path_is_a_clear_error"),
    ("vision", "narrow"): ("__init__.py", '"width": s.width', '"width": s.width + 1', "test_tokens_are_as_wide_as_offered"),
    ("vision", "half"): ("torch_impl.py", "x = self.patch(x) + self.position", "x = self.patch(x) * (torch.arange(rows * cols) % cols < 1)[:, None] + self.position", "test_every_part_of_an_image_counts"),
    ("llm", "open"): ("torch_impl.py", "attend(q, k, v, mask, fused=fused)", "attend(q, k, v, None, fused=fused)", "test_nobody_sees_behind_the_mask"),
    ("llm", "bragging"): ("__init__.py", '"multi_expert": False', '"multi_expert": True', "test_every_weight_of_it_learns"),
    ("backbone", "dark"): ("torch_impl.py", "stacked = stacked.float() / 127.5 - 1", "stacked = stacked.float() / 255", "test_bytes_are_pixels"),
}  # fmt: skip


def test_the_kits_of_other_kinds_find_what_is_wrong(tmp_path):
    packages = []
    for (kind, name), (file, old, new, _) in OTHERS.items():
        package = write(kind, f"broken-{name}", tmp_path)
        path = package / "src" / f"vla_{kind}_broken_{name}" / file
        assert old in path.read_text(), f"the template has changed: {old!r}"
        path.write_text(path.read_text().replace(old, new.replace('\\"', '"')))
        packages.append(package)
    install(tmp_path / "site", *packages)
    checks = " or ".join({check for *_, check in OTHERS.values()})
    tests = [package / "tests" / "test_conformance.py" for package in packages]
    code, text = kit(tmp_path / "site", tests, "-k", f"({checks}) and not jax", "-rf", "--tb=no")
    for (kind, name), (*_, check) in OTHERS.items():
        failed = re.findall(rf"(?:FAILED|ERROR) \S*::TestBroken{name.capitalize()}::(test_\w+)", text)
        assert any(found.startswith(check) for found in failed), f"{kind} {name}: {check} should fail: {failed}\n{text}"


def test_the_kit_finds_that_the_frameworks_differ(tmp_path):
    pytest.importorskip("jax")
    package = write("head", "apart", tmp_path)
    path = package / "src" / "vla_head_apart" / "jax_impl.py"
    path.write_text(path.read_text().replace("jax.nn.silu", "jax.nn.relu"))
    install(tmp_path / "site", package)
    code, text = kit(tmp_path / "site", [package / "tests"], "-k", "both_frameworks_give_the_same_losses", "--tb=line")
    assert code == 1 and "actions differs by" in text, text


# ---- templates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_template_is_a_whole_package(kind, tmp_path):
    package = write(kind, "my-thing", tmp_path, author="A. Person")
    table = tomllib.loads((package / "pyproject.toml").read_text())
    (points,) = table["project"]["entry-points"].values()
    assert points == {"my-thing": f"vla_{kind}_my_thing:PART"}
    assert table["project"]["authors"] == [{"name": "A. Person"}]
    for path in ("README.md", ".gitignore", ".github/workflows/test.yml", "tests/test_conformance.py"):
        assert (package / path).is_file()
    for path in package.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert "%%" not in text and path.suffix != ".tmpl", f"{path}: a placeholder is left"
            if path.suffix == ".py":
                ast.parse(text)
    if kind not in ("dataset", "backbone"):
        code = [line for line in (package / "tests/test_conformance.py").read_text().splitlines() if line.strip()]
        assert len(code) == 3, "a third party's test file is three lines"


@pytest.mark.slow
def test_every_template_passes_its_kit(tmp_path):
    packages = [write(kind, f"fresh-{kind}", tmp_path) for kind in KINDS]
    install(tmp_path / "site", *packages)
    code, text = kit(tmp_path / "site", [package / "tests" for package in packages])
    assert code == 0, text


@pytest.mark.parametrize(
    "name", ["", "My-Head", "9lives", "a b", "a--b", "-a", "a/b", "../a", "class", "vla-head-x", "head", "x" * 41, "naïve"]
)
def test_bad_names_are_explained(name, tmp_path):
    assert problem_of("head", name)
    with pytest.raises(SettingsError, match="this name will not do"):
        write("head", name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_taken_names_and_folders_are_refused(tmp_path, capsys):
    with pytest.raises(SettingsError, match="published by vla-head-flow"):
        write("head", "flow", tmp_path)
    package = write("head", "mine", tmp_path)
    (package / "notes.txt").write_text("work of a day")
    with pytest.raises(StoreError, match="already there"):
        write("head", "mine", tmp_path)
    assert (package / "notes.txt").read_text() == "work of a day"
    assert main(["new", "robot", "mine", "--dir", str(tmp_path)]) == 2
    assert "head, tokenizer, vision" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["vla-head-mine"], "nothing half-written is left"


# ---- two real third-party heads -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guests(tmp_path_factory):
    """The packages of examples/third_party, installed as a guest would install them."""
    place = tmp_path_factory.mktemp("guests")
    copies = []
    for package in EXAMPLES:  # built from a copy, so that the repository stays clean
        copy = place / "src" / package.name
        for file in package.rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                (copy / file.relative_to(package)).parent.mkdir(parents=True, exist_ok=True)
                (copy / file.relative_to(package)).write_bytes(file.read_bytes())
        copies.append(copy)
    install(place / "site", *copies)
    return place


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_guests_live_by_the_public_api(path):
    """They import vla and their frameworks; nothing of our plugins, nothing that is private."""
    for file in path.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            module = getattr(node, "module", None) or (names[0] if names else "vla")
            root = module.partition(".")[0]
            assert not root.startswith("vla_") or root == f"vla_head_{path.name}", f"{file}: {module}"
            assert not any(part.startswith("_") for part in (*module.split("."), *names) if part != "__future__"), file


def test_guests_are_not_part_of_our_setup():
    for file in ("pyproject.toml", "requirements-dev.txt"):
        assert "third_party" not in (ROOT / file).read_text()


GUESTS_OPTION = """
import sys
import numpy as np
import vla
from vla.training.config import TrainConfig
from vla_dataset_day_data.dataset import write_episode

framework, folder = sys.argv[1:]
rng = np.random.default_rng(0)
for number in range(2):
    state, action = (rng.standard_normal((9, dim)).astype(np.float32) for dim in (4, 3))
    images = {"front": rng.integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)}
    write_episode(folder, number, state, action, "push the block", images)
variant = vla.build(head="ki", tokenizer="binning", preset="tiny", set={
    "head.actions": "diffusion", "spec.cameras": ["front"], "spec.image_size": [16, 16], "spec.action_horizon": 4,
    "spec.max_token_len": 80, "backbone.llm.depth": 1, "backbone.vision.depth": 1,
})
config = TrainConfig(steps=1, batch_size=2, framework=framework, progress=False)
run = vla.train(variant, f"day-data:{folder}", out=f"{folder}/run", config=config)
policy = vla.open(run.model, framework=framework)
seen = {"images": {"front": images["front"][0]}, "state": state[0], "prompt": "push the block"}

def chunk(seed, **options):
    return policy.infer(seen, seed=seed, **options)["actions"]

assert np.array_equal(chunk(1), chunk(1, sampling={"noise_scale": 1.0}))
assert np.array_equal(chunk(1, sampling={"noise_scale": 0}), chunk(2, sampling={"noise_scale": 0}))
assert not np.allclose(chunk(1), chunk(1, sampling={"noise_scale": 0}))
quiet = vla.open(run.model, framework=framework, sampling={"noise_scale": 0, "num_steps": 2})
assert np.array_equal(quiet.infer(seen, seed=1)["actions"], chunk(5, sampling={"noise_scale": 0, "num_steps": 2}))
for wrong, words in (({"noise_scal": 1}, "did you mean sampling.noise_scale?"), ({"noise_scale": -1}, "noise_scale")):
    try:
        chunk(1, sampling=wrong)
    except vla.SettingsError as error:
        assert words in str(error), error
    else:
        raise AssertionError(wrong)
print("model", run.model)
"""


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_an_option_of_a_guests_sampler_needs_no_edit_elsewhere(guests, day, tmp_path, framework):
    """`noise_scale` of the diffusion head, inside `ki`: by keyword, for a policy, and on the command line."""
    pytest.importorskip(framework)
    (tmp_path / "option.py").write_text(GUESTS_OPTION)
    # day's site first: `python` runs its interpreter; the guests' packages go on its path
    path = [day / "site", *(guests / "site").glob("lib/*/site-packages")]
    code, text = python(tmp_path / "option.py", framework, tmp_path, path=path, cwd=tmp_path)
    assert code == 0, text
    words = ["-m", "vla.cli", "sample", tmp_path / "run" / "model", "--data", f"day-data:{tmp_path}", "--json",
             "--framework", framework]  # fmt: skip
    said = {}
    for scale in ("1", "0"):
        for seed in ("1", "2"):
            code, text = python(*words, "--seed", seed, "--set", f"sampling.noise_scale={scale}", path=path)
            assert code == 0, text
            said[scale, seed] = json.loads(text[text.index("{") :])["actions"]
    assert said["1", "1"] != said["1", "2"] and said["0", "1"] == said["0", "2"]
    code, text = python(*words, "--set", "sampling.noise_scal=1", path=path)
    assert code == 2 and "did you mean sampling.noise_scale?" in text, text


def test_diffusion_is_the_action_half_of_ki(guests):
    words = ["--head", "ki", "--tokenizer", "binning", "--set", "head.actions=diffusion", "--preset", "tiny"]
    code, text = python("-m", "vla.cli", "build", *words, path=[guests / "site"])
    assert code == 0 and 'part = "diffusion"' in text and "runs in: torch, jax" in text, text
    code, text = python("-m", "vla.cli", "build", *words[:5], "head.actions=l1", path=[guests / "site"])
    assert code == 2 and "only an expert of its own can be insulated from the backbone" in text, text


def test_guests_pass_the_kit_in_torch(guests):
    tests = [guests / "src" / path.name / "tests" for path in EXAMPLES]
    code, text = kit(guests / "site", tests, "-k", "not jax and not both")
    assert code == 0, text


@pytest.mark.slow
def test_guests_pass_the_whole_kit(guests):
    tests = [guests / "src" / path.name / "tests" for path in EXAMPLES]
    code, text = kit(guests / "site", tests)
    assert code == 0, text
