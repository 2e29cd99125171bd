"""Which columns make up the state, the action and the instruction: several, slices, parts of GR00T's modality.json."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from attrs import frozen

from vla.errors import DataError
from vla.reading import read_json
from vla_dataset_lerobot.meta import Meta

DEFAULTS = {"state_key": "observation.state", "action_key": "action"}
_GROUPS = {"state_key": "state", "action_key": "action"}  # of modality.json


@frozen
class Piece:
    """Some numbers of a column: those from `start` to `stop`; None: from the first, to the last."""

    column: str
    start: int | None
    stop: int | None
    asked: str  # as the settings name it


class Modality:
    """meta/modality.json, in which GR00T names parts of columns; read when a name is no column."""

    def __init__(self, meta: Meta):
        self.file = meta.root / "meta" / "modality.json"
        self._groups: Mapping[str, Any] | None = None

    def group(self, name: str) -> dict[str, dict[str, Any]]:
        """Its entries for "state", "action", "video" or "annotation"; {} without the file.

        Raises:
            DataError: the file is damaged.
        """
        if self._groups is None:
            self._groups = (
                read_json(self.file, "a metadata file cannot be read", error=DataError) if self.file.is_file() else {}
            )
        found = self._groups.get(name) or {} if isinstance(self._groups, Mapping) else None
        if not isinstance(found, Mapping) or not all(isinstance(value, Mapping) for value in found.values()):
            raise DataError(
                "modality.json does not name parts of columns", field=f"{self.file}: {name}", got=str(found)[:160],
                expected='{"left_arm": {"start": 0, "end": 7}}', fix="copy it again, or name the columns themselves",
            )  # fmt: skip
        return {key: dict(value) for key, value in found.items()}

    def pieces(self, setting: str) -> dict[str, Piece]:
        """The parts of the state or the action by name."""
        return {name: self._piece(setting, name, value) for name, value in self.group(_GROUPS[setting]).items()}

    def _piece(self, setting: str, name: str, value: Mapping[str, Any]) -> Piece:
        start, stop = value.get("start"), value.get("end")
        if not all(n is None or (isinstance(n, int) and not isinstance(n, bool) and n >= 0) for n in (start, stop)):
            raise DataError(
                "modality.json gives no numbers for the start and end of a part", field=f"{self.file}: {name}",
                got=json.dumps(dict(value))[:160], expected='{"start": 0, "end": 7}', fix="correct it",
            )  # fmt: skip
        return Piece(str(value.get("original_key") or DEFAULTS[setting]), start, stop, name)


def pieces_of(
    setting: str, keys: str | Sequence[str], have: Sequence[str], numeric: Sequence[str], modality: Modality
) -> list[Piece]:
    """What the settings `state_key` or `action_key` stand for.

    Args:
        have: all columns.
        numeric: those of numbers, for the message.

    Raises:
        DataError: no such column or part.
    """
    names = [keys] if isinstance(keys, str) else list(keys)
    if names == [DEFAULTS[setting]] and names[0] not in have and modality.group(_GROUPS[setting]):
        return _there(list(modality.pieces(setting).values()), have, numeric, setting, modality)
    if not names:
        raise DataError("no column is named", field=setting, got="[]", expected=numeric, fix="name one or several")
    out = []
    for name in names:
        match = re.fullmatch(r"(.+)\[(\d{1,9})(:(\d{1,9}))?\]", name)
        if name not in have and match:
            start, stop = int(match[2]), int(match[4] if match[3] else match[2]) + (not match[3])
            inner = pieces_of(setting, match[1], have, numeric, modality)
            if len(inner) == 1 and start < stop:
                base = inner[0].start or 0
                within = inner[0].stop is None or base + stop <= inner[0].stop
                if within:
                    out.append(Piece(inner[0].column, base + start, base + stop, name))
                    continue
            raise DataError(
                "a slice takes nothing, or more than there is", field=setting, got=name, expected="column[0:6]",
                fix="write the first number and the one after the last",
            )  # fmt: skip
        if name in have:
            out.append(Piece(name, None, None, name))
            continue
        parts = modality.pieces(setting)
        part = parts.get(name) or parts.get(name.removeprefix(f"{_GROUPS[setting]}."))
        if part is None:
            raise _unknown(setting, name, numeric, list(parts))
        out.append(part)
    return _there(out, have, numeric, setting, modality)


def _there(
    pieces: list[Piece], have: Sequence[str], numeric: Sequence[str], setting: str, modality: Modality
) -> list[Piece]:
    for piece in pieces:
        if piece.column not in have:
            raise DataError(
                "modality.json names a column that the dataset lacks",
                field=f"{modality.file}: {piece.asked}.original_key", got=piece.column, expected=list(numeric),
                fix=f"correct it, or name columns: --set 'data.{setting}=[...]'",
            )  # fmt: skip
    return pieces


def _unknown(setting: str, name: str, numeric: Sequence[str], parts: Sequence[str]) -> DataError:
    stem = name.removeprefix("observation.")
    alike = [column for column in numeric if column.startswith((name + ".", stem + ".", name + "_"))]
    close = difflib.get_close_matches(name, [*numeric, *parts], 1, 0.6) or [c for c in numeric if c == stem]
    names = json.dumps(alike or close or list(numeric[:1]))
    return DataError(
        "the dataset has no such column", field=setting, got=name, expected=[*numeric, *parts],
        fix=f"name one or several: --set 'data.{setting}={names}'",
    )  # fmt: skip


def joined(pieces: Sequence[Piece], columns: Mapping[str, np.ndarray], meta: Meta) -> np.ndarray:
    """The pieces side by side: float32 [N d].

    Raises:
        DataError: a piece reaches beyond its column, or a column is not as wide as info.json says.
    """
    for piece in pieces:
        width, said = columns[piece.column].shape[1], meta.width(piece.column)
        if said is not None and said != width:
            raise DataError(
                "a column is not as wide as info.json says", field=f"{meta.root}: {piece.column}",
                got=f"{width} numbers in data/", expected=f"{said} (shape in meta/info.json)",
                fix="correct the shape, or copy data/ and meta/ of one dataset",
            )  # fmt: skip
        if not (piece.start or 0) < (width if piece.stop is None else piece.stop) <= width:
            raise DataError(
                "a part of a column is not in it", field=f"{meta.root}: {piece.asked}",
                got=f"{piece.start or 0} to {piece.stop}", expected=f"0 to {width}, the width of {piece.column}",
                fix="name a slice that is there, e.g. " + f"{piece.column}[0:{width}]",
            )  # fmt: skip
    if len(pieces) == 1 and (pieces[0].start or 0) == 0:
        only = columns[pieces[0].column]
        if pieces[0].stop in (None, only.shape[1]):
            return only
    return np.concatenate([columns[p.column][:, p.start : p.stop] for p in pieces], 1)


def described(pieces: Sequence[Piece], columns: Mapping[str, np.ndarray], of: Any) -> tuple[str, ...]:
    """Names or units of the joined numbers (`of`: column -> one each); () unless all have them."""
    out: list[str] = []
    for piece in pieces:
        words = of(piece.column)
        if len(words) != columns[piece.column].shape[1]:
            return ()
        out += words[piece.start : piece.stop]
    return tuple(out)
