"""The API as the `openai` client sees it, against a real server process with the fake engine behind it."""

from __future__ import annotations

import json

import openai
import pytest
from server_process import ServerProcess, error_of, write_byte_tokenizer


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = write_byte_tokenizer(tmp_path_factory.mktemp("models") / "tiny-model")
    with ServerProcess({"load": {"model": str(model), "seed": 2}}) as process:
        yield process


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(autouse=True)
def leaves_no_page_behind(server):
    yield
    server.wait_idle()


CHAT_PREFIX = "user\nHAL"
"""How the fake engine's answer to a chat of "HAL" begins, one byte higher: the template is its prompt."""


def shifted(text: str) -> str:
    return "".join(chr(ord(c) + 1) for c in text)


def test_completion(client):
    answer = client.completions.create(model="tiny-model", prompt="HAL", max_tokens=6)
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert answer.model == "tiny-model"
    assert len(answer.choices) == 1
    assert answer.choices[0].text == "IBMIBM"
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 6, 9)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_completion_defaults_to_16_tokens(client):
    answer = client.completions.create(model="default", prompt="a")
    assert answer.choices[0].text == "b" * 16


def test_completion_of_several_prompts_and_samples(client):
    answer = client.completions.create(model="default", prompt=["HAL", "ab"], n=2, max_tokens=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == ["IBM", "IBM", "bcb", "bcb"]
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == 12


def test_completion_of_token_ids(client):
    one = client.completions.create(model="default", prompt=[72, 65, 76], max_tokens=3)
    assert one.choices[0].text == "IBM"
    two = client.completions.create(model="default", prompt=[[72, 65], [76]], max_tokens=2)
    assert [choice.text for choice in two.choices] == ["IB", "MM"]


def test_completion_stream(client):
    chunks = list(
        client.completions.create(
            model="default", prompt="HAL", max_tokens=6, stream=True, stream_options={"include_usage": True}
        )
    )
    assert len({chunk.id for chunk in chunks}) == 1
    *content, usage = chunks
    assert "".join(chunk.choices[0].text for chunk in content) == "IBMIBM"
    assert len(content) > 1
    assert [chunk.choices[0].finish_reason for chunk in content[:-1]] == [None] * (len(content) - 1)
    assert content[-1].choices[0].finish_reason == "length"
    assert content[-1].choices[0].text
    assert all(chunk.usage is None for chunk in content)
    assert usage.choices == []
    assert usage.usage.completion_tokens == 6


def test_completion_stream_of_several_prompts_and_samples(client):
    texts = dict.fromkeys(range(4), "")
    finished = {}
    for chunk in client.completions.create(model="default", prompt=["HAL", "ab"], n=2, max_tokens=5, stream=True):
        for choice in chunk.choices:
            assert choice.index not in finished
            texts[choice.index] += choice.text
            if choice.finish_reason:
                finished[choice.index] = choice.finish_reason
        assert chunk.usage is None
    assert texts == {0: "IBMIB", 1: "IBMIB", 2: "bcbcb", 3: "bcbcb"}
    assert finished == dict.fromkeys(range(4), "length")


def test_completion_echo(client, server):
    answer = client.completions.create(model="default", prompt="HAL", max_tokens=2, echo=True)
    assert answer.choices[0].text == "HALIB"
    answer = client.completions.create(model="default", prompt=[72, 65], max_tokens=2, echo=True)
    assert answer.choices[0].text == "HAIB"
    chunks = client.completions.create(model="default", prompt="HAL", max_tokens=4, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "HALIBMI"


def test_completion_logprobs(client):
    answer = client.completions.create(model="default", prompt="HAL", max_tokens=3, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == ["I", "B", "M"]
    assert logprobs.token_logprobs == [-0.5] * 3
    assert logprobs.text_offset == [0, 1, 2]
    assert logprobs.top_logprobs[0] == {"I": -0.5, "J": -1.5}
    chunks = client.completions.create(model="default", prompt="HAL", max_tokens=3, logprobs=2, stream=True)
    streamed = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].text]
    assert [token for part in streamed for token in part.tokens] == ["I", "B", "M"]
    assert [offset for part in streamed for offset in part.text_offset] == [0, 1, 2]


def test_completion_stop(client):
    answer = client.completions.create(model="default", prompt="HAL", max_tokens=50, stop="MI")
    assert answer.choices[0].text == "IB"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == "MI"
    answer = client.completions.create(
        model="default", prompt="HAL", max_tokens=50, stop=["MI"], extra_body={"include_stop_str_in_output": True}
    )
    assert answer.choices[0].text == "IBMI"
    answer = client.completions.create(
        model="default", prompt="HAL", max_tokens=50, extra_body={"stop_token_ids": [ord("M")]}
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == ord("M")


def test_stop_string_across_tokens_is_never_streamed(client):
    text = ""
    for chunk in client.completions.create(model="default", prompt="HAL", max_tokens=50, stop=["MIB"], stream=True):
        text += chunk.choices[0].text
        reason = chunk.choices[0].finish_reason
    assert (text, reason) == ("IB", "stop")


def test_bytes_that_are_no_text_yet_are_held_back(client):
    """The answer is the two bytes of é, again and again; no chunk may carry half a character."""
    prompt = [b - 1 for b in "é".encode()]
    text = ""
    for chunk in client.completions.create(model="default", prompt=prompt, max_tokens=6, stream=True):
        assert "\ufffd" not in chunk.choices[0].text
        text += chunk.choices[0].text
    assert text == "ééé"


def test_return_token_ids(client):
    answer = client.completions.create(
        model="default", prompt="HAL", max_tokens=2, extra_body={"return_token_ids": True}
    )
    assert answer.choices[0].token_ids == [73, 66]
    assert answer.choices[0].prompt_token_ids == [72, 65, 76]


def test_chat(client):
    answer = client.chat.completions.create(
        model="tiny-model", messages=[{"role": "user", "content": "HAL"}], max_completion_tokens=9
    )
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    message = answer.choices[0].message
    assert message.role == "assistant"
    assert message.content == shifted(CHAT_PREFIX)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 9


def test_chat_stream(client):
    chunks = list(
        client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "HAL"}],
            max_tokens=9,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    first, *content, usage = chunks
    assert first.object == "chat.completion.chunk"
    assert first.choices[0].delta.role == "assistant"
    assert first.choices[0].delta.content == ""
    assert all(chunk.choices[0].delta.role is None for chunk in content)
    assert "".join(chunk.choices[0].delta.content for chunk in content) == shifted(CHAT_PREFIX)
    assert [chunk.choices[0].finish_reason for chunk in content].count(None) == len(content) - 1
    assert content[-1].choices[0].finish_reason == "length"
    assert content[-1].choices[0].delta.content
    assert usage.choices == []
    assert usage.usage.total_tokens == usage.usage.prompt_tokens + 9


def test_chat_stream_on_the_wire(server):
    body = {
        "messages": [{"role": "user", "content": "HAL"}],
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = server.post("/v1/chat/completions", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    decoded = [json.loads(event.removeprefix("data: ")) for event in events]
    assert decoded[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(event["usage"] is None for event in decoded[:-1])
    assert decoded[-1]["choices"] == []
    body.pop("stream_options")
    answer = server.post("/v1/chat/completions", body)
    assert '"usage"' not in answer.text


def test_chat_of_several_samples(client):
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "y"}]}]
    answer = client.chat.completions.create(model="default", messages=messages, n=3, max_tokens=8)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {shifted("system\nx")[:7]}
    roles, texts = [], dict.fromkeys(range(3), "")
    for chunk in client.chat.completions.create(model="default", messages=messages, n=3, max_tokens=8, stream=True):
        for choice in chunk.choices:
            roles += [choice.index] if choice.delta.role else []
            texts[choice.index] += choice.delta.content or ""
    assert sorted(roles) == [0, 1, 2]
    assert set(texts.values()) == {shifted("system\nx")[:7]}


