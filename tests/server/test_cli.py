import os
import subprocess
import sys
import types

import pytest

from gossamer.config import EngineConfig, ServerConfig, make_engine_config
from gossamer.core import EngineDead, StartupError
from gossamer.server import cli
from gossamer.server.app import _flags as app_flags
from gossamer.server.cli_options import FOREIGN_FLAGS, parse, parse_size


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("GOSSAMER_", "HF_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GOMP_SPINCOUNT", "1")  # so that what a command line sets does not outlive its test


@pytest.fixture
def served(monkeypatch):
    """Catches what `serve` would run."""
    calls = []
    fake = types.ModuleType("gossamer.server.app")
    fake.run_server = lambda server, engine: calls.append((server, engine))
    monkeypatch.setitem(sys.modules, "gossamer.server.app", fake)
    return calls


def failure(capsys, *argv: str) -> str:
    """Runs a command line that must fail as the user's mistake; returns its message."""
    assert cli.main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) <= 5
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    "command", [[], ["serve"], ["generate"], ["chat"], ["bench"], ["eval"], ["selftest"], ["info"]]
)
def test_help_is_light(command):
    heavy = "{'torch', 'numpy', 'rich', 'tokenizers', 'jinja2', 'fastapi', 'uvicorn', 'zmq', 'msgspec', 'asyncio'}"
    code = (
        "import contextlib, sys; from gossamer.server.cli import main\n"
        f"with contextlib.suppress(SystemExit): main({[*command, '--help']!r})\n"
        f"print({heavy} & {{*sys.modules}})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("usage: gossamer")
    assert run.stdout.strip().splitlines()[-1] == "set()"


def test_module_and_version():
    run = subprocess.run([sys.executable, "-m", "gossamer", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("gossamer 0.")


def test_help_lists_every_option_of_the_config():
    text = cli.parsers()["serve"].format_help()
    for flag in (
        "--max-model-len",
        "--max-num-seqs",
        "--max-num-batched-tokens",
        "--gpu-memory-utilization",
        "--served-model-name",
        "--api-key",
        "--kv-cache-dtype",
        "--enable-prefix-caching",
        "--no-enable-prefix-caching",
        "--seed",
        "--dtype",
        "--load-format",
        "--upcycle-experts",
    ):
        assert flag in text, flag


def test_serve_passes_the_flags_on(served):
    argv = [
        "serve",
        "some/model",
        "--max-model-len",
        "32K",
        "--no-enable-prefix-caching",
        "--dtype=float32",
        "--kv-cache-memory-bytes",
        "1.5G",
        "--port",
        "8001",
        "--api-key",
        "secret",
        "--no-overlap",
        "--gpu_memory_utilization",
        "0.5",
        "--disable-progress",
    ]
    assert cli.main(argv) == 0
    server, engine = served[0]
    assert engine.load.model == "some/model"
    assert engine.load.max_model_len == 32 * 1024
    assert engine.load.dtype == "float32"
    assert engine.cache.enable_prefix_caching is False
    assert engine.cache.kv_cache_memory_bytes == 3 << 29
    assert engine.cache.gpu_memory_utilization == 0.5
    assert engine.scheduler.overlap is False
    assert engine.disable_progress is True
    assert (server.port, server.api_key) == (8001, "secret")


def test_flags_left_out_keep_the_configs_defaults(served):
    assert cli.main(["serve", "m"]) == 0
    server, engine = served[0]
    assert server == ServerConfig()
    assert engine == EngineConfig(load=type(engine.load)(model="m"))


def test_the_printed_config_can_be_given_again(served):
    config = make_engine_config(model="m", max_model_len=64, enable_prefix_caching=False, gpu_memory_utilization=0.25)
    assert cli.main(["serve", "m", *app_flags(config).split()]) == 0
    assert served[0][1] == config


def test_model_as_a_flag(served):
    assert cli.main(["serve", "--model", "m"]) == 0
    assert served[0][1].load.model == "m"


def test_two_models_are_refused(served, capsys):
    assert "'a'" in failure(capsys, "serve", "a", "--model", "b")
    assert served == []


def test_default_model(served, monkeypatch, tmp_path):
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: spec)
    (tmp_path / cli.DEFAULT_MODEL_FILE).touch()
    assert cli.main(["serve"]) == 0
    assert served[0][1].load.model == str(tmp_path / cli.DEFAULT_MODEL_FILE)


def test_no_model_says_how_to_get_one(served, monkeypatch, capsys):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    message = failure(capsys, "serve")
    assert "gossamer serve MODEL" in message
    assert cli.DEFAULT_MODEL_INSTALL in message


def test_api_key_from_the_environment(served, monkeypatch):
    monkeypatch.setenv("GOSSAMER_API_KEY", "from-env")
    assert cli.main(["serve", "m"]) == 0
    assert cli.main(["serve", "m", "--api-key", "from-flag"]) == 0
    assert [server.api_key for server, _ in served] == ["from-env", "from-flag"]


@pytest.mark.parametrize(
    ("given", "after"),
    [({}, cli.SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_spin_briefly_unless_the_environment_says_otherwise(served, monkeypatch, given, after):
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["serve", "m"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == after


def test_hub_cache_from_the_environment(served, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/home")
    assert cli.main(["serve", "m"]) == 0
    monkeypatch.setenv("HF_HUB_CACHE", "/cache")
    assert cli.main(["serve", "m"]) == 0
    assert cli.main(["serve", "m", "--download-dir", "/flag"]) == 0
    assert [engine.load.download_dir for _, engine in served] == ["/home/hub", "/cache", "/flag"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["sevre"], "`gossamer serve`"),
        (["frobnicate"], "serve, generate, chat, bench, eval, selftest, info"),
        (["serve", "--max-model-length", "5"], "--max-model-len?"),
        (["serve", "m", "--no-enable-prefix-cachin"], "--no-enable-prefix-caching?"),
        (["serve", "--enable-prefix-cache=1"], "--enable-prefix-caching?"),
        (["serve", "--tensor-parallel-size", "2"], "`gossamer serve --help`"),
        (["serve", "--block-size", "16"], "it is called --page-size."),  # vLLM's name
        (["serve", "--mem-fraction-static=0.8"], "it is called --gpu-memory-utilization."),  # SGLang's
        (["serve", "--prompt", "x"], "a flag of `gossamer generate`, not of `gossamer serve`"),
        (["chat", "--port", "1"], "a flag of `gossamer serve`, not of `gossamer chat`"),
        (["serve", "--max-model", "5"], "--max-model-len?"),  # no guessing at abbreviations
        (["serve", "--port"], "--port needs a value"),
        (["serve", "--port", "x"], "--port wants a whole number; got 'x'"),
        (["serve", "m", "--port", "70000"], "--port must be between"),
        (["serve", "--gpu-memory-utilization", "lots"], "--gpu-memory-utilization wants a number"),
        (["serve", "m", "--gpu-memory-utilization", "1.2"], "--gpu-memory-utilization must be in (0, 1]"),
        (["serve", "--dtype", "flaot32"], "Did you mean 'float32'?"),
        (["serve", "--kv-cache-memory-bytes", "3Q"], "512M"),
        (["serve", "m", "--page-size", "0"], "--page-size must be at least 1"),
        (["serve", "m", "extra"], "'extra'"),
        (["serve", "m", "--chat-template", "/no/such/file"], "/no/such/file"),
        (["serve", "m", "--max-body-bytes", "0"], "--max-body-bytes"),
    ],
)  # fmt: skip
def test_mistakes_are_explained(argv, says, served, capsys):
    assert says in failure(capsys, *argv)
    assert served == []


def test_flags_of_other_engines_have_names_here():
    flags = cli.parsers()["serve"].flags
    assert [name for name in FOREIGN_FLAGS if name in flags] == []
    assert [name for name in FOREIGN_FLAGS.values() if name not in flags] == []


def raising(error: BaseException):
    def run(*_args: object) -> None:
        raise error

    return run


def fake_app(monkeypatch, run) -> None:
    fake = types.ModuleType("gossamer.server.app")
    fake.run_server = run
    monkeypatch.setitem(sys.modules, "gossamer.server.app", fake)


def test_start_up_error_is_shown_whole_without_traceback(monkeypatch, capsys):
    fake_app(monkeypatch, raising(StartupError("Port 8000 is in use.\nSet --port 8001.")))
    assert failure(capsys, "serve", "m") == "gossamer: Port 8000 is in use.\nSet --port 8001.\n"


def test_a_long_start_up_error_is_cut(monkeypatch, capsys):
    fake_app(monkeypatch, raising(StartupError("\n".join(f"line {i}" for i in range(40)))))
    message = failure(capsys, "serve", "m")
    assert message.startswith("gossamer: line 0\nline 1\n")
    assert "--log-level debug" in message


def test_debug_shows_the_traceback(monkeypatch, capsys):
    fake_app(monkeypatch, raising(StartupError("no")))
    assert cli.main(["serve", "m", "--log-level", "debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_is_called_one(monkeypatch, capsys):
    fake_app(monkeypatch, raising(ZeroDivisionError("oops")))
    assert cli.main(["serve", "m"]) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError: oops" in err
    assert "Traceback" not in err


def test_a_dead_engine_is_our_fault(monkeypatch, capsys):
    fake_app(monkeypatch, raising(EngineDead("The engine process has died (killed by SIGKILL).")))
    assert cli.main(["serve", "m"]) == 1
    assert capsys.readouterr().err == "gossamer: The engine process has died (killed by SIGKILL).\n"


def test_ctrl_c_is_silent(monkeypatch, capsys):
    fake_app(monkeypatch, raising(KeyboardInterrupt()))
    assert cli.main(["serve", "m"]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "value"), [("7", 7), ("4K", 4096), ("4k", 4096), ("512M", 512 << 20), ("1.5G", 3 << 29), ("2GiB", 2 << 30)]
)
def test_sizes(text, value):
    assert parse_size(text) == value


def test_sampling_flags():
    args = parse(
        "generate",
        cli.parsers(),
        [
            "m",
            "--prompt",
            "a",
            "--prompt",
            "b",
            "--stop",
            "x",
            "--stop",
            "y",
            "--temperature",
            "0.5",
            "--presence-penalty",
            "-1",
            "--seed",
            "3",
        ],
    )
    params = cli.sampling_params(args)
    assert args.prompt == ["a", "b"]
    assert params.stop == ["x", "y"]
    assert (params.temperature, params.presence_penalty, params.max_tokens) == (0.5, -1.0, 256)
    assert params.seed is None  # the engine's --seed serves
    assert cli.engine_config(args).load.seed == 3
