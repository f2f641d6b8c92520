"""Text as tokens arrive, stop strings across token boundaries, and the outputs of each mode."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import STRINGS, metadata
from token_vocabularies import sentencepiece_metadata

from gossamer.core import MAX_SEED, InvalidRequest, SamplingParams, TokenLogprobs, TokenOutput
from gossamer.server.detokenizer import Detokenizer
from gossamer.server.gguf_tokenizer import tokenizer_from_metadata
from gossamer.server.outputs import OutputProcessor, RequestOutput
from gossamer.server.stop_strings import StopStrings
from gossamer.server.tokenizer import Tokenizer


@cache
def bpe() -> Tokenizer:
    return Tokenizer(tokenizer_from_metadata(metadata(), Path("x")))


@cache
def sentencepiece() -> Tokenizer:
    return Tokenizer(tokenizer_from_metadata(sentencepiece_metadata(metadata()), Path("x")))


# Detokenizer


def stream(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.add(i) for i in ids), detokenizer.flush()]


@pytest.mark.parametrize("tokenizer", [bpe, sentencepiece])
def test_pieces_join_to_the_text(tokenizer) -> None:
    for text in STRINGS:
        ids = tokenizer().encode(text, add_special_tokens=False, parse_special=False)
        pieces = stream(Detokenizer(tokenizer()), ids)
        assert "".join(pieces) == tokenizer().decode(ids)
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)


def test_any_bytes_join_to_the_whole_decoding() -> None:
    """Random tokens are mostly not UTF-8: the pieces must still add up, and hold back no more than they must."""
    draw = random.Random(1)
    for _ in range(300):
        ids = [draw.randrange(17, 600) if draw.random() < 0.7 else draw.randrange(49152) for _ in range(40)]
        assert "".join(stream(Detokenizer(bpe()), ids)) == bpe().decode(ids)


def test_characters_come_whole_and_at_once() -> None:
    ids = bpe().encode("😀é", add_special_tokens=False)
    assert len(ids) > 2
    detokenizer = Detokenizer(bpe())
    pieces = [detokenizer.add(i) for i in ids]
    assert [piece for piece in pieces if piece] == ["😀", "é"]
    detokenizer = Detokenizer(bpe())
    assert "".join(detokenizer.add(i) for i in bpe().encode("x😀")[:-1]) == "x"
    assert detokenizer.flush() == "\ufffd"


@pytest.mark.parametrize("tokenizer", [bpe, sentencepiece])
@pytest.mark.parametrize("text", ["Hello world, héllo 日本 😀 again", " x", "a  b", "1 2\n 3"])
def test_the_prompt_gives_the_first_token_its_context(tokenizer, text: str) -> None:
    ids = tokenizer().encode(text, add_special_tokens=False)
    for cut in range(1, len(ids)):
        before = tokenizer().decode(ids[:cut])
        if before.endswith("\ufffd"):
            continue  # no text prompt ends within a character
        assert before + "".join(stream(Detokenizer(tokenizer(), ids[:cut]), ids[cut:])) == text


def test_a_character_begun_in_the_prompt_is_shown_whole() -> None:
    ids = bpe().encode("x😀 y")
    for cut in range(2, len(ids) - 1):
        assert "".join(stream(Detokenizer(bpe(), ids[:cut]), ids[cut:])) == "😀 y"


def test_special_tokens_are_skipped_or_shown() -> None:
    ids = bpe().encode("<|im_start|>a<|im_end|> b<|endoftext|>", add_special_tokens=False)
    assert "".join(stream(Detokenizer(bpe()), ids)) == "a b"
    shown = Detokenizer(bpe(), skip_special_tokens=False)
    assert "".join(stream(shown, ids)) == "<|im_start|>a<|im_end|> b<|endoftext|>"


@pytest.mark.parametrize("kind", ["text", "unfinished"])
def test_cost_per_token_does_not_grow(kind: str) -> None:
    """Ordinary text, and tokens that never end on a character boundary."""
    if kind == "text":
        ids = bpe().encode("The quick brown fox. " * 1500, add_special_tokens=False)
    else:
        byte = {bpe().id_to_token(i): i for i in range(600)}
        ids = [byte["ð"]] * 8000
    detokenizer = Detokenizer(bpe())
    seconds = []
    for part in (ids[: len(ids) // 4], ids[len(ids) // 4 : -len(ids) // 4], ids[-len(ids) // 4 :]):
        start = time.perf_counter()
        text = "".join(detokenizer.add(i) for i in part)
        seconds.append((time.perf_counter() - start) / len(part))
        assert text
    assert seconds[-1] < 5 * seconds[0] + 1e-5


# StopStrings


def feed(stops: StopStrings, pieces: list[str]) -> tuple[str, str | None]:
    out = ""
    for piece in pieces:
        text, stop = stops.add(piece)
        out += text
        if stop is not None:
            return out, stop
    return out + stops.flush(), None


@pytest.mark.parametrize("include", [False, True])
def test_stop_across_pieces(include: bool) -> None:
    assert feed(StopStrings(["END"], include), list("abENENDxyz")) == ("abEN" + "END" * include, "END")
    assert feed(StopStrings(["END"], include), list("abEN")) == ("abEN", None)
    assert feed(StopStrings(["b", "ab"], include), ["x", "a", "b"])[1] == "ab"
    assert feed(StopStrings([], include), ["x", "y"]) == ("xy", None)


def test_only_what_may_become_a_stop_is_held_back() -> None:
    stops = StopStrings(["</tool>", "\n\n"])
    assert stops.add("a <") == ("a ", None)
    assert stops.add("b") == ("<b", None)
    assert stops.add("\n") == ("", None)
    assert stops.add("</too") == ("\n", None)
    assert stops.add("l\n") == ("</tool", None)
    assert stops.add("\nrest") == ("", "\n\n")


@settings(max_examples=300, deadline=None)
@given(
    st.text("ab\n", max_size=40),
    st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=4),
    st.lists(st.integers(1, 6), min_size=1),
    st.booleans(),
)
def test_the_split_into_pieces_does_not_matter_to_what_is_shown(
    text: str, stops: list[str], sizes: list[int], include: bool
) -> None:
    pieces, at = [], 0
    while at < len(text):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(text[at : at + size])
        at += size
    shown, stop = feed(StopStrings(stops, include), pieces)
    # The oracle looks at the text after each piece, as a reader who waits would.
    so_far = ""
    for piece in pieces:
        so_far += piece
        found = [(so_far.find(s), i) for i, s in enumerate(stops) if s in so_far]
        if found:
            where, index = min(found)
            assert stop == stops[index]
            assert shown == so_far[: where + len(stop) * include]
            return
    assert (shown, stop) == (text, None)


# OutputProcessor


def run(
    text: str, params: SamplingParams, mode: str = "cumulative", finish: TokenOutput | None = None, per_step: int = 1
) -> tuple[list[RequestOutput], list[str]]:
    """Feeds the tokens of a text as an engine would, one or more per step, until a stop string ends it."""
    processor = OutputProcessor(bpe())
    [(child, _)] = processor.add_request("r", "p", [50], params, mode=mode)
    ids = bpe().encode(text, add_special_tokens=False)
    states: list[RequestOutput] = []
    for i in range(0, len(ids), per_step):
        last = i + per_step >= len(ids)
        step = TokenOutput(child, ids[i : i + per_step])
        if last:
            step = replace(finish or step, request_id=child, token_ids=step.token_ids)
        new, aborts = processor.process([step])
        states += [state.take() for state in new]
        if aborts:
            assert processor.num_unfinished == 0
            assert processor.process([TokenOutput(child, [60], "length")]) == ([], [])  # was on its way already
            return states, aborts
    return states, []


LENGTH = TokenOutput("", [], "length")
STOP = TokenOutput("", [], "stop")


def test_modes_tell_the_same_story() -> None:
    text = "Hello 😀 wörld, this is a test."
    cumulative, _ = run(text, SamplingParams(), "cumulative", LENGTH)
    delta, _ = run(text, SamplingParams(), "delta", LENGTH)
    final, _ = run(text, SamplingParams(), "final", LENGTH)
    assert len(final) == 1
    assert final[0].outputs[0] == cumulative[-1].outputs[0]
    assert final[0].outputs[0].text == text
    assert "".join(o.outputs[0].text for o in delta) == text
    assert [i for o in delta for i in o.outputs[0].token_ids] == final[0].outputs[0].token_ids
    for earlier, later in pairwise(cumulative):
        assert later.outputs[0].text.startswith(earlier.outputs[0].text)
        assert not earlier.finished
    assert final[0].finished
    assert final[0].outputs[0].finish_reason == "length"
    assert final[0].prompt == "p"
    assert final[0].prompt_token_ids == [50]


@pytest.mark.parametrize("mode", ["cumulative", "delta"])
@pytest.mark.parametrize("every", [2, 5, 100])
def test_a_reader_that_falls_behind_loses_nothing(mode: str, every: int) -> None:
    text = "one two three four five"
    ids = bpe().encode(text, add_special_tokens=False)
    processor = OutputProcessor(bpe())
    processor.add_request("r", None, [50], SamplingParams(), mode=mode)
    taken: list[RequestOutput] = []
    for i, token_id in enumerate(ids, 1):
        [state], _ = processor.process([TokenOutput("r", [token_id], "length" if i == len(ids) else None)])
        if i % every == 0 or i == len(ids):
            taken.append(state.take())
    assert len(taken) < len(ids)
    assert taken[-1].finished
    pieces = [output.outputs[0] for output in (taken if mode == "delta" else taken[-1:])]
    assert "".join(piece.text for piece in pieces) == text
    assert [token_id for piece in pieces for token_id in piece.token_ids] == ids
    assert pieces[-1].finish_reason == "length"


@pytest.mark.parametrize("per_step", [1, 3])
@pytest.mark.parametrize("include", [False, True])
def test_stop_string_ends_the_request(include: bool, per_step: int) -> None:
    params = SamplingParams(stop=["###", "brown f"], include_stop_str_in_output=include)
    states, aborts = run("The quick brown fox jumps over", params, per_step=per_step)
    output = states[-1].outputs[0]
    assert aborts == ["r"]
    assert states[-1].finished
    assert output.text == "The quick " + "brown f" * include
    assert (output.finish_reason, output.stop_reason) == ("stop", "brown f")
    assert bpe().decode(output.token_ids) == "The quick brown fox"


def test_streams_never_show_part_of_a_stop_string() -> None:
    states, aborts = run("count: 1\n2\n\n3", SamplingParams(stop="\n\n"), "delta")
    assert aborts
    assert "".join(s.outputs[0].text for s in states) == "count: 1\n2"


def test_held_back_text_comes_out_at_the_end() -> None:
    states, aborts = run("ends with </too", SamplingParams(stop="</tool>"), finish=LENGTH)
    assert not aborts
    assert states[-1].outputs[0].text == "ends with </too"
    assert states[-1].outputs[0].finish_reason == "length"


def test_stop_string_on_the_last_token_needs_no_abort() -> None:
    states, aborts = run("a b c", SamplingParams(stop=" c"), finish=LENGTH)
    assert aborts == []
    assert (states[-1].outputs[0].text, states[-1].outputs[0].stop_reason) == ("a b", " c")


def test_min_tokens_holds_for_stop_strings() -> None:
    text = "x, x, x, x, x"
    states, _ = run(text, SamplingParams(stop=",", min_tokens=5))
    output = states[-1].outputs[0]
    assert len(output.token_ids) == 6
    assert output.text == "x, x, x"
    assert output.stop_reason == ","


def test_the_token_that_ends_the_output_is_not_in_its_text() -> None:
    text = "Paris is big.<|im_end|>"
    states, _ = run(text, SamplingParams(skip_special_tokens=False), finish=STOP)
    output = states[-1].outputs[0]
    assert output.text == "Paris is big."
    assert output.token_ids[-1] == 2
    states, _ = run("Paris is big.", SamplingParams(), finish=replace(STOP, stop_reason=30))
    assert states[-1].outputs[0].text == "Paris is big"
    assert states[-1].outputs[0].stop_reason == 30
    states, _ = run(text, SamplingParams(skip_special_tokens=False, include_stop_str_in_output=True), finish=STOP)
    assert states[-1].outputs[0].text == text


def test_without_detokenize_there_is_no_text() -> None:
    states, _ = run("a b c", SamplingParams(detokenize=False), finish=LENGTH)
    assert states[-1].outputs[0].text == ""
    assert len(states[-1].outputs[0].token_ids) == 3
    assert OutputProcessor(None).add_request("r", None, [1], SamplingParams())


def test_samples_of_one_request() -> None:
    processor = OutputProcessor(bpe())
    params = SamplingParams(n=3, seed=MAX_SEED - 1, prompt_logprobs=1)
    children = processor.add_request("r", None, [1, 2], params)
    assert [child for child, _ in children] == ["r-0", "r-1", "r-2"]
    assert [p.n for _, p in children] == [1, 1, 1]
    seeds = [p.seed for _, p in children]
    assert len(set(seeds)) == 3
    assert all(abs(seed) <= MAX_SEED for seed in seeds)
    assert [p.prompt_logprobs for _, p in children] == [1, None, None]
    assert params.n == 3
    outputs, _ = processor.process([TokenOutput("r-2", [100], "length"), TokenOutput("r-0", [101])])
    assert len(outputs) == 1
    output = outputs[0].take()
    assert [o.finish_reason for o in output.outputs] == [None, None, "length"]
    assert [len(o.token_ids) for o in output.outputs] == [1, 0, 1]
    assert not output.finished
    assert processor.abort("r") == ["r-0", "r-1"]
    assert processor.abort("r") == []
    assert processor.num_unfinished == 0


def test_delta_has_only_the_samples_with_news() -> None:
    processor = OutputProcessor(bpe())
    processor.add_request("r", None, [1], SamplingParams(n=2), mode="delta")
    [state], _ = processor.process([TokenOutput("r-1", [100])])
    assert [(o.index, o.token_ids) for o in state.take().outputs] == [(1, [100])]
    # A reader that falls behind takes several steps at once.
    processor.process([TokenOutput("r-1", [102])])
    processor.process([TokenOutput("r-0", [101], "length"), TokenOutput("r-1", [103], "length")])
    output = state.take()
    assert [(o.index, o.token_ids) for o in output.outputs] == [(0, [101]), (1, [102, 103])]
    assert output.finished
    assert state.take().outputs == []


def test_request_ids_in_use_are_refused() -> None:
    processor = OutputProcessor(bpe())
    processor.add_request("a", None, [1], SamplingParams(n=2))
    for taken in ("a", "a-1"):
        with pytest.raises(InvalidRequest, match="is in use"):
            processor.add_request(taken, None, [1], SamplingParams())
    assert processor.abort("a") == ["a-0", "a-1"]
    processor.add_request("a-1", None, [1], SamplingParams())


def test_logprobs() -> None:
    processor = OutputProcessor(bpe())
    processor.add_request("r", None, [1, 2, 3], SamplingParams(logprobs=2, prompt_logprobs=0))
    prompt = [TokenLogprobs([2], [-3.0], [9]), TokenLogprobs([3], [-4.0], [10])]
    first = TokenLogprobs([100, 100, 101], [-0.5, -0.5, -1.5], [1, 1, 2])
    second = TokenLogprobs([200, 102, 103], [-2.5, -0.1, -0.2], [7, 1, 2])
    processor.process([TokenOutput("r", [], prompt_logprobs=prompt[:1])])
    processor.process([TokenOutput("r", [100], logprobs=[first], prompt_logprobs=prompt[1:], num_cached_tokens=2)])
    [state], _ = processor.process([TokenOutput("r", [200], "length", logprobs=[second])])
    output = state.take()
    assert output.num_cached_tokens == 2
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert output.prompt_logprobs[1] == {2: (-3.0, 9, "<|im_end|>")}
    assert len(output.prompt_logprobs) == 3
    choice = output.outputs[0]
    assert choice.cumulative_logprob == -3.0
    assert list(choice.logprobs[0]) == [100, 101]
    assert list(choice.logprobs[1]) == [200, 102, 103]
    entry = choice.logprobs[1][200]
    assert (entry.logprob, entry.rank, entry.decoded_token) == (-2.5, 7, bpe().decode([200]))


def test_errors_and_metrics() -> None:
    times = iter(range(90, 200, 10))
    processor = OutputProcessor(bpe(), clock=lambda: float(next(times)))
    processor.add_request("r", None, [1], SamplingParams())
    processor.process([TokenOutput("r", [100])])
    [state], aborts = processor.process([TokenOutput("r", [], "error", error="the step failed")])
    assert aborts == []
    output = state.take()
    assert output.finished
    assert output.error == "the step failed"
    assert output.outputs[0].finish_reason == "error"
    metrics = output.metrics
    assert (metrics.arrival_time, metrics.first_token_time, metrics.last_token_time) == (90.0, 100.0, 100.0)
    assert metrics.finished_time > 100.0


def test_a_delta_costs_the_same_however_long_the_output_is() -> None:
    processor = OutputProcessor(bpe())
    processor.add_request("r", None, [1], SamplingParams(stop=["never seen"]), mode="delta")
    ids = bpe().encode("The quick brown fox. " * 2000, add_special_tokens=False)
    start = time.perf_counter()
    for token_id in ids[:500]:
        [state], _ = processor.process([TokenOutput("r", [token_id])])
        state.take()
    early = time.perf_counter() - start
    for token_id in ids[500:-500]:
        [state], _ = processor.process([TokenOutput("r", [token_id])])
        state.take()
    start = time.perf_counter()
    for token_id in ids[-500:]:
        [state], _ = processor.process([TokenOutput("r", [token_id])])
        state.take()
    assert time.perf_counter() - start < 4 * early + 0.01
