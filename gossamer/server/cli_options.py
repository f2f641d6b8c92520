"""Command-line flags generated from the config dataclasses, and a parser that explains a mistake in two lines.

Apart from cli.py so that the flags can be built, listed and tested without running anything. Only the standard
library and the config are imported: `--help` must be instant.
"""

import argparse
import dataclasses
import difflib
import functools
import re
import shutil
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal, NamedTuple, NoReturn, Union, get_args, get_origin, get_type_hints

from gossamer.config import flag
from gossamer.core import GossamerError, SamplingParams

SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

SAMPLING_HELP = {
    "max_tokens": "most tokens to write",
    "min_tokens": "fewest tokens to write before a stop counts",
    "temperature": "0 is greedy: always the likeliest token",
    "top_p": "sample from the likeliest tokens that hold this much probability",
    "top_k": "sample from this many likeliest tokens; 0 is off",
    "min_p": "drop tokens less likely than this fraction of the likeliest",
    "presence_penalty": "-2 to 2; above 0 discourages tokens that have appeared",
    "frequency_penalty": "-2 to 2; above 0 discourages tokens in proportion to their count",
    "repetition_penalty": "above 1 discourages tokens of the prompt and the output",
    "stop": "stop at this text; may be repeated",
    "ignore_eos": "go on after the end-of-sequence token",
}
"""The sampling fields that `generate` and `chat` offer. `seed` is missing on purpose: the engine's --seed serves."""

FOREIGN_FLAGS = {
    "--block-size": "--page-size",
    "--model-path": "--model",
    "--tokenizer-path": "--tokenizer",
    "--context-length": "--max-model-len",
    "--mem-fraction-static": "--gpu-memory-utilization",
    "--max-running-requests": "--max-num-seqs",
    "--max-queued-requests": "--max-num-queued",
    "--chunked-prefill-size": "--max-num-batched-tokens",
    "--disable-radix-cache": "--no-enable-prefix-caching",
    "--disable-overlap-schedule": "--no-overlap",
    "--disable-cuda-graph": "--enforce-eager",
    "--random-seed": "--seed",
    "--speculative-config": "--num-speculative-tokens",
    "--speculative-num-draft-tokens": "--num-speculative-tokens",
}
"""What vLLM and SGLang call flags of ours."""


class UsageError(GossamerError):
    """A command line that cannot be understood. The message names the flag and the way out."""


class Parser(argparse.ArgumentParser):
    """argparse without the page of usage on every mistake, and without guessing at abbreviated flags."""

    def __init__(self, prog: str, description: str | None = None) -> None:
        usage = f"{prog} [MODEL] [flags]"
        width = min(110, shutil.get_terminal_size().columns)
        formatter = functools.partial(argparse.HelpFormatter, max_help_position=36, width=width)
        super().__init__(prog, usage, description, allow_abbrev=False, formatter_class=formatter)

    def error(self, message: str) -> NoReturn:
        found = re.fullmatch(r"argument ([^:]+): (.*)", message, re.DOTALL)
        if found:
            name, what = found.group(1).split("/")[0], found.group(2)
            if what == "expected one argument":
                what = "needs a value."
            message = f"{name} {what}"
        raise UsageError(message)

    @property
    def flags(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings if name.startswith("--")]


