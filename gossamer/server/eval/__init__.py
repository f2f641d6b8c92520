"""`gossamer eval`: what a configuration does to a model's quality, on text of the user's own.

This file has the options alone, so that `--help` stays instant.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from gossamer.config import check_fields, option
from gossamer.core import StartupError

KINDS = ("perplexity", "longcontext")


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """What to read, and what to compare with."""

    text: tuple[str, ...] | None = option(None, "files of UTF-8 text to predict", many=True)
    context: int = option(1024, "perplexity: tokens of a window; each window is one request", minimum=2)
    stride: int = option(
        512, "perplexity: tokens by which windows advance; each is scored once, with all its window before"
    )
    max_tokens: int | None = option(None, "perplexity: read no more tokens than this (default: all)", minimum=2)
    context_lens: tuple[int, ...] = option(
        (1024, 2048, 4096, 8192), "longcontext: tokens of prompts, rising (default: 1K,2K,4K,8K)", size=True
    )
    depths: tuple[float, ...] = option(
        tuple(i / 10 for i in range(10)), "longcontext: where needles lie; 0 is the beginning (default: 0,0.1,...,0.9)"
    )
    num_samples: int = option(4, "longcontext: prompts of each kind and length, drawn by --seed", minimum=1)
    compare: tuple[str, ...] | None = option(
        None, "flags of another configuration to compare with this one, as '--quantization fp8'; may be repeated"
    )
    output_json: str | None = option(None, "write every figure here")
    plot: str | None = option(None, "longcontext: draw the figures here (PNG, PDF, SVG)")

    def checked(self) -> Self:
        """This. Raises StartupError for a value that makes no sense."""
        if not self.text:
            raise StartupError("No text to predict.\nGive files of UTF-8 text: --text FILE.")
        check_fields(self)
        if not 1 <= self.stride < self.context:
            raise StartupError(f"--stride must be between 1 and --context {self.context} less 1; got {self.stride}.")
        if self.context_lens[0] < 2 or [*self.context_lens] != sorted({*self.context_lens}):
            raise StartupError(f"--context-lens must rise from 2 or more; got {','.join(map(str, self.context_lens))}.")
        if not all(0.0 <= depth <= 1.0 for depth in self.depths):
            raise StartupError(f"--depths must be between 0 and 1; got {','.join(map(str, self.depths))}.")
        for flag, path in (("--output-json", self.output_json), ("--plot", self.plot)):
            if path is not None and not Path(path).parent.is_dir():
                raise StartupError(f"{flag} {path}: there is no such folder.")
        return self

    @property
    def names(self) -> str:
        """Of the files of --text."""
        return ", ".join(Path(path).name for path in self.text or ())

    def read(self) -> list[str]:
        """The files of --text. Raises StartupError, naming the one that cannot be read."""
        texts = []
        for path in self.text or ():
            try:
                texts.append(Path(path).expanduser().read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                raise StartupError(f"--text {path}: {error}.") from error
        return texts
