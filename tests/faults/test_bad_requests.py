"""Requests that can never be served: each gets its 4xx, names its field, disturbs nobody (FAULTS 1, 2, 4-13, 17-20).

The fake engine stands behind a real server process; every test ends with the canary.
"""

from __future__ import annotations

import json
import time

import pytest
from server_process import ServerProcess, error_of, write_byte_tokenizer

from gossamer.core import InvalidRequest, RequestLimits, SamplingParams

MAX_BODY = 200_000
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = write_byte_tokenizer(tmp_path_factory.mktemp("models") / "tiny-model")
    options = {"max_body_bytes": MAX_BODY, "log_level": "error"}
    with ServerProcess({"load": {"model": str(model)}}, options) as process:
        yield process
        assert len(process.lines) == 4, process.stderr


@pytest.fixture(autouse=True)
def unharmed(server):
    yield
    server.canary()


def refused(server, path, body, status=400):
    answer = server.post(path, body)
    assert answer.status_code == status, answer.text
    return error_of(answer)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"prompt": "a"} trailing',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "user": "\xff"}',
        b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}",
        b"\x80\x04\x95pickle",
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_malformed_body(server, path, body):
    """FAULTS 1."""
    refused(server, path, body)


@pytest.mark.parametrize("field", ["prompt", "tools", "metadata", "logit_bias", "unknown", "stop", "response_format"])
def test_deeply_nested_body(server, field):
    """FAULTS 2."""
    deep = b"[" * 90_000 + b"]" * 90_000
    refused(server, COMPLETIONS, b'{"prompt": "a", "' + field.encode() + b'": ' + deep + b"}")
    refused(server, COMPLETIONS, deep)


def test_body_over_the_cap(server):
    """FAULTS 2: refused whether or not the length is declared, and never held in memory."""
    before = server.rss()
    body = json.dumps({"prompt": "a" * (50 << 20)}).encode()
    assert refused(server, COMPLETIONS, body, 413)["code"] == "request_too_large"
    chunks = (bytes(1 << 16) for _ in range(1000))
    answer = server.http.post(COMPLETIONS, content=chunks)
    assert answer.status_code == 413
    assert server.rss() - before < 16 << 20
    at_the_cap = json.dumps({"prompt": "a", "user": "x" * (MAX_BODY - 27)}).encode()
    assert len(at_the_cap) == MAX_BODY
    assert server.post(COMPLETIONS, at_the_cap).status_code == 200
    refused(server, COMPLETIONS, at_the_cap + b" ", 413)


def test_unknown_model(server):
    """FAULTS 4."""
    for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": [{"role": "user", "content": "a"}]})):
        error = refused(server, path, body | {"model": "gpt-4"}, 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert refused(server, "/tokenize", {"prompt": "a", "model": "x"}, 404)["code"] == "model_not_found"


@pytest.mark.parametrize("prompt", ["", [], [[]], ["a", ""], [[1], []], ["a", 1], [1, [2]], [None], {}, 3, None])
def test_empty_or_mixed_prompt(server, prompt):
    """FAULTS 5."""
    assert refused(server, COMPLETIONS, {"prompt": prompt})["param"].startswith("prompt")


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (None, "messages"),
        ("hello", "messages"),
        ([{}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "robot", "content": "a"}], "messages[0].role"),
        ([{"role": "tool", "content": "a", "tool_call_id": "1"}], "messages[0]"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": "a", "extra": 1}], "messages[0].extra"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls"),
    ],
)
def test_bad_messages(server, messages, param):
    """FAULTS 5."""
    assert refused(server, CHAT, {"messages": messages})["param"].startswith(param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "a", "n": 10**9}, "n"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "n": 1.5}, "n"),
        ({"prompt": ["a"] * 20_000, "n": 1}, "prompt"),
        ({"prompt": ["a"] * 20, "n": 20}, "prompt"),
        ({"prompt": "a", "best_of": 10**9}, "best_of"),
    ],
)
def test_too_many_sequences(server, body, param):
    """FAULTS 6: before anything is expanded."""
    before = server.rss()
    started = time.monotonic()
    assert refused(server, COMPLETIONS, body)["param"] == param
    assert time.monotonic() - started < 0.2
    assert server.rss() - before < 8 << 20


CONTEXT = 4096

