"""Long contexts: what the prompts hold, how answers are scored, and the command with its table, JSON and plot."""

from __future__ import annotations

import importlib.util
import json
import math
import random
from itertools import islice
from pathlib import Path

import pytest
import torch
from models.tiny_checkpoints import make_model
from server_process import write_byte_tokenizer

from gossamer.core import SamplingParams, StartupError
from gossamer.server.cli import main
from gossamer.server.eval import EvalConfig, longcontext
from gossamer.server.eval.longcontext import (
    MOST_ASKED,
    Fact,
    Score,
    Span,
    Trial,
    ask,
    facts,
    figures,
    keys_trial,
    needle_trial,
    perplexity_trial,
    scores,
    trials,
)
from gossamer.server.llm import LLM

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="the extra `plot` is not installed"
)
BOS = 300
DEPTHS = (0.5, 0.0, 0.9)
LIMITS = {"num_threads": 1, "max_num_batched_tokens": 96, "max_num_seqs": 3, "page_size": 16}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def encode(text: str) -> list[int]:
    return list(text.encode())


def text_of(token_ids: list[int]) -> str:
    return bytes(token_ids).decode()


def test_facts_have_names_of_their_own_and_five_digits():
    drawn = list(islice(facts("<{}>", ";", encode, random.Random(0)), 500))
    assert len({tuple(fact.cue) for fact in drawn}) == 500
    assert all(len(fact.answer) == 6 and text_of(fact.answer).strip().isdigit() for fact in drawn)
    assert text_of(drawn[0].token_ids).startswith("<")
    assert text_of(drawn[0].token_ids).endswith(";")


def test_asking_repeats_each_fact_and_marks_its_answer():
    first, second = Fact([1, 2], [3], [4]), Fact([5], [6, 7], [])
    haystack = [9, 9]
    trial = ask("case", haystack, [(0.5, first), (0.0, second)])
    assert trial.token_ids == [9, 9, 1, 2, 3, 4, 5, 6, 7]
    assert trial.spans == [Span("case", 0.5, 4, 5), Span("case", 0.0, 7, 9)]
    assert haystack == [9, 9]


@pytest.mark.parametrize("prefix", [[], [BOS]])
def test_each_position_of_a_text_counts_in_one_bucket(prefix: list[int]):
    text = list(range(1000, 1100))
    trial = perplexity_trial(text, (10, 25, 64), prefix)
    assert trial.token_ids == [*prefix, *text][:63]
    assert [span.case for span in trial.spans] == ["perplexity 0 to 10", "perplexity 10 to 25", "perplexity 25 to 64"]
    scored = [i for span in trial.spans for i in range(span.begin, span.end)]
    assert scored == list(range(1 + len(prefix), 63))  # nothing precedes the first
    assert trial.token_ids[trial.spans[1].begin] == text[10]


def test_a_bucket_that_the_prompt_ends_before_is_left_out():
    assert [span.case for span in perplexity_trial(range(20), (10, 11), [BOS]).spans] == ["perplexity 0 to 10"]


@pytest.mark.parametrize("prefix", [[], [BOS]])
def test_needles_lie_at_their_depths_of_an_unbroken_stretch_of_text(prefix: list[int]):
    text = [1000 + i for i in range(5000)]
    trial = needle_trial(1024, DEPTHS, text, prefix, encode, random.Random(3))
    assert len(trial.token_ids) == 1023  # with the token that is generated, 1024
    assert trial.token_ids[: len(prefix)] == prefix
    hay = [token for token in trial.token_ids if token >= 1000]
    assert hay == list(range(hay[0], hay[0] + len(hay)))
    assert sorted(span.depth for span in trial.spans) == sorted(DEPTHS)
    said = "".join(chr(token) if token < 128 else "#" for token in trial.token_ids[len(prefix) :])
    for span in trial.spans:
        answer = text_of(trial.token_ids[span.begin : span.end])
        cue = said[: span.begin - len(prefix)].rpartition("\n")[2]
        assert cue.startswith("The pass key of")
        assert said.count(cue) == said.count(cue + answer) == 2
        assert said[: said.index(cue)].count("#") == pytest.approx(span.depth * len(hay), abs=1)


