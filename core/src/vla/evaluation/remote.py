"""A policy behind an address, evaluated like one that is here: any server that speaks openpi's protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vla.errors import ActionError, DataError, SettingsError, VlaError
from vla.transforms.group import flatten

PATIENCE = 10.0  # seconds to find the server


class Remote:
    """What `Acts`, at an address.

    Args:
        url: ws://HOST:PORT.
        api_key: sent as `Authorization: Api-Key KEY`; "": none.
        send: "KEY=PATH" pairs: what the server calls it, and where it is in the environment's observation, e.g.
            "observation/image=images/front". With any, only these and the instruction are sent; none: all as it is.
        timeout: seconds that an answer may take.

    Raises:
        SettingsError: nobody serves there, or vla-client is not installed.
    """

    def __init__(self, url: str, *, api_key: str = "", send: Sequence[str] = (), timeout: float = 60.0):
        try:
            from vla_client import RemoteError, RemotePolicy, ServerError
        except ModuleNotFoundError as error:
            fix = "pip install vla-client"
            raise SettingsError("the client is not installed", field="--policy", got=error.name, fix=fix) from error
        self._errors = (RemoteError, ServerError)
        pairs = [text.partition("=") for text in send]
        if bad := ["".join(parts) for parts in pairs if not all(parts)]:
            raise SettingsError("a pair is written KEY=PATH", field="--send", got=bad[0],
                                fix="e.g. --send observation/state=state")  # fmt: skip
        self.send = {theirs: ours for theirs, _, ours in pairs}
        self.client = RemotePolicy(url, api_key=api_key or None, timeout=timeout, name="vla eval")
        try:
            self.client.connect(min(timeout, PATIENCE))
        except self._errors as error:
            if "HTTP 401" in str(error):
                what, fix = "the policy there wants its key", "set VLA_API_KEY (or --api-key) to the server's key"
            else:
                what, fix = "no policy answers there", "start it: vla serve MODEL, or openpi's scripts/serve_policy.py"
            raise SettingsError(what, field="--policy", got=str(error), fix=fix) from error
        self.name = self.client.name
        self.horizon = int(self.client.contract.get("action_horizon") or 0)
        self.digest = str(self.client.digest or "")

    def infer_batch(
        self, rows: Sequence[Mapping[str, Any]], *, seeds: Sequence[int] | None = None, **chunking: Any
    ) -> list[dict[str, Any]]:
        """A chunk per row; the server may take them in one pass. Servers of ours use the seeds.

        `chunking`: prefixes, delays and rtc, as `vla.policy.Policy.infer_batch` takes them.
        """
        try:
            return self.client.infer_batch([self._named(row) for row in rows], seeds=seeds, **chunking)
        except self._errors as error:
            if getattr(error, "kind", "") in ("BAD_ACTION", "NONFINITE_ACTION"):  # the policy's fault, not the wire's
                raise ActionError(error.text) from error
            raise DataError(
                "the server gave no chunk for an observation", field="--policy", got=str(error),
                fix="look at its log; names are mapped by --send KEY=PATH",
            ) from error  # fmt: skip

    def reset(self) -> None:
        """Nothing to forget: every chunk's noise follows from its seed."""

    def close(self) -> None:
        """Say goodbye."""
        self.client.close()

    def _named(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if not self.send:
            return {key: row[key] for key in row if key not in ("actions", "actions_is_pad")}
        flat = flatten(row)
        if lacking := [ours for ours in self.send.values() if ours not in flat]:
            raise _no_such(lacking[0], flat)
        return {**{theirs: flat[ours] for theirs, ours in self.send.items()}, "prompt": row.get("prompt", "")}


def _no_such(path: str, flat: Mapping[str, Any]) -> VlaError:
    return SettingsError("the environment's observation has no such path", field="--send", got=path,
                         expected=sorted(flat))  # fmt: skip
