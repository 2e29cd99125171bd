"""The walls of docs/architecture.md, tested by reading every import of every file, and by looking at sys.modules."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "core" / "src" / "vla"
PLUGINS = sorted(p for p in ROOT.glob("plugins/*/*/src/*") if p.is_dir() and p.name.startswith("vla_"))
STDLIB = sys.stdlib_module_names
TORCH = {"torch", "torchvision", "transformers"}
JAX = {"jax", "jaxlib", "flax", "optax"}
ARRAYS = {"numpy", *TORCH, *JAX}
# Modules that stay light: at import time the standard library, attrs, and each other.
LIGHT_CORE = {
    "vla", "vla.errors", "vla.contracts", "vla.parts", "vla.layout", "vla.registry", "vla.settings", "vla.reading", "vla.tree",
    "vla.compose", "vla.fitting", "vla.model_types", "vla.plain_robot", "vla.pictures", "vla.diagram",
}  # fmt: skip
LIGHT_DEPENDENCIES = {"attrs", "attr"}


def module_name(path, root):
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """(module, at import time) of every import of a file, `if TYPE_CHECKING` left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []

    def visit(node, top):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                visit(child, top)
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the walls"
            found.append((node.module, top))
            found.extend((f"{node.module}.{alias.name}", top) for alias in node.names)
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, top and not inside)

    visit(tree, True)
    return found


def root_of(module):
    return module.partition(".")[0]


CORE_FILES = {
    module_name(path, CORE.parent): path for path in sorted(CORE.rglob("*.py")) if "templates" not in path.parts
}
PLUGIN_FILES = {module_name(path, plugin.parent): path for plugin in PLUGINS for path in sorted(plugin.rglob("*.py"))}


def test_there_is_something_to_read():
    assert set(CORE_FILES) >= LIGHT_CORE and len(PLUGINS) >= 8


@pytest.mark.parametrize("name", sorted(LIGHT_CORE))
def test_light_modules_of_core(name):
    for module, top in imports(CORE_FILES[name]):
        if not top or root_of(module) in STDLIB | LIGHT_DEPENDENCIES | {"__future__"}:
            continue
        assert root_of(module) == "vla", f"{name} imports {module}"
        target = module if module in CORE_FILES else module.rpartition(".")[0]
        assert target in LIGHT_CORE, f"{name} imports {module}, which is not light"


@pytest.mark.parametrize("name", sorted(n for n in CORE_FILES if n.startswith("vla.cli")))
def test_verbs_import_what_is_heavy_only_when_called(name):
    for module, top in imports(CORE_FILES[name]):
        if top:
            assert root_of(module) in STDLIB | {"vla", "attrs", "__future__"}, f"{name} imports {module} at import time"
            heavy = (
                [m for m, t in imports(CORE_FILES[module]) if t and root_of(m) in ARRAYS]
                if module in CORE_FILES
                else []
            )
            assert not heavy, f"{name} imports {module}, which imports {heavy[0]}"


@pytest.mark.parametrize("plugin", PLUGINS, ids=[p.name for p in PLUGINS])
def test_plugins_are_light_and_keep_to_themselves(plugin):
    own = {n: p for n, p in PLUGIN_FILES.items() if root_of(n) == plugin.name}
    for name, path in own.items():
        light = name in (plugin.name, f"{plugin.name}.config")
        for module, top in imports(path):
            root = root_of(module)
            if light and top and root not in STDLIB | LIGHT_DEPENDENCIES | {"__future__", plugin.name}:
                target = module if module in CORE_FILES else module.rpartition(".")[0]
                borrowed = module.startswith("vla_") and ".config" in module
                assert target in LIGHT_CORE or borrowed, f"{name} is light, yet imports {module}"
            if light and root == plugin.name and top:
                assert module in (plugin.name, f"{plugin.name}.config") or module.startswith(
                    f"{plugin.name}.config."
                ), f"{name} is light, yet imports {module}"
            if root.startswith("vla_") and root != plugin.name:
                assert module.split(".")[1:2] == ["config"], f"{name} reaches into another plugin: {module}"


def test_core_never_imports_a_plugin():
    for name, path in CORE_FILES.items():
        for module, top in imports(path):
            late = ("vla.evaluation.remote", "vla.testing.protocols")
            served = name.startswith("vla.serving") or (name in late and not top)
            allowed = root_of(module) == "vla_client" and served  # no plugin: the other end of the wire
            assert not root_of(module).startswith("vla_") or allowed, f"{name} imports {module}"


