"""Plugins made on the fly: a module and a dist-info folder in a temporary place on sys.path."""

import sys

import pytest

from vla import registry


class Site:
    """A folder on sys.path that looks to Python like a place where packages were installed."""

    def __init__(self, folder):
        self.folder = folder

    def add(self, dist, entry_points, modules, version="1.0", refresh=True):
        """`entry_points`: {group: {name: "module:attr"}}; `modules`: {module: source}."""
        for module, source in modules.items():
            (self.folder / f"{module}.py").write_text(source)
        info = self.folder / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n\nName: not me\n")
        lines = [
            f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in names.items()) for group, names in entry_points.items()
        ]
        (info / "entry_points.txt").write_text("\n\n".join(lines) + "\n")
        if refresh:
            registry.refresh()
        return info


@pytest.fixture
def site(tmp_path, monkeypatch):
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    registry.refresh()
    yield Site(folder)
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", "") or "").startswith(str(folder)):
            del sys.modules[name]
    monkeypatch.undo()
    registry.refresh()


# A small world of parts, so that core's tests need no plugin of ours. Names start with "toy".
WORLD = """
from attrs import field, frozen, validators
from vla.layout import Layout
from vla.parts import Expert, ModelType, Part, at_least, equals, has, is_true

@frozen
class Core:
    width: int = 64
    depth: int = 2
    rate: float = 0.5
    note: str = ""
    tied: bool = True
    scales: tuple[int, ...] = (1, 2)

def core_part(name, multi):
    return Part("llm", name, "a core", contract=2, settings=Core, presets={"tiny": {"width": 8}, "odd": {"width": 7, "depth": 1}},
                offers=lambda s, i: {"width": s.width, "multi_expert": multi, "insulates": multi}, torch="toyworld:X")

CORE, LONE = core_part("toycore", True), core_part("toylone", False)
BACKBONE = Part("backbone", "toybone", "a backbone", slots={"llm": ("llm", "toycore")},
                offers=lambda s, i: dict(i["llm"]), torch="toyworld:X", jax="toyworld:X")

@frozen
class Text:
    prompt: str = field(default="long", validator=validators.in_(("long", "short")))

TEXT = Part("tokenizer", "toytext", "text", settings=Text,
            offers=lambda s, i: {"emits": {"text", "state"} if s.prompt == "long" else {"text"}})
CODEC = Part("tokenizer", "toycodec", "codec", slots={"text": ("tokenizer", "toytext")},
             offers=lambda s, i: {"emits": {"actions", *i["text"]["emits"]}})

PREFIX = "image backbone image prompt\\nprompt backbone image prompt\\n"

@frozen
class Flow:
    width: int = 32
    state: str = field(default="tokens", validator=validators.in_(("tokens", "none")))

FLOW = Part("head", "toyflow", "chunks", contract=2, settings=Flow, presets={"tiny": {"width": 4}},
            offers=lambda s, i: {"gives": "chunk", "losses": {"actions": "action"}},
            needs=lambda s: (is_true("backbone", "multi_expert", "its expert runs beside the backbone"),
                             *((has("tokenizer", "emits", "state", "it reads the state"),) if s.state == "tokens" else ())),
            layout=lambda s, i: Layout.parse(PREFIX + "action action image prompt action"),
            experts=lambda s, i: {"action": Expert(s.width, 2 * s.width)}, torch="toyworld:X", jax="toyworld:X")
TOKENS = Part("head", "toytokens", "tokens", contract=2, offers=lambda s, i: {"gives": "tokens", "losses": {"tokens": "target"}},
              needs=(has("tokenizer", "emits", "actions", "it predicts action tokens"),),
              layout=lambda s, i: Layout.parse(PREFIX + "target backbone image prompt target:causal"),
              torch="toyworld:X", jax="toyworld:X")

@frozen
class Both:
    weight: float = 1.0

BOTH = Part("head", "toyboth", "both", contract=2, settings=Both, slots={"tokens": ("head", "toytokens"), "actions": ("head", "toyflow")},
            offers=lambda s, i: {"gives": "both", "losses": {**i["tokens"]["losses"], **i["actions"]["losses"]}},
            needs=(equals("tokens", "gives", "tokens", "this half trains the backbone"),
                   equals("actions", "gives", "chunk", "this half gives the chunk"),
                   is_true("backbone", "insulates", "no gradient into the backbone"),
                   at_least("backbone", "width", 8, "less is too small")),
            layout=lambda s, i: i["tokens"].join(i["actions"]).insulated(),
            experts=lambda s, i: {**i["tokens"], **i["actions"]}, torch="toyworld:X", jax="toyworld:X")
OPEN = Part("head", "toyopen", "no default inside", contract=2, slots={"half": ("head", "")}, layout=lambda s, i: i["half"],
            experts=lambda s, i: i["half"], offers=lambda s, i: i["half"])
ROBOT = Part("robot", "toyarm", "an arm", offers=lambda s, i: {"action_dim": 9, "state_dim": 40, "cameras": ("wrist",)})
TYPE = ModelType("toytype", "a type", tree={"backbone": {"part": "toybone", "llm": {"part": "toycore", "width": 48}},
                 "tokenizer": "toycodec", "head": {"part": "toyboth", "actions": {"part": "toyflow", "width": 16}}},
                 spec={"max_token_len": 111})
"""  # noqa: E501
WORLD_ENTRIES = {
    "vla.llms": {"toycore": "toyworld:CORE", "toylone": "toyworld:LONE"},
    "vla.backbones": {"toybone": "toyworld:BACKBONE"},
    "vla.tokenizers": {"toytext": "toyworld:TEXT", "toycodec": "toyworld:CODEC"},
    "vla.heads": {
        "toyflow": "toyworld:FLOW",
        "toytokens": "toyworld:TOKENS",
        "toyboth": "toyworld:BOTH",
        "toyopen": "toyworld:OPEN",
    },
    "vla.robots": {"toyarm": "toyworld:ROBOT"},
    "vla.model_types": {"toytype": "toyworld:TYPE"},
}


@pytest.fixture
def world(site):
    """The site with the toy parts installed as distribution `toy-world 1.0`."""
    site.add("toy-world", WORLD_ENTRIES, {"toyworld": WORLD})
    return site
