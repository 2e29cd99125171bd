"""`vla show`: what a variant, a model directory or a part is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla.cli import console

if TYPE_CHECKING:
    from vla.compose import Chosen, Variant


def show(
    names: tuple[str, ...] = (),
    /,
    preset: str = "",
    set: tuple[str, ...] = (),
    no_sizes: bool = False,
    svg: str = "",
    diagram: str = "",
) -> int:
    """Tree of parts, layout, who sees whom, gradient routes and sizes of a variant; or the card of a part.

    Args:
        names: a model type, a variant file, a model directory, or a part (`ki`, or `head ki`).
        preset: as in `vla build`.
        set: as in `vla build`; may be repeated.
        no_sizes: do not count parameters (counting imports torch, and allocates nothing).
        svg: also write the attention picture to this file.
        diagram: also write the architecture to this file, one panel per variant named.
    """
    from vla.errors import VlaError
    from vla.parts import GROUPS

    if not names:
        raise VlaError("name what to show", fix="for example: vla show pi05_ki --preset tiny   or   vla show head ki")
    if len(names) == 2 and names[0] in GROUPS:
        console.show(*part_card(names[0], names[1]))
        return 0
    variants = []
    for name in names:
        found = find_variant(name, preset, set)
        if found is None:
            kind = part_kind(name)
            console.show(*part_card(kind, name))
        else:
            variants.append(found)
            console.show(*variant_page(found, not no_sizes))
    if (svg or diagram) and not variants:
        raise VlaError("a picture is of a variant, not of a part", field="--svg", got=", ".join(names))
    if svg:
        from vla.pictures import mask_svg

        write_picture(svg, mask_svg(variants[0].layout(), title=variants[0].name))
    if diagram:
        from vla.diagram import diagram_svg

        write_picture(diagram, diagram_svg(variants))
    return 0


def write_picture(path: str, text: str) -> None:
    """Write a picture; a path that cannot be written is the user's to mend."""
    from vla.files import write_text
    from vla.pictures import MADE_BY

    write_text(path, text, "the picture", MADE_BY.encode())
    console.note(f"wrote {path}")


def find_variant(name: str, preset: str = "", set: Any = ()) -> Variant | None:
    """The variant a name means: a path, or a model type; None if neither."""
    from vla import compose, registry
    from vla.runs import find_model

    path = Path(os.path.expanduser(name))
    there = path.exists() or find_model(path) != path  # RUN@STEP
    looks_like_path = path.suffix == ".toml" or there or len(path.parts) > 2 or name.startswith((".", "/", "~"))
    if looks_like_path and not any(i.name == name for i in registry.listed(registry.MODEL_TYPE)):
        return compose.build(base=path, preset=preset or None, set=set)
    if any(i.name == name.rpartition("/")[2] for i in registry.listed(registry.MODEL_TYPE)):
        return compose.build(type=name, preset=preset or None, set=set)
    return None


def part_kind(name: str) -> str:
    """The one kind in which a part of this name is installed."""
    import difflib

    from vla import registry
    from vla.errors import PartError
    from vla.parts import GROUPS

    kinds = [kind for kind in GROUPS if any(i.name == name.rpartition("/")[2] for i in registry.listed(kind))]
    if len(kinds) == 1:
        return kinds[0]
    if kinds:
        fix = " or ".join(f"vla show {kind} {name}" for kind in kinds)
        raise PartError(f"{name!r} is the name of several parts", got=name, fix=fix)
    names = [i.name for kind in (*GROUPS, registry.MODEL_TYPE) for i in registry.listed(kind)]
    close = difflib.get_close_matches(name, names, 1)
    types = ", ".join(i.name for i in registry.listed(registry.MODEL_TYPE))
    raise PartError(
        "no variant file, model directory, model type or part of this name",
        got=name,
        expected=f"a path, or one of the model types {types}, or a part (`vla list`)",
        fix=f"did you mean {close[0]!r}?" if close else "",
    )


def variant_page(variant: Variant, sizes: bool = True) -> list[Any]:
    """Everything about a variant, as rich things in reading order."""
    from attrs import asdict

    from vla import pictures

    spec = "  ".join(f"{key}={_plain(value)}" for key, value in asdict(variant.spec).items())
    counts, remark = count_parameters(variant) if sizes else ({}, "")
    layout = variant.layout()
    page: list[Any] = [
        f"[bold]{console.escape(variant.name)}[/]   runs in {' and '.join(variant.frameworks()) or 'no framework'}",
        f"[dim]{console.escape(spec)}[/]\n",
        parts_tree(variant, counts),
    ]
    if counts:
        total = sum(counts.values())
        page.append(
            f"{_count(total)} parameters in all: {_bytes(4 * total)} at float32, {_bytes(2 * total)} at bfloat16\n"
        )
    page.append(f"[dim]{console.escape(remark)}[/]\n" if remark else "")
    page += ["[bold]layout[/]", console.escape(str(layout)) + "\n"]
    page += ["[bold]who sees whom[/] (rows look, columns are seen)", console.escape(pictures.mask_text(layout)) + "\n"]
    losses = variant.head.offers.get("losses") or {}
    if not hasattr(losses, "items"):
        page.append(f"losses: {', '.join(losses)} (the head does not say which role each belongs to)")
        return page
    groups, table = pictures.routes(layout, losses)
    rows = [
        [console.escape(name), *("[green]●[/]" if hit[g] else "[dim]0[/]" for g in groups)]
        for name, hit in table.items()
    ]
    page.append("[bold]gradient routes[/] (● the loss in this row trains the weights in this column)")
    page.append(console.table("", ["loss", *groups], rows))
    return page


