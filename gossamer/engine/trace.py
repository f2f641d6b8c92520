"""A timeline of the engine for Perfetto or chrome://tracing: what threads and device did when, how deep queues were."""

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from gossamer.core import ScheduledBatch, StartupError, StepResult

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_EVENTS = 1_000_000
"""About 200 MB of memory and 100 MB of file: minutes of the quickest steps. Later events are dropped."""
DEVICE_TRACK = 1


class Trace:
    """Collects events from any thread; `write` makes the file. Times are `time.monotonic()` seconds.

    Raises StartupError at once if the file cannot be written.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        try:
            self._path.write_text("")
        except OSError as error:
            raise StartupError(f"--profile-trace {path}: {error.strerror}.") from error
        self._start = time.monotonic()
        self._events: list[dict[str, Any]] = []
        self._tracks = {DEVICE_TRACK: "device"}

    def timed(self, name: str, function: Callable[..., T]) -> Callable[..., T]:
        """`function`, with a span called `name` on its thread's track for every call."""

        def call(*args: Any) -> T:
            start = time.monotonic()
            try:
                return function(*args)
            finally:
                thread = threading.current_thread()
                track = thread.native_id or 0
                self._tracks.setdefault(track, thread.name)
                self._add("X", name, start, track, dur=(time.monotonic() - start) * 1e6)

        return call

    def step(self, batch: ScheduledBatch, result: StepResult) -> None:
        """The time that the device was busy with a step."""
        what = "decode" if batch.rows[-1].is_decode else "prefill"
        args = {"step": batch.step_id, "rows": len(batch.rows), "tokens": batch.num_tokens}
        self._add("X", what, result.start_time, DEVICE_TRACK, dur=result.device_seconds * 1e6, args=args)

    def counters(self, **values: int) -> None:
        """The values of counters from now on."""
        now = time.monotonic()
        for name, value in values.items():
            self._add("C", name, now, 0, args={name: value})

    def write(self) -> None:
        named = {"ph": "M", "pid": 1, "name": "thread_name"}
        names = [{**named, "tid": track, "args": {"name": name}} for track, name in self._tracks.items()]
        if len(self._events) >= MAX_EVENTS:
            logger.warning("%s has the first %d events only", self._path, MAX_EVENTS)
        self._path.write_text(json.dumps({"traceEvents": names + self._events, "displayTimeUnit": "ms"}))

    def _add(self, phase: str, name: str, seconds: float, track: int, **more: Any) -> None:
        if len(self._events) < MAX_EVENTS:
            at = (seconds - self._start) * 1e6
            self._events.append({"ph": phase, "name": name, "ts": at, "pid": 1, "tid": track, **more})
