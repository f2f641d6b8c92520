"""Finds stop strings in text that arrives in pieces, holding back only what may still become one."""

from collections.abc import Sequence


class StopStrings:
    """Feeds text through; stops at the earliest match.

    At most the longest stop string's length less one is ever held back, and only text that begins a stop string.
    """

    def __init__(self, stops: Sequence[str], include_in_output: bool = False) -> None:
        self._stops = list(stops)
        self._first = frozenset(stop[0] for stop in stops)
        self._longest = max(map(len, stops), default=0)
        self._include = include_in_output
        self._held = ""

    def add(self, text: str) -> tuple[str, str | None]:
        """Returns the text that may be shown now, and the stop string if one is complete: nothing follows then.

        Of several matches the one that begins first counts, and of these the first in the list.
        """
        if not self._stops:
            return text, None
        text = self._held + text
        found = [(at, i) for i, stop in enumerate(self._stops) if (at := text.find(stop)) >= 0]
        if found:
            at, i = min(found)
            self._held = ""
            stop = self._stops[i]
            return text[: at + len(stop)] if self._include else text[:at], stop
        keep = self._pending(text)
        self._held = text[keep:]
        return text[:keep], None

    def flush(self) -> str:
        """What is held back, when no more text will come."""
        held, self._held = self._held, ""
        return held

    def _pending(self, text: str) -> int:
        """Where the longest suffix that begins some stop string starts."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._first and any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)