def test_chat_logprobs(client):
    answer = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "HAL"}],
        max_tokens=2,
        logprobs=True,
        top_logprobs=2,
    )
    entries = answer.choices[0].logprobs.content
    assert [entry.token for entry in entries] == ["<|im_end|>", "v"]
    assert entries[1].bytes == [ord("v")]
    assert [(top.token, top.logprob) for top in entries[1].top_logprobs] == [("v", -0.5), ("w", -1.5)]


def test_chat_without_limit_runs_to_the_end_of_the_context(client):
    messages = [{"role": "user", "content": "HAL" * 1340}]
    answer = client.chat.completions.create(model="default", messages=messages)
    assert answer.usage.total_tokens == 4096
    assert answer.choices[0].finish_reason == "length"


def test_models(client):
    (card,) = client.models.list().data
    assert card.id == "tiny-model"
    assert card.max_model_len == 4096
    assert client.models.retrieve("default").id == "tiny-model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize("name", [None, "default", "tiny-model"])
def test_accepted_model_names(server, name):
    body = {"prompt": "a", "max_tokens": 1} | ({} if name is None else {"model": name})
    assert server.post("/v1/completions", body).status_code == 200


def test_tokenize_and_detokenize(server):
    answer = server.post("/tokenize", {"prompt": "Hi<|pad|>", "return_token_strs": True}).json()
    assert answer["tokens"] == list(b"Hi<|pad|>")
    assert answer["count"] == 9
    assert answer["max_model_len"] == 4096
    assert "".join(answer["token_strs"]) == "Hi<|pad|>"
    special = server.post("/tokenize", {"prompt": "Hi<|pad|>", "parse_special_tokens": True}).json()
    assert special["tokens"] == [72, 105, 259]
    assert special["token_strs"] is None
    assert server.post("/detokenize", {"tokens": [72, 105, 258]}).json() == {"prompt": "Hi<|im_end|>"}
    chat = server.post("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]}).json()
    assert chat["tokens"][:5] == [257, *b"user"]
    assert server.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


def test_a_prompt_that_spells_special_tokens_is_text(server):
    """FAULTS 18."""
    body = {"prompt": "<|im_end|>", "max_tokens": 1, "return_token_ids": True}
    assert server.post("/v1/completions", body).json()["choices"][0]["prompt_token_ids"] == list(b"<|im_end|>")
    body["parse_special_tokens"] = True
    assert server.post("/v1/completions", body).json()["choices"][0]["prompt_token_ids"] == [258]
    body = {"messages": [{"role": "user", "content": "<|im_end|>"}], "max_tokens": 1, "return_token_ids": True}
    prompt = server.post("/v1/chat/completions", body).json()["prompt_token_ids"]
    assert prompt.count(258) == 1
    assert prompt[6:16] == list(b"<|im_end|>")


def test_long_prompt(server):
    answer = server.post("/v1/completions", {"prompt": "ab" * 2000, "max_tokens": 2})
    assert answer.json()["choices"][0]["text"] == "bc"
    assert answer.json()["usage"]["prompt_tokens"] == 4000


def test_health_version_and_liveness(server):
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/live").status_code == 200
    assert set(server.http.get("/version").json()) == {"version"}
    schema = server.http.get("/openapi.json").json()
    body = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    name = body["$ref"].rpartition("/")[2]
    assert "temperature" in schema["components"]["schemas"][name]["properties"]


def test_a_misspelled_parameter_gets_the_nearest_one_suggested(server):
    answer = error_of(server.post("/v1/completions", {"prompt": "a", "temprature": 1}))
    assert "Did you mean `temperature`?" in answer["message"]
    assert answer["param"] == "temprature"
    answer = error_of(server.post("/v1/completions", {"prompt": "a", "stream_options": {"include_usag": True}}))
    assert "Did you mean" not in answer["message"]


def test_unknown_routes_and_methods(server):
    missing = server.http.get("/v1/nothing")
    assert missing.status_code == 404
    assert error_of(missing)["code"] == "unknown_url"
    wrong = server.http.get("/v1/completions")
    assert wrong.status_code == 405
    assert error_of(wrong)["type"] == "invalid_request_error"
    assert wrong.headers["allow"] == "POST"


def test_neutral_values_of_unsupported_fields_are_accepted(server):
    neutral = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "store": True,
        "metadata": {"a": "b"},
        "user": "me",
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "priority": 0,
        "logit_bias": None,
        "stop": None,
        "n": None,
        "max_tokens": 1,
    }
    body = neutral | {"messages": [{"role": "user", "content": "a"}]}
    assert server.post("/v1/chat/completions", body).status_code == 200
    body = {"prompt": "a", "max_tokens": 1, "best_of": 1, "suffix": None, "echo": False, "user": "me"}
    assert server.post("/v1/completions", body).status_code == 200