@pytest.mark.parametrize(("length", "prefix"), [(256, []), (2048, [BOS])])
def test_keys_are_asked_for_from_all_depths(length: int, prefix: list[int]):
    trial = keys_trial(length, prefix, encode, random.Random(1))
    assert length - 1 - 2 * len("bababa: 12345\n") < len(trial.token_ids) < length
    assert trial.token_ids[: len(prefix)] == prefix
    lines = text_of(trial.token_ids[len(prefix) :]).splitlines()
    count = len(trial.spans)
    haystack, asked = lines[:-count], lines[-count:]
    assert count == min(MOST_ASKED, len(haystack) // 4)
    assert len({line.partition(":")[0] for line in haystack}) == len(haystack)
    assert len({*asked}) == count
    where = [haystack.index(line) for line in asked]
    assert where != sorted(where)
    assert [span.depth for span in trial.spans] == [i * 10 // len(haystack) / 10 for i in where]
    # One of each of as many equal parts of the haystack.
    assert sorted(i * count // len(haystack) for i in where) == pytest.approx(range(count), abs=1)
    for span, line in zip(trial.spans, asked, strict=True):
        assert text_of(trial.token_ids[span.begin : span.end]) == line.partition(":")[2]


def test_prompts_follow_the_seed_and_share_no_beginning():
    options = EvalConfig(text=("-",), context_lens=(400, 600), depths=(0.2, 0.8), num_samples=3)
    texts = [[1000 + i for i in range(3000)], [9000 + i for i in range(1300)]]
    found = trials(options, texts, [], encode, seed=5)
    assert found == trials(options, texts, [], encode, seed=5)
    assert found != trials(options, texts, [], encode, seed=6)
    assert len(found) == 3 + 2 * 2 * 3
    assert len({tuple(trial.token_ids[:64]) for trial in found}) == len(found)  # no page is a prefix hit
    # The start of each text, then where that ended.
    assert [trial.token_ids[0] for trial in found[:3]] == [1000, 9000, 1600]


def test_figures():
    def score(case: str, depth: float, length: int, logprob: float, exact: bool) -> Score:
        return Score(Span(case, depth, 10, 10 + length), logprob, exact)

    found = figures(
        [
            score("perplexity 0 to 8", 0.0, 3, 3 * math.log(0.5), False),
            score("perplexity 0 to 8", 0.0, 1, math.log(0.125), False),
            score("keys 8", 0.5, 5, -1.0, True),
            score("keys 8", 0.0, 5, -3.0, False),
            score("keys 8", 0.5, 5, -5.0, False),
            score("keys 8", 0.0, 5, -3.0, False),
        ]
    )
    assert found["perplexity 0 to 8"] == {"figure": pytest.approx(2.0**1.5), "tokens": 4}
    by_depth = {"0.0": 0.0, "0.5": 0.5}
    assert found["keys 8"] == {"figure": 0.25, "answers": 4, "logprob": -3.0, "by depth": by_depth}


def test_scores_are_the_model_s_and_exact_is_what_greedy_decoding_writes(tmp_path: Path):
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    prompt = torch.randint(3, 128, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    with LLM(str(tmp_path), skip_tokenizer_init=True, **LIMITS) as llm:
        greedy = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
        written = llm.generate({"prompt_token_ids": prompt}, greedy, use_tqdm=False)[0].outputs[0].token_ids
        right = Trial([*prompt, *written], [Span("a", 0.0, 40, 45), Span("a", 0.0, 10, 20)])
        wrong = Trial([*prompt, *written[:4], written[4] ^ 1], [Span("b", 0.0, 40, 45)])
        found = scores(llm, [right, wrong])
    assert [score.exact for score in found] == [True, False, False]
    for score, trial in zip(found, (right, right, wrong), strict=True):
        with torch.no_grad():
            expected = torch.log_softmax(model(torch.tensor([trial.token_ids])).logits[0], -1)
        logprobs = [float(expected[i - 1, trial.token_ids[i]]) for i in range(score.span.begin, score.span.end)]
        assert score.logprob == pytest.approx(sum(logprobs), abs=1e-3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_byte_tokenizer(tmp_path_factory.mktemp("models") / "tiny")
    make_model("llama", vocab_size=260, max_position_embeddings=512, bos_token_id=None).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return path


ARGV = ["--context-lens", "256,400", "--depths", "0,0.5", "--num-samples", "2", "--num-threads", "1"]
SPARSE = "--attention block_topk --page-size 16 --sparse-budget 64 --sparse-window 16"


def test_the_command(checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out.json"
    argv = ["eval", "longcontext", str(checkpoint), "--text", str(text), str(text), *ARGV, "--page-size", "16"]
    argv += ["--compare", SPARSE, "--compare", f"{SPARSE} --sparse-budget 1K", "--output-json", str(out)]
    argv += ["--compare", f"{SPARSE} --sparse-dense-layers 1,0"]
    assert main(argv) == 0
    report = json.loads(out.read_text())
    cases = ["perplexity 0 to 256", "perplexity 256 to 400", "needle 256", "keys 256", "needle 400", "keys 400"]
    dense, sparse, all_pages, layers = report["median"].values()
    assert [*report["median"]] == ["tiny", "block_topk 64", "block_topk 1024", "block_topk 64 dense 1,0"]
    assert [*dense] == [*sparse] == cases
    assert all_pages == dense  # a budget beyond the context
    assert len({found[cases[0]] for found in (dense, sparse, layers)}) == 3
    details = report["all"][0]["tiny"]
    assert (details[cases[0]]["tokens"], details[cases[1]]["tokens"]) == (2 * 255, 2 * 143)
    assert details["needle 256"]["answers"] == 4
    assert [*details["needle 400"]["by depth"]] == ["0.0", "0.5"]
    shown = capsys.readouterr()
    assert "block_topk 64" in shown.out
    assert "tiny: 10 prompts, " in shown.err
    assert "text.txt, text.txt; 10 prompts, " in report["shapes"]


@needs_matplotlib
def test_the_plot(checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out.png"
    argv = ["eval", "longcontext", str(checkpoint), "--text", str(text), *ARGV, "--plot", str(out)]
    assert main(argv) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert main([*argv[:-1], str(tmp_path / "out.jpeg2")]) == 2
    assert "--plot" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--text", "/no/such/file"], "--text /no/such/file"),
        (["--context-lens", "512,256"], "--context-lens must rise"),
        (["--context-lens", "some"], "--context-lens wants a whole number"),
        (["--context-lens", "256,1K"], "--context-lens 1024 is more than --max-model-len 512. Set 512 or less."),
        (["--context-lens", "32"], "tokens short of 2 needles"),
        (["--context-lens", "60", "--depths", "0"], "--context-lens 60"),
        (["--depths", "0,1.5"], "--depths must be between 0 and 1"),
        (["--num-samples", "0"], "--num-samples must be at least 1"),
        (["--num-samples", "3"], "--text has 2 stretches of 400 tokens; --num-samples is 3."),
        (["--output-json", "/no/such/folder/out.json"], "--output-json"),
        (["--plot", "/no/such/folder/out.png"], "--plot"),
        (["--compare", "--attention block_topk --sparse-budget 100"], "--sparse-budget 100"),
        (["--sparse-dense-layers", "0,0.5"], "--sparse-dense-layers wants whole numbers, as 1,2; got '0.5'."),
    ],
)
def test_mistakes(argv: list[str], says: str, checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["eval", "longcontext", str(checkpoint), "--text", str(text), *ARGV, *argv]) == 2
    assert says in capsys.readouterr().err


def test_a_text_that_is_too_short_says_by_how_much(checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]):
    text.write_text("x" * 390)
    assert main(["eval", "longcontext", str(checkpoint), "--text", str(text), *ARGV]) == 2
    assert "has 390 tokens, 10 short of the longest of --context-lens, 400." in capsys.readouterr().err


def test_a_plot_needs_the_extra_before_anything_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(longcontext, "find_spec", lambda name: None)
    with pytest.raises(StartupError, match=r"pip install 'gossamer\[plot\]'"):
        longcontext.need_matplotlib()