def parse_size(text: str) -> int:
    """`4096`, `512M`, `1.5G`: a count with an optional binary suffix. Raises ArgumentTypeError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:I?B)?", text.strip().upper())
    value = float(found.group(1)) * SUFFIXES[found.group(2)] if found else 0.5
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"wants a whole number, also with a suffix as in 512M or 1.5G; got {text!r}.")
    return int(value)


def _number_parser(kind: type, what: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"wants {what}; got {text!r}.") from None

    return parse


def _choice_parser(choices: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            near = difflib.get_close_matches(text, choices, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(choices)}; got {text!r}.{hint}")
        return text

    return parse


class Group(NamedTuple):
    """Flags from the fields of dataclass `source` that carry help text, or from those of them in `only`.

    `defaults` says where the help should show another default than the dataclass has.
    """

    source: type
    title: str
    only: Collection[str] | None = None
    defaults: Mapping[str, Any] = {}


def add_fields(parser: argparse.ArgumentParser, group: Group) -> None:
    """Adds a group's flags. One that is not given leaves no trace in the namespace: the dataclass's default holds."""
    section, cls = parser.add_argument_group(group.title), group.source
    hints = get_type_hints(cls)
    for item in dataclasses.fields(cls):
        text = item.metadata.get("help") or (SAMPLING_HELP.get(item.name) if cls is SamplingParams else None)
        if text is None or (group.only is not None and item.name not in group.only):
            continue
        default = group.defaults.get(item.name, item.default)
        if item.metadata.get("positional"):
            section.add_argument(item.name, nargs="?", metavar=item.name.upper(), default=argparse.SUPPRESS, help=text)
            alias: dict[str, Any] = {"dest": f"{item.name}_flag", "metavar": item.name.upper()}
            section.add_argument(flag(item.name), default=argparse.SUPPRESS, help="the same", **alias)
        else:
            size, many = item.metadata.get("size", False), item.metadata.get("many", False)
            _add_flag(section, item.name, hints[item.name], text, default, size=size, many=many)


def _add_flag(group: Any, name: str, hint: Any, text: str, default: Any, *, size: bool, many: bool) -> None:
    kind = _without_none(hint)
    hidden = default is None or default is False or default == "" or "default" in text
    shown = "" if hidden else f" (default: {_show(default, size)})"
    options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": (text + shown).replace("%", "%%")}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif get_origin(kind) is Literal:
        choices = get_args(kind)
        options |= {"type": _choice_parser(choices), "metavar": "{" + ",".join(choices) + "}"}
    elif kind is int and size:
        options |= {"type": parse_size, "metavar": "SIZE"}
    elif kind is int:
        options |= {"type": _number_parser(int, "a whole number"), "metavar": "N"}
    elif kind is float:
        options |= {"type": _number_parser(float, "a number"), "metavar": "X"}
    elif kind is str:
        options |= {"metavar": "TEXT"}
    elif get_origin(kind) is tuple and get_args(kind)[0] is not str:
        what = "numbers, as 0.1,0.5" if get_args(kind)[0] is float else "whole numbers, as 1,2"
        each = parse_size if size else _number_parser(get_args(kind)[0], what)
        options |= {"type": lambda text: tuple(map(each, text.split(","))), "metavar": "N,N"}
    elif many:
        options |= {"action": "extend", "nargs": "+", "metavar": "FILE"}
    else:  # str | list[str]
        options |= {"action": "append", "metavar": "TEXT"}
    group.add_argument(flag(name), **options)


def _without_none(hint: Any) -> Any:
    """`int | None` -> `int`; a union of several types stays as it is."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 else hint


def _show(value: Any, size: bool) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if size and value:
        suffix = next(s for s in reversed(SUFFIXES) if value % SUFFIXES[s] == 0)
        return f"{value // SUFFIXES[suffix]}{suffix}"
    return str(value)


def given(args: argparse.Namespace, *classes: type) -> dict[str, Any]:
    """The fields of `classes` that the command line set, by name."""
    names = {item.name for cls in classes for item in dataclasses.fields(cls)}
    return {name: value for name, value in vars(args).items() if name in names}


def parse(command: str, parsers: dict[str, Parser], argv: list[str]) -> argparse.Namespace:
    """Parses `argv` for one of the commands. Raises UsageError, which suggests what the user may have meant.

    `--max_model_len` is read as `--max-model-len`.
    """
    argv = [_with_dashes(word) for word in argv]
    args, rest = parsers[command].parse_known_args(argv)
    unknown = next((word for word in rest if word.startswith("-") and len(word) > 1), None)
    if unknown is not None:
        raise UsageError(explain_unknown_flag(unknown.partition("=")[0], command, parsers))
    if rest:
        raise UsageError(f"Unexpected argument {rest[0]!r}.\n`gossamer {command} --help` lists what it takes.")
    return args


def _with_dashes(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if re.fullmatch(r"--[A-Za-z][\w-]*", name) else word


def explain_unknown_flag(name: str, command: str, parsers: dict[str, Parser]) -> str:
    owners = [other for other, parser in parsers.items() if name in parser.flags]
    if owners:
        listed = " and ".join(f"`gossamer {owner}`" for owner in owners)
        return f"{name} is a flag of {listed}, not of `gossamer {command}`."
    if FOREIGN_FLAGS.get(name) in parsers[command].flags:
        return f"Unknown flag {name}. Here it is called {FOREIGN_FLAGS[name]}."
    near = difflib.get_close_matches(name.lstrip("-"), [own[2:] for own in parsers[command].flags], n=1, cutoff=0.65)
    hint = f"Did you mean --{near[0]}?" if near else f"`gossamer {command} --help` lists the flags."
    return f"Unknown flag {name}. {hint}"


def closest(word: str, known: Iterable[str]) -> str | None:
    near = difflib.get_close_matches(word, list(known), n=1)
    return near[0] if near else None