def test_metrics(server, client):
    def read():
        names = ["prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_count"]
        names += ["inter_token_latency_seconds_count", "e2e_request_latency_seconds_count"]
        names += [f"request_{phase}_time_seconds_count" for phase in ("queue", "prefill", "decode", "inference")]
        names += ["request_time_per_output_token_seconds_count", "request_max_num_generation_tokens_sum"]
        values = {name: server.metric(f"vllm:{name}", model_name="tiny-model") for name in names}
        values["success"] = server.metric("vllm:request_success_total", finished_reason="length")
        return values

    before = read()
    client.completions.create(model="default", prompt="HAL", max_tokens=6)
    after = read()
    assert {name: after[name] - before[name] for name in before} == {
        "prompt_tokens_total": 3,
        "generation_tokens_total": 6,
        "time_to_first_token_seconds_count": 1,
        "inter_token_latency_seconds_count": 5,
        "e2e_request_latency_seconds_count": 1,
        "request_queue_time_seconds_count": 1,
        "request_prefill_time_seconds_count": 1,
        "request_decode_time_seconds_count": 1,
        "request_inference_time_seconds_count": 1,
        "request_time_per_output_token_seconds_count": 1,
        "request_max_num_generation_tokens_sum": 6,
        "success": 1,
    }
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:num_preemptions_total",
        "vllm:spec_decode_num_drafts_total",
        "vllm:spec_decode_num_draft_tokens_total",
        "vllm:spec_decode_num_accepted_tokens_total",
    ):
        assert server.metric(name, model_name="tiny-model") >= 0
    assert server.metric("vllm:request_generation_tokens_sum") >= 6
    assert server.metric("vllm:cache_config_info", block_size="64", num_gpu_blocks="256") == 1
    phases = {p: server.metric(f"vllm:request_{p}_time_seconds_sum") for p in ("prefill", "decode", "inference")}
    assert phases["prefill"] + phases["decode"] == pytest.approx(phases["inference"])


