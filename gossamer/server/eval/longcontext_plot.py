"""The picture of `gossamer eval longcontext`. matplotlib is an extra, and imported when a plot is asked for."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from gossamer.core import StartupError


def need_matplotlib() -> None:
    if find_spec("matplotlib") is None:
        raise StartupError("--plot needs matplotlib, which is not installed: pip install 'gossamer[plot]'.")


def plot(path: str, details: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """By configuration and case, as `figures` returns it: each kind against its lengths, and keys against depth.

    Raises StartupError if the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 7.0), layout="constrained")
    axes = figure.subplots(2, 2).flat
    kinds = {"perplexity": "tokens before", "needle": "tokens of context", "keys": "tokens of context"}
    for axis, (kind, label) in zip(axes, kinds.items(), strict=False):
        for name, cases in details.items():
            values = {case.removeprefix(f"{kind} "): row["figure"] for case, row in cases.items() if kind in case}
            axis.plot([*values], [*values.values()], marker="o", label=name)
        axis.set(title=kind if kind == "perplexity" else f"{kind}: share answered", xlabel=label)
    last = [case for case in next(iter(details.values())) if case.startswith("keys")][-1]
    for name, cases in details.items():
        shares = cases[last]["by depth"]
        axes[-1].plot([float(depth) for depth in shares], [*shares.values()], marker="o", label=name)
    axes[-1].set(title=f"{last}: share answered", xlabel="depth of the key")
    for axis in axes[1:]:
        axis.set_ylim(-0.05, 1.05)
    axes[0].legend(fontsize="small")
    try:
        figure.savefig(path, dpi=80)
    except (OSError, ValueError) as error:
        raise StartupError(f"--plot {path}: {error}.") from error
