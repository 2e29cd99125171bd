"""The layout: who sees whom, and through which looks gradient flows, as one small table.

    role     expert     sees
    image    backbone   image prompt
    prompt   backbone   image prompt
    target   backbone   image prompt target:causal
    action   action     image:stop prompt:stop action

A row reads: tokens of `role` run through the weights of `expert`, and their queries see the keys and values of the
listed roles: `:causal` only those at or before themselves, `:stop` without gradient into those keys and values
(knowledge insulation, arXiv 2505.23705 eq. 5-6). From this table and the per-token (role, valid) arrays come the
attention mask, the position ids, the gradient stops, what may be cached before sampling, and the routes of every loss.
The functions use operators, indexing and `cumsum` alone, so that numpy, torch and JAX arrays all work: the rule exists
once.

openpi's rule (`cumsum(ar_mask)[k] <= cumsum(ar_mask)[q]`, both valid) is the special case in which every role sees
itself and all roles before it.

Axes: B batch, T tokens (all of them, in sequence order), Q queries (the last Q tokens of T).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attrs import frozen

from vla.errors import VlaError

Array = Any
BACKBONE = "backbone"
MODIFIERS = ("stop", "causal")


class LayoutError(VlaError):
    """A layout table is malformed, or asks for what attention cannot do."""


@frozen
class Look:
    """One entry of a `sees` column."""

    role: str
    stop: bool = False
    causal: bool = False

    def __str__(self) -> str:
        return self.role + (":causal" if self.causal else "") + (":stop" if self.stop else "")


@frozen
class Row:
    """One row of the table."""

    role: str
    expert: str
    sees: tuple[Look, ...]

    def look(self, role: str) -> Look | None:
        """How this row sees `role`, or None if it does not."""
        return next((look for look in self.sees if look.role == role), None)


@frozen
class Span:
    """A run of neighbouring tokens of one expert in the sequence; each of its tokens has one of `roles`."""

    roles: tuple[str, ...]
    expert: str
    length: int


@frozen
class Read:
    """Queries [start, stop) of the sequence see these key slices without gradient."""

    start: int
    stop: int
    detached: tuple[tuple[int, int], ...]


@frozen
class Layout:
    """The table. Rows are in sequence order; the backbone's rows come first."""

    rows: tuple[Row, ...]

    def __attrs_post_init__(self) -> None:
        names = [row.role for row in self.rows]
        if twice := {name for name in names if names.count(name) > 1}:
            raise LayoutError("a role has two rows", field=sorted(twice)[0], got=names, fix="give each role one row")
        for row in self.rows:
            for look in row.sees:
                if look.role not in names:
                    raise LayoutError(
                        f"role {row.role!r} sees a role that has no row",
                        field=f"{row.role}.sees",
                        got=look.role,
                        expected=names,
                        fix=f"add a row for {look.role!r} or take it out",
                    )

    @classmethod
    def parse(cls, text: str) -> Layout:
        """The layout from its table as text; a first line `role expert sees` is a heading."""
        rows = []
        for line in text.strip().splitlines():
            words = line.split()
            if not words or words[:3] == ["role", "expert", "sees"]:
                continue
            if len(words) < 3:
                raise LayoutError("a row needs a role, an expert and what it sees", got=line.strip())
            looks = []
            for word in words[2:]:
                role, *modifiers = word.split(":")
                if unknown := set(modifiers) - set(MODIFIERS):
                    raise LayoutError("unknown modifier", field=word, got=sorted(unknown)[0], expected=list(MODIFIERS))
                looks.append(Look(role, stop="stop" in modifiers, causal="causal" in modifiers))
            rows.append(Row(words[0], words[1], tuple(looks)))
        return cls(tuple(rows))

    def __str__(self) -> str:
        table = [("role", "expert", "sees")] + [(r.role, r.expert, " ".join(map(str, r.sees))) for r in self.rows]
        wide = [max(len(line[i]) for line in table) for i in (0, 1)]
        return "\n".join(f"{a:<{wide[0]}}   {b:<{wide[1]}}   {c}" for a, b, c in table)

    @property
    def roles(self) -> tuple[str, ...]:
        """Role names; a role's id in the (role, valid) arrays is its index here."""
        return tuple(row.role for row in self.rows)

    @property
    def backbone_sees_experts(self) -> bool:
        """Whether a token of the backbone looks at an expert's: then neither can run before the other."""
        seen = {look.role for row in self.rows if row.expert == BACKBONE for look in row.sees}
        return any(self.row(role).expert != BACKBONE for role in seen)

    @property
    def experts(self) -> tuple[str, ...]:
        """Expert names in order of first appearance."""
        return tuple(dict.fromkeys(row.expert for row in self.rows))

    def row(self, role: str) -> Row:
        """The row of a role."""
        for row in self.rows:
            if row.role == role:
                return row
        raise LayoutError("no such role in this layout", got=role, expected=list(self.roles))

    def role_id(self, role: str) -> int:
        """The number that stands for a role in role arrays."""
        self.row(role)
        return self.roles.index(role)

    def join(self, other: Layout) -> Layout:
        """Both tables in one. A role in both must have the same row in both."""
        rows = list(self.rows)
        for row in other.rows:
            if row.role not in self.roles:
                rows.append(row)
            elif self.row(row.role) != row:
                mine = " ".join(map(str, self.row(row.role).sees))
                theirs = " ".join(map(str, row.sees))
                raise LayoutError("two heads disagree about a role", field=row.role, got=theirs, expected=mine)
        return Layout(tuple(sorted(rows, key=lambda row: row.expert != BACKBONE)))

    def insulated(self) -> Layout:
        """The same table with every look of another expert at a backbone role stopped: knowledge insulation."""
        inside = {row.role for row in self.rows if row.expert == BACKBONE}

        def stopped(row: Row) -> Row:
            if row.expert == BACKBONE:
                return row
            looks = tuple(Look(x.role, x.stop or x.role in inside, x.causal) for x in row.sees)
            return Row(row.role, row.expert, looks)

        return Layout(tuple(map(stopped, self.rows)))

    def cacheable(self, varying: Iterable[str]) -> tuple[str, ...]:
        """Roles whose keys and values can be computed once before sampling: they see no varying role, at any remove."""
        tainted = set(varying)
        while more := {r.role for r in self.rows if r.role not in tainted and any(x.role in tainted for x in r.sees)}:
            tainted |= more
        return tuple(role for role in self.roles if role not in tainted)

    def reached(self, role: str) -> tuple[str, ...]:
        """Roles whose tokens get gradient from a loss on `role`: itself, and all it sees through unstopped looks."""
        found, todo = {role}, [role]
        while todo:
            for look in self.row(todo.pop()).sees:
                if not look.stop and look.role not in found:
                    found.add(look.role)
                    todo.append(look.role)
        return tuple(name for name in self.roles if name in found)

    def reads(self, spans: Sequence[Span]) -> tuple[Read, ...]:
        """Where attention must cut gradients, for a sequence made of these spans; () when nowhere.

        Raises:
            LayoutError: two roles of one span disagree about the stop, which attention cannot do.
        """
        edges = [0]
        for span in spans:
            edges.append(edges[-1] + span.length)
        reads: list[Read] = []
        for i, reader in enumerate(spans):
            cuts: list[tuple[int, int]] = []
            for j, source in enumerate(spans):
                looks = [self.row(q).look(k) for q in reader.roles for k in source.roles]
                stops = {look.stop for look in looks if look is not None}
                if len(stops) > 1:
                    raise LayoutError(
                        "roles that share one run of tokens must agree about the stop",
                        field=f"{'/'.join(reader.roles)} sees {'/'.join(source.roles)}",
                        fix="stop all of these looks, or none",
                    )
                if stops == {True}:
                    if cuts and cuts[-1][1] == edges[j]:
                        cuts[-1] = (cuts[-1][0], edges[j + 1])
                    else:
                        cuts.append((edges[j], edges[j + 1]))
            if reads and reads[-1].detached == tuple(cuts):
                reads[-1] = Read(reads[-1].start, edges[i + 1], tuple(cuts))
            else:
                reads.append(Read(edges[i], edges[i + 1], tuple(cuts)))
        return tuple(reads) if any(read.detached for read in reads) else ()


