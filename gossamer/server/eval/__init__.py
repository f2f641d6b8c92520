"""`gossamer eval`: what a configuration does to a model's quality, on text of the user's own.

This file has the options alone, so that `--help` stays instant.
"""

from dataclasses import dataclass
from typing import Self

from gossamer.config import check_fields, option
from gossamer.core import StartupError

KINDS = ("perplexity",)


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """What to read, and what to compare with."""

    text: str = option("", "file of UTF-8 text to predict")
    context: int = option(1024, "tokens of a window; each window is one request", minimum=2)
    stride: int = option(512, "tokens by which windows advance; each token is scored once, with all its window before")
    max_tokens: int | None = option(None, "read no more tokens than this (default: the whole file)", minimum=2)
    compare: tuple[str, ...] | None = option(
        None,
        "flags of another configuration to compare with this one, as '--quantization fp8'; may be repeated",
    )
    output_json: str | None = option(None, "write every figure here")

    def checked(self) -> Self:
        """This. Raises StartupError for a value that makes no sense."""
        if not self.text:
            raise StartupError("No text to predict.\nGive a file of UTF-8 text: --text FILE.")
        check_fields(self)
        if not 1 <= self.stride < self.context:
            raise StartupError(f"--stride must be between 1 and --context {self.context} less 1; got {self.stride}.")
        return self