def parts_tree(variant: Variant, counts: dict[str, int]) -> Any:
    """The tree of parts with their settings (those that differ from the default in bold) and sizes."""
    from rich.tree import Tree

    root = Tree(console.escape(variant.name), hide_root=True)

    def grow(branch: Any, slot: str, path: str, chosen: Chosen) -> None:
        size = sum(n for group, n in counts.items() if group == path or group.startswith(f"{path}."))
        label = f"{slot} = [bold cyan]{console.escape(chosen.part.name)}[/]"
        label += f"   [yellow]{_count(size)}[/]" if size else ""
        label += f"   [dim]{console.escape(chosen.dist)}[/]"
        if words := settings_line(chosen):
            label += f"\n{words}"
        twig = branch.add(label)
        for inner, below in chosen.inner.items():
            grow(twig, inner, f"{path}.{inner}", below)
        known = tuple(f"{path}.{inner}" for inner in chosen.inner)
        for group, n in counts.items():  # weights of the part itself, beside those of its inner parts
            if group.startswith(f"{path}.") and not group.startswith(known):
                twig.add(f"[dim]{group.removeprefix(f'{path}.')}[/]   [yellow]{_count(n)}[/]")

    for slot, chosen in variant.parts.items():
        grow(root, slot, slot, chosen)
    return root


def settings_line(chosen: Chosen) -> str:
    """`key=value ...` of a part; what differs from the default is not dim."""
    from vla.settings import fields_of

    words = []
    for name, field in fields_of(chosen.part.settings).items():
        value = getattr(chosen.settings, name)
        text = console.escape(f"{name}={_plain(value)}")
        words.append(f"[dim]{text}[/]" if value == field.default else text)
    return "  ".join(words)


def _plain(value: Any) -> str:
    return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, (tuple, list)) else str(value)


def _count(n: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return str(n)


def _bytes(n: int) -> str:
    return _count(n).replace("B", "G") + ("B" if n >= 1000 else " B")


def count_parameters(variant: Variant) -> tuple[dict[str, int], str]:
    """(path of a part or group -> parameters, remark). Built on torch's meta device: no memory, no values.

    Groups: `backbone.vision`, `backbone.projector`, `backbone.llm`, `backbone.llm.<expert>`, `head`, `head.<slot>`.
    """
    from importlib.util import find_spec

    if find_spec("torch") is None:
        return {}, "sizes are counted with torch, which is not installed: pip install torch"
    if "torch" not in variant.frameworks():
        return {}, "sizes are counted with torch, and a part of this variant has no torch code"
    import torch

    from vla.torch_kit.model import build_model

    with torch.device("meta"):
        model = build_model(variant)
    counts: dict[str, int] = {}
    experts = variant.layout().experts
    for name, weight in model.named_parameters():
        group = _group(name, experts, {path for path, _ in variant.walk()})
        counts[group] = counts.get(group, 0) + weight.numel()
    return counts, ""


def _group(name: str, experts: tuple[str, ...], paths: set[str]) -> str:
    words = name.split(".")
    path = words[0]
    for word in words[1:]:
        if f"{path}.{word}" not in paths:
            break
        path = f"{path}.{word}"
    rest = words[path.count(".") + 1 :]
    if expert := next((w for w in rest if w in experts[1:]), ""):
        return f"{path}.{expert} expert"
    return path if path != "backbone" or not rest else f"{path}.{rest[0]}"


def part_card(kind: str, name: str) -> list[Any]:
    """What one part is: settings, slots, presets, offers, needs and why."""
    from vla import compose, registry
    from vla.errors import VlaError
    from vla.settings import describe, fields_of

    item = registry.find(kind, name)
    part = item.load()
    e = console.escape
    card: list[Any] = [f"[bold]{e(part.name)}[/], a {kind} from {e(item.source)}: {e(part.summary)}"]
    card.append(f"runs in: {', '.join(part.frameworks() or compose.FRAMEWORKS)}; {kind} contract {part.contract}")
    fields = fields_of(part.settings)
    if fields:
        rows = [[e(key), e(describe(f.type)), e(_plain(f.default))] for key, f in fields.items()]
        card.append(console.table("settings", ["key", "type", "default"], rows))
    if part.slots:
        rows = [[e(slot), inner, e(default or "(say which)")] for slot, (inner, default) in part.slots.items()]
        card.append(console.table("made of", ["slot", "kind", "default"], rows))
    if part.presets:
        card.append(f"presets: {e(', '.join(part.presets))}")
    try:
        chosen = compose.resolve(kind, f"{item.dist}/{item.name}")
        if chosen.offers:
            card.append(
                console.table("offers", ["facet", "value"], [[e(k), e(str(v))] for k, v in chosen.offers.items()])
            )
        if chosen.needs:
            card.append(console.table("needs", ["what", "why"], [[e(str(n)), e(n.why)] for n in chosen.needs]))
        if part.layout is not None:
            card += ["layout", e(str(chosen.layout()))]
    except VlaError as error:
        card.append(f"[red]does not resolve with its defaults:[/] {e(str(error))}")
    return card


def main(argv: list[str]) -> int:
    """The verb."""
    return console.call(show, "show", argv)