def clip(reads: Sequence[Read], start: int, stop: int) -> tuple[Read, ...]:
    """The reads of queries [start, stop) alone, counted from `start`."""
    return tuple(
        Read(max(r.start, start) - start, min(r.stop, stop) - start, r.detached)
        for r in reads
        if r.start < stop and r.stop > start
    )


def attention_mask(layout: Layout, roles: Array, valid: Array, queries: int | None = None) -> Array:
    """Who may see whom, [B Q T] bool: True where query q may see key k.

    Args:
        layout: the table.
        roles: [B T] int, role ids in sequence order.
        valid: [B T] bool; an invalid token (padding, absent camera) sees nobody and is seen by nobody.
        queries: only the last `queries` tokens ask; default all.
    """
    first = 0 if queries is None else roles.shape[1] - queries
    order = valid.cumsum(-1)  # valid tokens up to and including oneself: compares like the index among valid tokens
    asking, asking_order = roles[:, first:], order[:, first:]
    mask = valid[:, first:, None] & valid[:, None, :]
    allowed = None
    # Rows with the same looks share one outer product.
    readers: dict[tuple[Look, ...], list[int]] = {}
    for row in layout.rows:
        readers.setdefault(row.sees, []).append(layout.role_id(row.role))
    for sees, ids in readers.items():
        reader = _any_of(asking, ids)[:, :, None]
        for causal in (False, True):
            seen = [layout.role_id(look.role) for look in sees if look.causal is causal]
            if not seen:
                continue
            pair = reader & _any_of(roles, seen)[:, None, :]
            if causal:
                pair = pair & (order[:, None, :] <= asking_order[:, :, None])
            allowed = pair if allowed is None else allowed | pair
    return mask & (mask & ~mask if allowed is None else allowed)