def test_serving_is_imported_by_its_verb_alone():
    for name, path in CORE_FILES.items():
        for module, top in imports(path):
            if root_of(module) in ("websockets", "msgpack", "prometheus_client") or module.startswith("vla.serving"):
                inside = name in ("vla.cli.serve", "vla.testing.protocols") and not top
                assert name.startswith("vla.serving") or inside, f"{name} imports {module}"


def test_the_client_stands_alone():
    """On a robot's computer: numpy, msgpack and websockets, and a Python that may be 3.9."""
    files = sorted(ROOT.glob("clients/*/src/vla_client/*.py"))
    assert len(files) >= 5
    for path in files:
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 9))
        for module, _ in imports(path):
            allowed = STDLIB | {"numpy", "msgpack", "websockets", "vla_client", "__future__"}
            assert root_of(module) in allowed, f"{path.name} imports {module}"


@pytest.mark.parametrize(("place", "forbidden"), [("torch", JAX), ("jax", TORCH)])
def test_frameworks_never_meet(place, forbidden):
    files = {n: p for n, p in CORE_FILES.items() if n.startswith(f"vla.{place}_kit")}
    files |= {n: p for n, p in PLUGIN_FILES.items() if n.rpartition(".")[2].startswith(f"{place}_")}
    assert files or place == "jax"
    other = {"torch": "jax", "jax": "torch"}[place]
    for name, path in files.items():
        for module, _ in imports(path):
            assert root_of(module) not in forbidden, f"{name} imports {module}"
            assert f"{other}_kit" not in module and f"{other}_impl" not in module, f"{name} imports {module}"


def test_no_module_shadows_a_framework():
    names = {path.name for path in [*CORE_FILES.values(), *PLUGIN_FILES.values()]}
    assert not names & {"torch.py", "jax.py", "numpy.py", "flax.py"}


SNIPPETS = {
    "vla --help": "from vla.cli import main; main(['--help'])",
    "vla list": "from vla.cli import main; main(['list'])",
    "vla fits": "from vla.cli import main; main(['fits'])",
    "vla show": "from vla.cli import main; main(['show', 'pi05_ki', '--no-sizes'])",
    "vla build": "from vla.cli import main; main('build --head ki --tokenizer fast --backbone paligemma'.split())",
    "vla build --preset tiny": "from vla.cli import main; main('build --head ki --tokenizer fast --preset tiny'.split())",
    "a misfit": "from vla.cli import main; main('build --head ki --tokenizer paligemma'.split())",
    "import vla": "import vla; vla.build(type='pi05_ki', preset='tiny').to_toml(); vla.Observation; vla.Part; vla.Layout",
    "all parts": "from vla import registry; [i.load() for k in registry.GROUPS for i in registry.listed(k)]",
}


@pytest.mark.parametrize("name", SNIPPETS)
def test_nothing_heavy_is_loaded(name):
    heavy = sorted(ARRAYS | {"pyarrow", "mujoco", "PIL", "sentencepiece", "gymnasium", "scipy"})
    code = f"{SNIPPETS[name]}\nimport sys\nprint('HEAVY', [m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith("HEAVY []"), run.stdout[-300:]


# Every verb waits for what it imports; benchmarks/bench_startup.py has the times. Of packages, `vla build` takes these:
LIGHT_VERBS = {"vla build", "vla build --preset tiny", "vla build --help", "vla --help"}
# and of the standard library none of these, which are slow or drag in much.
SLOW_STDLIB = {
    "argparse", "asyncio", "concurrent", "ctypes", "email", "http", "importlib.metadata", "logging", "multiprocessing",
    "socket", "sqlite3", "ssl", "subprocess", "tempfile", "unittest", "xml", "zipfile",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(LIGHT_VERBS))
def test_light_verbs_import_what_they_need_and_no_more(name):
    code = SNIPPETS.get(name, "from vla.cli import main; main(['build', '--help'])")
    code = f"import sys\nbefore = set(sys.modules)\n{code}\nprint('NEW', *sorted(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    new = run.stdout.rpartition("NEW")[2].split()
    assert "vla.cli" in new
    ours = {"vla", *(plugin.name for plugin in PLUGINS)}
    assert {root_of(module) for module in new} - STDLIB <= ours | LIGHT_DEPENDENCIES
    assert not set(new) & SLOW_STDLIB
    assert name != "vla --help" or set(new) & set(CORE_FILES) == {"vla", "vla.cli"}
    assert "--help" not in name or not {root_of(module) for module in new} & (ours - {"vla"}), "help loads no plugin"
