"""The server with its real engine on a tiny random MoE checkpoint: its tokens equal those of transformers."""

from __future__ import annotations

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch
from oracle import greedy
from server_process import ServerProcess, error_of, write_byte_tokenizer

CONTEXT = 1024
PAGE = 16
NUM_PAGES = 66
NUM_LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 16
PAGE_BYTES = PAGE * NUM_LAYERS * 2 * KV_HEADS * HEAD_DIM * 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    import transformers

    folder = write_byte_tokenizer(tmp_path_factory.mktemp("models") / "tiny-mixtral")
    config = transformers.MixtralConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=CONTEXT,
        sliding_window=None,
        bos_token_id=None,
        eos_token_id=258,
        pad_token_id=259,
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def server(checkpoint):
    folder: Path = checkpoint[0]
    engine = {
        "load": {"model": str(folder), "dtype": "float32", "max_model_len": CONTEXT},
        "cache": {"kv_cache_memory_bytes": NUM_PAGES * PAGE_BYTES, "page_size": PAGE},
        "scheduler": {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_num_queued": 64},
        "num_threads": 1,
    }
    with ServerProcess(engine, {"log_level": "error"}, factory="gossamer.engine.build:build_engine") as process:
        yield process
        assert process.stderr.count("Traceback") == 0


@pytest.fixture(scope="module")
def golden(checkpoint):
    """Greedy continuations by transformers."""
    known: dict[tuple[int, ...], list[int]] = {}

    def continuation(prompt: list[int], num_tokens: int) -> list[int]:
        key = (*prompt, num_tokens)
        if key not in known:
            known[key] = greedy(checkpoint[1], prompt, num_tokens)[1]
        return known[key]

    return continuation


@pytest.fixture(autouse=True)
def canary(server, golden):
    yield
    server.wait_idle()
    assert ask(server, [1, 2, 3], 8) == golden([1, 2, 3], 8)
    server.wait_idle()


def body_of(prompt, num_tokens, **extra):
    greedy = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {"prompt": prompt, "max_tokens": num_tokens} | greedy | extra


def ask(server, prompt, num_tokens, **extra):
    answer = server.post("/v1/completions", body_of(prompt, num_tokens, **extra))
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


def prompts(count, seed, shortest=1, longest=200):
    draw = random.Random(seed)
    return [[draw.randrange(256) for _ in range(draw.randint(shortest, longest))] for _ in range(count)]


def test_greedy_tokens_equal_transformers_under_load(server, golden):
    """10 requests over 8 slots and a cache that holds 6 of them to the end: queueing, chunks and preemption."""
    cases = prompts(10, seed=1, shortest=110, longest=130)
    before = server.metric("vllm:num_preemptions_total")
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda prompt: ask(server, prompt, 40), cases))
    for prompt, answer in zip(cases, answers, strict=True):
        assert answer == golden(prompt, 40)
    assert server.metric("vllm:num_preemptions_total") > before
    # Two requests waited for a slot, for longer than a step takes; their times add up to those of all.
    queued = server.metric("vllm:request_queue_time_seconds_sum")
    assert queued > 0.01
    total = server.metric("vllm:request_inference_time_seconds_sum") + queued
    assert total == pytest.approx(server.metric("vllm:e2e_request_latency_seconds_sum"))


def test_streamed_tokens_equal_whole(server, golden):
    prompt = prompts(1, seed=2)[0]
    tokens = []
    with server.http.stream("POST", "/v1/completions", json=body_of(prompt, 30, stream=True)) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                tokens += json.loads(line[6:])["choices"][0]["token_ids"]
    assert tokens == golden(prompt, 30)