def positions(layout: Layout, roles: Array, valid: Array, queries: int | None = None) -> Array:
    """Position ids [B Q] int: how many valid tokens a token can see before itself.

    So a token that a role cannot see (a FAST target, for the action expert) never shifts it. Equal to openpi's
    `cumsum(valid) - 1` for its own layouts.
    """
    first = 0 if queries is None else roles.shape[1] - queries
    out = None
    for row in layout.rows:
        seen = _any_of(roles, [layout.role_id(look.role) for look in row.sees]) & valid
        before = seen.cumsum(-1) - seen * 1  # exclusive count
        mine = (roles == layout.role_id(row.role)) * before
        out = mine if out is None else out + mine
    assert out is not None
    return out[:, first:]


def _any_of(roles: Array, ids: Sequence[int]) -> Array:
    found = roles == ids[0] if ids else roles < 0
    for i in ids[1:]:
        found = found | (roles == i)
    return found


def gradient_routes(layout: Layout, losses: Mapping[str, str]) -> dict[str, dict[str, bool]]:
    """Loss name -> expert -> whether gradient of that loss reaches that expert's weights.

    `losses`: loss name -> the role it is a loss on.

    A loss reaches an expert if it reaches tokens that run through it. The vision encoder is the expert of role `image`
    one step further up: it is reached exactly when role `image` is.
    """
    out = {}
    for name, role in losses.items():
        reached = set(layout.reached(role))
        out[name] = {e: any(r.expert == e and r.role in reached for r in layout.rows) for e in layout.experts}
        out[name]["vision"] = "image" in reached
    return out
