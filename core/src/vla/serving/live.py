"""The page at /: what each robot sees and does, latencies, the contract, and a frame of the data to try.

The page is one file. It opens a websocket to /live and gets a snapshot several times a second; nobody watching costs
nothing. It can ask for one thing: what the policy would do for a frame of the data.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from attrs import evolve
from vla_client.wire import ServerError
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from vla.errors import VlaError
from vla.serving.protocol import Ask
from vla.serving.sessions import Session

log = logging.getLogger("vla.serve")
EVERY = 0.1  # seconds between snapshots
VIEW = 192  # pixels of a thumbnail's longer side
BUCKETS = (5, 10, 20, 40, 80, 160, 320, 640, 1280)  # ms, of the histogram
WATCHERS = 8


class Frames:
    """Frames of a dataset that is opened when somebody looks: a large one takes a while.

    Args:
        opens: gives the dataset, or raises what is wrong with it.
        horizon: actions of a frame.
    """

    def __init__(self, opens: Callable[[], Any], horizon: int):
        self._opens, self._horizon, self._dataset, self.why = opens, horizon, None, ""

    def count(self) -> int:
        """How many; 0 with a reason in `why`."""
        if self._dataset is None and not self.why:
            try:
                self._dataset = self._opens()
            except (VlaError, OSError) as error:
                self.why = getattr(error, "what", "") or str(error)
        return 0 if self._dataset is None else len(self._dataset)

    def sample(self, index: int) -> Mapping[str, Any]:
        """The raw sample of a frame."""
        return self._dataset.sample(index, self._horizon)

    def row(self, index: int) -> dict[str, Any] | None:
        """The observation of a frame; None when there is none."""
        return observed(self.sample(index % n)) if (n := self.count()) else None


def observed(sample: Mapping[str, Any]) -> dict[str, Any]:
    """What a robot saw of a raw sample."""
    return {key: sample[key] for key in ("images", "state", "prompt") if key in sample}


class Live:
    """Snapshots of a server for browsers.

    Args:
        server: the `vla.serving.server.Server`.
        frames: of the data, which the page may try.
    """

    def __init__(self, server: Any, frames: Frames):
        self.server, self.frames = server, frames
        self.watchers = 0

    def page(self) -> bytes:
        """The file."""
        return files("vla.serving").joinpath("page.html").read_bytes()

    async def watch(self, ws: ServerConnection) -> None:
        """Serve one browser until it goes."""
        if self.watchers >= WATCHERS:
            await ws.close(1013, "too many are watching")
            return
        self.watchers += 1
        commands = asyncio.create_task(self._commands(ws))
        try:
            count = await asyncio.to_thread(self.frames.count)
            about = {"count": count, "why": self.frames.why}
            await ws.send(json.dumps({"contract": self.server.contract, "frames": about}, default=str))
            while True:
                sessions, about = self.still()
                await ws.send(await asyncio.to_thread(lambda s=sessions, a=about: json.dumps(snapshot(s, a))))
                await asyncio.sleep(EVERY)
        except ConnectionClosed:
            pass
        finally:
            self.watchers -= 1
            commands.cancel()

    def still(self) -> tuple[list[Session], dict[str, Any]]:
        """Copies of what the loop goes on changing: pictures are packed in another thread."""
        dispatcher = self.server.dispatcher
        about = {
            "uptime": time.monotonic() - self.server.started,
            "draining": dispatcher.draining,
            "costs": {str(n): round(cost * 1e3, 1) for n, cost in sorted(dispatcher.costs.items())},
        }
        return [evolve(s, times=s.times.copy(), counts=dict(s.counts)) for s in dispatcher.sessions.values()], about

    async def _commands(self, ws: ServerConnection) -> None:
        async for text in ws:
            try:
                index = json.loads(text)["try"]
            except (ValueError, KeyError, TypeError):
                continue
            if isinstance(index, int) and (count := self.frames.count()):
                await ws.send(json.dumps({"tried": await self._try(index % count)}))

    async def _try(self, index: int) -> dict[str, Any]:
        """The policy's chunk for a frame of the data, beside what was done there."""
        dispatcher = self.server.dispatcher
        session = Session(0, "")
        dispatcher.join(session)
        try:
            sample = await asyncio.to_thread(self.frames.sample, index)
            row = observed(sample)
            answer = await dispatcher.ask(session, Ask(row, {"seed": index}))
            real = ~np.asarray(sample.get("actions_is_pad", np.zeros(len(sample["actions"]), bool)))
            return {
                "index": index, "prompt": str(row.get("prompt", "")), "images": thumbnails(row),
                "chunk": rounded(answer["actions"]), "recorded": rounded(np.asarray(sample["actions"])[real]),
                "ms": round(answer["age_ms"], 1),
            }  # fmt: skip
        except ServerError as error:
            return {"index": index, "error": str(error)}
        except Exception as error:  # the data's reader is anybody's code
            log.warning("frame %d of the data cannot be shown", index, exc_info=error)
            return {"index": index, "error": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"}
        finally:
            dispatcher.close(session)


def snapshot(sessions: Sequence[Session], about: Mapping[str, Any]) -> dict[str, Any]:
    """All that the page shows, as JSON can hold it."""
    times = np.concatenate([np.array(s.times) for s in sessions] or [np.zeros(0)]) * 1e3
    return {
        **about,
        "histogram": np.histogram(times, [0, *BUCKETS, 1e9])[0].tolist(),
        "buckets": BUCKETS,
        "sessions": [session_view(s) for s in sessions],
    }


def session_view(session: Session) -> dict[str, Any]:
    """What the page shows of one robot."""
    now = time.monotonic()
    times = np.array(session.times) * 1e3
    row = session.row or {}
    state = np.asarray(row.get("state", []))
    return {
        "number": session.number, "peer": session.peer, "name": session.name, "counts": dict(session.counts),
        "age": round(now - session.last, 2), "minutes": round((now - session.opened) / 60, 1), "step": session.step,
        "p50": round(float(np.percentile(times, 50)), 1) if len(times) else None,
        "p99": round(float(np.percentile(times, 99)), 1) if len(times) else None,
        "prompt": str(row.get("prompt", ""))[:200],
        "state": [round(float(x), 3) for x in state.ravel()[:64]] if state.dtype.kind in "fiu" else [],
        "images": thumbnails(row), "chunk": rounded(session.chunk),
    }  # fmt: skip


def rounded(chunk: Any) -> list[list[float]]:
    """A chunk as JSON, at most 200 steps of 32 values."""
    return [] if chunk is None else np.round(np.asarray(chunk, np.float64)[:200, :32], 4).tolist()


def thumbnails(row: Mapping[str, Any]) -> dict[str, str]:
    """Camera -> JPEG, base64; whatever is an image in the observation."""
    from PIL import Image

    found = {}
    flat = {**{k: v for k, v in row.items() if not isinstance(v, Mapping)}, **dict(row.get("images") or {})}
    for name, value in flat.items():
        if not isinstance(value, np.ndarray) or value.ndim != 3 or value.dtype != np.uint8:
            continue
        picture = value if value.shape[-1] == 3 else value.transpose(1, 2, 0) if value.shape[0] == 3 else None
        if picture is None or 0 in picture.shape:
            continue
        image = Image.fromarray(np.ascontiguousarray(picture))
        image.thumbnail((VIEW, VIEW))
        out = io.BytesIO()
        image.save(out, "JPEG", quality=80)
        found[str(name)[:60]] = base64.b64encode(out.getvalue()).decode()
    return found
