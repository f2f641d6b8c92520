"""The bars that a person sees while a model loads or a long call of `generate` runs."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

from gossamer.engine.info import ProgressCallback

COUNT_AFTER_SECONDS = 2.0


@contextlib.contextmanager
def progress_on_terminal(enabled: bool = True) -> Iterator[ProgressCallback | None]:
    """A bar on a terminal's standard error, gone when the block ends; elsewhere, or if not enabled, nothing."""
    if not enabled or not sys.stderr.isatty():
        yield None
        return
    # Imported late: it takes 0.1 s that a pipe need not pay.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Starting the engine", total=None)
        yield lambda stage, fraction: bar.update(task, description=stage, total=1.0, completed=fraction)


@contextlib.contextmanager
def count_on_terminal(what: str, total: int, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Yields what shows, on standard error and once that takes a while, how many of `total` are done."""
    start, show = time.monotonic(), None
    with contextlib.ExitStack() as bars:

        def update(num_done: int) -> None:
            nonlocal show
            if show is None and enabled and time.monotonic() - start >= COUNT_AFTER_SECONDS:
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

                columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
                bar = bars.enter_context(Progress(*columns, console=Console(stderr=True)))
                show = partial(bar.update, bar.add_task("", total=total))
            if show is not None:
                show(completed=num_done)

        yield update