# Field, value, the field that is named.
BAD_PARAMETERS = [
    # FAULTS 7
    ("max_tokens", 0, "max_tokens"),
    ("max_tokens", -1, "max_tokens"),
    ("max_tokens", 2**63, "max_tokens"),
    ("max_tokens", CONTEXT, "max_tokens"),
    ("max_tokens", "5", "max_tokens"),
    # FAULTS 8
    ("min_tokens", 17, "min_tokens"),
    ("min_tokens", -1, "min_tokens"),
    ("min_tokens", 2**40, "min_tokens"),
    # FAULTS 9
    ("temperature", -1, "temperature"),
    ("temperature", 1e308, "temperature"),
    ("temperature", "hot", "temperature"),
    ("temperature", True, "temperature"),
    ("top_p", 0, "top_p"),
    ("top_p", 2, "top_p"),
    ("top_k", -5, "top_k"),
    ("top_k", 2**63, "top_k"),
    ("min_p", 1.1, "min_p"),
    ("presence_penalty", 3, "presence_penalty"),
    ("frequency_penalty", -3, "frequency_penalty"),
    ("repetition_penalty", 0, "repetition_penalty"),
    ("seed", 2**64, "seed"),
    # FAULTS 10
    ("logprobs", 10_000, "logprobs"),
    ("logprobs", -2, "logprobs"),
    ("prompt_logprobs", 10_000, "prompt_logprobs"),
    # FAULTS 11
    ("prompt", [-1], "prompt"),
    ("prompt", [260], "prompt"),
    ("prompt", [1, 2**40], "prompt"),
    ("prompt", [1.5], "prompt"),
    # FAULTS 12
    ("logit_bias", {"260": 1}, "logit_bias"),
    ("logit_bias", {"-1": 1}, "logit_bias"),
    ("logit_bias", {"a": 1}, "logit_bias"),
    ("logit_bias", {"1": 1000}, "logit_bias"),
    ("allowed_token_ids", [260], "allowed_token_ids"),
    ("allowed_token_ids", [], "allowed_token_ids"),
    ("stop_token_ids", [2**40], "stop_token_ids"),
    ("bad_words", ["x"], "bad_words"),
    # FAULTS 13
    ("stop", ["x"] * 10_000, "stop"),
    ("stop", [""], "stop"),
    ("stop", "", "stop"),
    ("stop", "x" * 100_000, "stop"),
    ("stop", ["x", 1], "stop"),
    # FAULTS 19, 20 and what is not implemented
    ("cache_salt", "", "cache_salt"),
    ("cache_salt", "x" * 129, "cache_salt"),
    ("cache_salt", "a\nb", "cache_salt"),
    ("request_id", "mine", "request_id"),
    ("kv_transfer_params", {"remote_host": "evil"}, "kv_transfer_params"),
    ("response_format", {"type": "json_object"}, "response_format"),
    ("structured_outputs", {"regex": "(a+)+b"}, "structured_outputs"),
    ("guided_regex", "(a+)+b", "guided_regex"),
    ("suffix", "x", "suffix"),
    ("priority", 5, "priority"),
    ("use_beam_search", True, "use_beam_search"),
    ("truncate_prompt_tokens", 5, "truncate_prompt_tokens"),
    ("stream_options", {"include_usage": True}, "stream_options"),
    ("stream", "yes", "stream"),
    ("no_such_field", 1, "no_such_field"),
]


@pytest.mark.parametrize(("field", "value", "param"), BAD_PARAMETERS)
def test_bad_parameter(server, field, value, param):
    error = refused(server, COMPLETIONS, {"prompt": "a"} | {field: value})
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(param)


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"max_tokens": None, "min_tokens": CONTEXT}, "min_tokens"),
        ({"max_completion_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 10_000}, "logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"service_tier": "priority"}, "service_tier"),
        # FAULTS 17
        ({"chat_template": "{% for i in range(10**9) %}{% endfor %}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": [1]}}, "chat_template_kwargs"),
        ({"continue_final_message": True}, "continue_final_message"),
    ],
)
def test_bad_chat_parameter(server, extra, param):
    error = refused(server, CHAT, {"messages": [{"role": "user", "content": "a"}]} | extra)
    assert error["param"].startswith(param)


def test_prompt_longer_than_the_context(server):
    """FAULTS 7: the two messages differ, for a text is refused by its length before it is tokenised."""
    error = refused(server, COMPLETIONS, {"prompt": [1] * CONTEXT})
    assert error["code"] == "context_length_exceeded"
    assert str(CONTEXT) in error["message"]
    error = refused(server, COMPLETIONS, {"prompt": "a" * 150_000})
    assert error["code"] == "context_length_exceeded"
    error = refused(server, CHAT, {"messages": [{"role": "user", "content": "a" * 150_000}]})
    assert error["code"] == "context_length_exceeded"


def test_long_prompt_with_log_probabilities():
    """FAULTS 10: bounded by the validator that all entry points share."""
    limits = RequestLimits(vocab_size=10, max_model_len=1 << 20)
    limits.check([1] * 1000, SamplingParams(prompt_logprobs=20))
    with pytest.raises(InvalidRequest) as refusal:
        limits.check([1] * 100_000, SamplingParams(prompt_logprobs=5))
    assert refusal.value.param == "prompt_logprobs"


def test_bad_tokens_to_detokenize(server):
    for tokens in ([-1], [260], [2**40], "a", None):
        assert refused(server, "/detokenize", {"tokens": tokens})["param"].startswith("tokens")
    refused(server, "/tokenize", {})
    refused(server, "/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]})


def test_bad_http(server):
    for request in (b"\x16\x03\x01\x02\x00 TLS hello", b"GET\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\n\r\n"):
        with server.connect() as sock:
            sock.sendall(request)
            assert b" 400 " in sock.recv(4096).split(b"\r\n")[0]