def test_prefix_cache_is_reported_and_changes_nothing(server, golden):
    prompt = prompts(1, seed=3)[0] + list(range(100))
    first = server.post("/v1/completions", body_of(prompt, 10)).json()
    second = server.post("/v1/completions", body_of(prompt, 10)).json()
    assert first["choices"][0]["token_ids"] == second["choices"][0]["token_ids"] == golden(prompt, 10)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0
    assert cached % PAGE == 0
    salted = server.post("/v1/completions", body_of(prompt, 10, cache_salt="mine")).json()
    assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_logprobs_equal_transformers(server, checkpoint):
    prompt = prompts(1, seed=4, longest=40)[0]
    body = body_of(prompt, 5, logprobs=3, echo=True)
    logprobs = server.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    answer = ask(server, prompt, 5)
    with torch.inference_mode():
        expected = checkpoint[1](torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    assert logprobs["token_logprobs"][0] is None
    ids = prompt + answer
    for i in range(1, len(ids)):
        assert logprobs["token_logprobs"][i] == pytest.approx(expected[i - 1, ids[i]].item(), abs=1e-3)
        assert max(logprobs["top_logprobs"][i].values()) == pytest.approx(expected[i - 1].max().item(), abs=1e-3)


def test_seeded_samples_do_not_depend_on_neighbours(server):
    body = {"prompt": "seed", "max_tokens": 20, "seed": 7, "n": 3, "return_token_ids": True, "ignore_eos": True}
    alone = [choice["token_ids"] for choice in server.post("/v1/completions", body).json()["choices"]]
    assert alone[0] != alone[1]
    with ThreadPoolExecutor(4) as pool:
        noise = [pool.submit(ask, server, prompt, 30) for prompt in prompts(4, seed=5)]
        together = [choice["token_ids"] for choice in server.post("/v1/completions", body).json()["choices"]]
        for request in noise:
            request.result()
    assert alone == together


def test_bad_neighbour_changes_nothing(server, golden):
    """FAULTS 12: refused requests leave others' tokens as they are; so does a legitimate bias."""
    with ThreadPoolExecutor(3) as pool:
        good = pool.submit(ask, server, [5, 6, 7], 60)
        for _ in range(5):
            assert server.post("/v1/completions", body_of([1], 5, logit_bias={"260": 5})).status_code == 400
            assert ask(server, [9], 4, logit_bias={"65": 100}) == [65] * 4
        assert good.result() == golden([5, 6, 7], 60)


def test_request_larger_than_the_cache(server):
    """FAULTS 25 and 7: more than the context is refused; what fits the context fits the cache by construction."""
    answer = server.post("/v1/completions", body_of([1] * 1000, 100))
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "context_length_exceeded"
    assert len(ask(server, [1] * 1000, 20)) == 20


def test_disconnect_in_prefill(server):
    """FAULTS 22: a prompt of many chunks, left in the middle."""
    data = json.dumps(body_of(prompts(1, seed=6)[0] * 4, 10)).encode()
    for _ in range(3):
        with server.connect() as sock:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
            sock.sendall(head.encode() + data)
            time.sleep(0.02)
        server.wait_idle(1.0)


def test_chat_with_the_openai_client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        messages = [{"role": "user", "content": "Hello"}]
        whole = client.chat.completions.create(model="tiny-mixtral", messages=messages, max_tokens=12, temperature=0)
        chunks = client.chat.completions.create(
            model="tiny-mixtral", messages=messages, max_tokens=12, temperature=0, stream=True
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == whole.choices[0].message.content
        assert whole.usage.prompt_tokens == len("user\nHello\nassistant\n") + 3


def test_short_soak(server, golden):
    """FAULTS 38, shortened: aborts and bad input among good requests; memory, descriptors and pages stay flat."""
    draw = random.Random(0)
    cases = prompts(6, seed=8, longest=60)

    def one(i):
        kind = draw.random()
        prompt = cases[i % len(cases)]
        if kind < 0.15:
            with (
                httpx.Client(base_url=server.url) as http,
                http.stream("POST", "/v1/completions", json=body_of(prompt, 500, stream=True)) as stream,
            ):
                next(stream.iter_lines())
            return True
        if kind < 0.25:
            return server.post("/v1/completions", {"prompt": prompt, "max_tokens": -1}).status_code == 400
        return ask(server, prompt, 12) == golden(prompt, 12)

    def burst():
        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(one, range(80)))
        server.wait_idle()

    def descriptors():
        return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))

    burst()
    rss, num_descriptors = server.rss(), descriptors()
    burst()
    assert server.rss() - rss < 8 << 20
    assert descriptors() <= num_descriptors + 6
