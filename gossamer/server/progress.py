"""The bar that a person sees while a model loads."""

import contextlib
import sys
from collections.abc import Iterator

from gossamer.engine.info import ProgressCallback


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