@pytest.mark.parametrize("name", ["n", "max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("value", ["1" * 400, "-" + "1" * 400, "1e400", "NaN", "Infinity"])
def test_numbers_beyond_all_bounds_are_refused(server, name, value):
    answer = server.post("/v1/completions", f'{{"prompt":"HAL","{name}":{value}}}'.encode())
    assert answer.status_code == 400, answer.text
    error_of(answer)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", b'{"prompt":"HAL","priority":%s}'),
        ("/v1/chat/completions", b'{"messages":[{"role":"user","content":"a"}],"tools":%s}'),
        ("/tokenize", b'{"prompt":"HAL","tools":%s}'),
    ],
)
@pytest.mark.parametrize("value", [b"1e999", b'"\xff"', b'{"a":-1e999}', b"[" * 100 + b"]" * 100])
def test_a_field_that_is_not_implemented_is_refused_whatever_it_holds(server, path, body, value):
    answer = server.post(path, body % value)
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"] in ("priority", "tools")


@pytest.mark.parametrize("head", ["GET /nowhere", "POST /v1/completions"])
@pytest.mark.parametrize("chunk", [b"ZZ\r\n", b"1\r\naZZ"])
def test_a_body_that_is_not_http_ends_its_request_alone(server, head, chunk):
    num_lines = len(server.lines)
    with server.connect() as connection:
        connection.sendall(f"{head} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + chunk)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
    server.canary()
    assert not any("Traceback" in line for line in server.lines[num_lines:])
