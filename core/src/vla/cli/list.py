"""`vla list`: what is installed, what is broken, what is known but not here."""

from __future__ import annotations

from typing import Any

from vla.cli import console


def rows(kind: str = "") -> list[dict[str, Any]]:
    """One row per entry point and per known part that is not installed. Imports the light modules of plugins."""
    from vla import registry
    from vla.errors import PartError

    kinds = [k for k in registry.ALL_GROUPS if k != registry.HOOKS]
    if kind and kind not in kinds:
        raise PartError("no such kind of part", field="kind", got=kind, expected=", ".join(kinds))
    known = registry.known_parts()
    out: list[dict[str, Any]] = []
    for k in [kind] if kind else kinds:
        items = registry.listed(k)
        for item in items:
            row: dict[str, Any] = {"kind": k, "name": item.name, "dist": item.dist, "version": item.version}
            try:
                part = item.load()
                row |= {"status": "ok", "frameworks": _frameworks(part), "summary": part.summary}
            except PartError as error:
                row |= {
                    "status": "broken",
                    "frameworks": [],
                    "summary": error.what.partition("broken: ")[2] or error.what,
                }
            if registry.ambiguous(item):
                row["status"] = "double" if row["status"] == "ok" else row["status"]
                others = ", ".join(other.source for other in registry.shadowed(item))
                row["summary"] += f" [same name as {others}: write {item.dist}/{item.name}]"
            out.append(row)
        here = {item.name for item in items}
        for name, dist in known.get(k, {}).items():
            if name not in here:
                line = registry.install_line(dist)
                out.append(
                    {
                        "kind": k,
                        "name": name,
                        "dist": dist,
                        "version": "",
                        "status": "absent",
                        "frameworks": [],
                        "summary": line,
                    }
                )
    return out


def _frameworks(part: Any) -> list[str]:
    from vla.compose import FRAMEWORKS
    from vla.parts import Part

    return list(part.frameworks() or FRAMEWORKS) if isinstance(part, Part) else []


def list_parts(kind: str = "", /, json: bool = False) -> int:
    """Parts: installed, broken, and known but not installed.

    Args:
        kind: only this kind: vision, llm, backbone, tokenizer, head, robot, dataset, env, protocol, model_type.
        json: machine-readable output.
    """
    found = rows(kind)
    if json:
        import json as json_module

        print(json_module.dumps(found, indent=1))
        return 0
    styles = {"ok": "green", "broken": "bold red", "double": "yellow", "absent": "dim"}
    table = []
    last = ""
    for row in found:
        style = styles[row["status"]]
        cells = [
            "" if row["kind"] == last else row["kind"].replace("_", " "),
            row["name"],
            row["status"],
            f"{row['dist']} {row['version']}".strip(),
            " ".join(row["frameworks"]),
            row["summary"],
        ]
        table.append([f"[{style}]{console.escape(cell)}[/]" if cell else "" for cell in cells])
        last = row["kind"]
    console.show(console.table("", ["kind", "name", "status", "from", "runs in", "what it is"], table))
    return 0


def main(argv: list[str]) -> int:
    """The verb."""
    return console.call(list_parts, "list", argv)
