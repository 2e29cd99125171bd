"""`vla fits`: the matrix of what combines with what. Every cell was checked, none is guessed."""

from __future__ import annotations

from typing import Any

from attrs import frozen

from vla.cli import console


@frozen
class Pairing:
    """One combination of parts as they come, and the first reason why it does not fit ("" if it does)."""

    head: str
    tokenizer: str
    backbone: str
    reason: str = ""


def pairings(head: str = "", tokenizer: str = "", backbone: str = "") -> list[Pairing]:
    """All combinations of installed heads, tokenizers and backbones (with each installed LLM core), checked.

    A backbone with another LLM core than its default is named `backbone+llm`.
    """
    from vla import registry
    from vla.compose import expand_tree, make_spec, resolve_tree
    from vla.errors import PartError, VlaError
    from vla.fitting import check

    for kind, wanted in (("head", head), ("tokenizer", tokenizer), ("backbone", backbone.partition("+")[0])):
        if wanted:
            registry.find(kind, wanted)
    spec = make_spec({})
    found = []
    for h in _names("head", head):
        for t in _names("tokenizer", tokenizer):
            for label, node in _backbones(backbone):
                try:
                    tree = {"head": {"part": h}, "tokenizer": {"part": t}, "backbone": node, "robot": {"part": "plain"}}
                    misfits = check(resolve_tree(expand_tree(tree), spec, "fits"))
                    reason = f"{misfits[0].path} needs {misfits[0].need}" if misfits else ""
                except PartError as error:
                    reason = error.what
                except VlaError as error:
                    reason = str(error).splitlines()[0]
                found.append(Pairing(h, t, label, reason))
    return found


def _names(kind: str, only: str) -> list[str]:
    from vla import registry

    if only:
        return [only]
    return [f"{i.dist}/{i.name}" if registry.ambiguous(i) else i.name for i in registry.listed(kind)]


def _backbones(only: str) -> list[tuple[str, dict[str, Any]]]:
    from vla import registry
    from vla.errors import PartError

    wanted, _, core = only.partition("+")
    out: list[tuple[str, dict[str, Any]]] = []
    for name in _names("backbone", wanted):
        try:
            part = registry.find("backbone", name).load()
        except PartError:
            out.append((name, {"part": name}))  # its reason shows in its column
            continue
        slots = [(slot, default) for slot, (kind, default) in part.slots.items() if kind == "llm"]
        if not core:
            out.append((name, {"part": name}))
        for slot, default in slots:
            for llm in [core] if core else _names("llm", ""):
                if core or llm != default:
                    out.append((f"{name}+{llm}", {"part": name, slot: {"part": llm}}))
    return out


def fits(head: str = "", tokenizer: str = "", backbone: str = "", why: bool = False, json: bool = False) -> int:
    """Which heads, tokenizers and backbones combine, with the settings they come with.

    Args:
        head: only this head.
        tokenizer: only this tokenizer.
        backbone: only this backbone; backbone+llm for another LLM core.
        why: also the reason of every combination that does not fit.
        json: machine-readable output.
    """
    found = pairings(head, tokenizer, backbone)
    if json:
        import json as json_module

        from attrs import asdict

        print(json_module.dumps([asdict(p) for p in found], indent=1))
        return 0
    columns = list(dict.fromkeys(p.backbone for p in found))
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for p in found:
        lines.setdefault((p.head, p.tokenizer), {})[p.backbone] = p.reason
    rows = []
    last = ""
    for (h, t), cells in lines.items():
        marks = ["[red]·[/]" if cells[c] else "[green]fits[/]" for c in columns]
        rows.append(["" if h == last else console.escape(h), console.escape(t), *marks])
        last = h
    good = sum(not p.reason for p in found)
    console.show(console.table("", ["head", "tokenizer", *columns], rows), f"{good} of {len(found)} combinations fit")
    if why:
        reasons: dict[str, list[str]] = {}
        for p in found:
            if p.reason:
                reasons.setdefault(p.reason, []).append(f"{p.head} / {p.tokenizer} / {p.backbone}")
        table = [[console.escape(reason), console.escape(", ".join(where))] for reason, where in reasons.items()]
        console.show(console.table("", ["why not", "where"], table))
    elif good < len(found):
        console.show("`vla fits --why` gives the reasons; `vla build` with a misfit says which change fits")
    return 0


def main(argv: list[str]) -> int:
    """The verb."""
    return console.call(fits, "fits", argv)
