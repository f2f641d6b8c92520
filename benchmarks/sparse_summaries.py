"""What block selection would find again with other summaries of a page, or sparse in other layers; in plain torch.

The default model, float32, apart from the engine. A haystack of keys (`gossamer eval longcontext`) is read densely; its
questions then select pages, as `block_topk` does: first, last and best ones. Masks stand in for the selection.
`python benchmarks/sparse_summaries.py --out benchmarks/results/cpu/sparse_summaries.json`
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from torch.nn.functional import pad, silu

from gossamer.models.gguf_config import hf_config_of_gguf, open_gguf
from gossamer.server.bench.report import environment, write_report
from gossamer.server.cli import default_model
from gossamer.server.eval.longcontext import Trial, keys_trial
from gossamer.server.eval.perplexity import beginning
from gossamer.server.llm import LLM

PAGE, FIRST, LOCAL, TILE = 64, 1, 8, 256
Logits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Queries [kv heads, group, tokens, dim] and keys [kv heads, pages, PAGE, dim] -> [.., tokens, pages, entries]."""


def products(q: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    return torch.einsum("hgtd,hped->hgtpe", q, entries) * q.shape[-1] ** -0.5


def means(of: int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return products(q, k.unflatten(2, (-1, of)).mean(3))


def bounds(of: int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    parts = k.unflatten(2, (-1, of))
    return products(q.clamp_min(0), parts.amax(3)) + products(q.clamp_max(0), parts.amin(3))


def centred(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return means(16, q, k - k.mean((1, 2), keepdim=True))


def variance(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The logarithm of a page's mass, if each dimension of its keys were normal."""
    return means(64, q, k) + 0.5 * products(q * q, k.var(2, keepdim=True)) * q.shape[-1] ** -0.5


def coded(bits: int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """All keys, in so many bits a dimension between the page's bounds."""
    low, step = k.amin(2, keepdim=True), (k.amax(2, keepdim=True) - k.amin(2, keepdim=True)) / 2**bits
    return products(q, low + (((k - low) / step).floor().clamp(max=2**bits - 1) + 0.5) * step)


def projected(rank: int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """All keys, in the directions in which those of the first pages are largest."""
    basis = torch.linalg.svd(k[:, :16].flatten(1, 2), full_matrices=False)[2][:, :rank].transpose(1, 2)
    return products(q @ (basis @ basis.transpose(1, 2))[:, None], k)


def chance(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.rand(*q.shape[:3], k.shape[1], 1)


SUMMARIES: dict[str, tuple[float, Logits]] = {
    "all keys": (1, lambda q, k: products(q, k)),
    "chance": (0, chance),
    **{f"means of {n}": (1 / n, partial(means, n)) for n in (64, 16, 8, 4, 2)},
    **{f"bounds of {n}": (2 / n, partial(bounds, n)) for n in (64, 16, 8)},
    "means of 16, centred": (1 / 16, centred),
    "means of 64 and variances": (1 / 32, variance),
    **{f"keys in {n} bits": (n / 16 + 1 / 32, partial(coded, n)) for n in (1, 2, 4)},
    **{f"keys in {n} directions": (n / 64, partial(projected, n)) for n in (8, 16, 32)},
}
"""Of the bytes of bf16 keys, those read to score; how."""
MEANS = "means of 64"


class Model:
    def __init__(self, path: str) -> None:
        _, config = hf_config_of_gguf(open_gguf(Path(path)))
        self.q_heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.dim, self.num_layers = config["hidden_size"] // self.q_heads, config["num_hidden_layers"]
        self.theta, self.eps = config["rope_parameters"]["rope_theta"], config["rms_norm_eps"]
        self.weights = {}
        for stored in gguf.GGUFReader(path).tensors:
            weight = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).astype(np.float32))
            if stored.name.endswith(("attn_q.weight", "attn_k.weight")):  # stored with neighbours to be rotated
                weight = weight.unflatten(0, (-1, self.dim // 2, 2)).transpose(1, 2).reshape(weight.shape)
            self.weights[stored.name.removesuffix(".weight")] = weight

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weights[name]

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angles = positions[:, None] * self.theta ** (-torch.arange(0, self.dim, 2) / self.dim)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def forward(
        self, ids: Sequence[int], cache: list[tuple[torch.Tensor, torch.Tensor]], logits: Logits, layers: set[int],
        budget: int,
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:  # fmt: skip
        """The tokens behind those of `cache`, selecting in `layers`: normed stream, keys and values."""
        start, found = cache[0][0].shape[1] if cache else 0, []
        positions, n = torch.arange(start, len(ids)), len(ids) - start
        x = self.weights["token_embd"][torch.tensor(ids[start:])]
        for layer in range(self.num_layers):
            at = f"blk.{layer}."
            h = self.norm(x, at + "attn_norm")
            q, k, v = ((h @ self.weights[f"{at}attn_{name}"].t()).view(n, -1, self.dim) for name in "qkv")
            q, k = self.rotate(q, positions), self.rotate(k, positions)
            own = k.transpose(0, 1), v.transpose(0, 1)
            keys, values = (torch.cat(x, 1) for x in zip(cache[layer], own, strict=True)) if cache else own
            found.append((keys, values))
            heads = q.view(n, self.kv_heads, -1, self.dim).permute(1, 2, 0, 3)
            parts = [
                attend(
                    heads[:, :, low : low + TILE], keys, values, positions[low : low + TILE],
                    logits if layer in layers else None, budget,
                )
                for low in range(0, n, TILE)
            ]  # fmt: skip
            x = x + torch.cat(parts, 2).permute(2, 0, 1, 3).reshape(n, -1) @ self.weights[at + "attn_output"].t()
            h = self.norm(x, at + "ffn_norm")
            gate, up = (h @ self.weights[at + name].t() for name in ("ffn_gate", "ffn_up"))
            x = x + (silu(gate) * up) @ self.weights[at + "ffn_down"].t()
        return self.norm(x, "output_norm"), found


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, logits: Logits | None, budget: int
) -> torch.Tensor:
    end = int(positions[-1]) + 1
    scores = torch.einsum("hgtd,hsd->hgts", q, k[:, :end]) * q.shape[-1] ** -0.5
    scores.masked_fill_(torch.arange(end) > positions[:, None], -torch.inf)
    if logits is not None:
        num_full = end // PAGE
        page, last = torch.arange(-(-end // PAGE)), positions[:, None] // PAGE
        forced = (page < FIRST) | (page > last - LOCAL)
        found = logits(q, k[:, : num_full * PAGE].unflatten(1, (num_full, PAGE)))
        found = found.masked_fill(forced[:, :num_full, None], -torch.inf)
        mass = found.flatten(3).softmax(-1).view_as(found).sum((1, 4))
        ranked = pad(mass, (0, len(page) - num_full)).masked_fill(forced, torch.inf).masked_fill(page > last, -1.0)
        chosen = torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, ranked.topk(budget // PAGE, -1).indices, True)
        scores.masked_fill_(~chosen.repeat_interleave(PAGE, -1)[:, None, :, :end], -torch.inf)
    return torch.einsum("hgts,hsd->hgtd", scores.softmax(-1), v[:, :end])


def haystacks(length: int, seeds: Sequence[int]) -> tuple[list[Trial], str]:
    """And the machine's name."""
    with LLM(default_model(), max_model_len=512, num_threads=1, device="cpu") as llm:
        tokenizer = llm.get_tokenizer()
        encode = partial(tokenizer.encode, add_special_tokens=False, parse_special=False)
        prefix = beginning(tokenizer)
        return [keys_trial(length, prefix, encode, random.Random(seed)) for seed in seeds], llm.info.device_name


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--dense-layers", type=int, nargs="*", default=[7, 18], help="to be tried as dense ones")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.num_threads)
    model, none = Model(default_model()), set[int]()
    every = {*range(model.num_layers)}
    named = ", ".join(map(str, args.dense_layers))
    cases = {"dense": (1.0, MEANS, none)}
    cases |= {name: (share, name, every) for name, (share, _) in SUMMARIES.items()}
    cases |= {f"{name}, all but layers {named}": (SUMMARIES[name][0], name, every - {*args.dense_layers})
              for name in (MEANS, "chance")}  # fmt: skip
    cases |= {f"{MEANS}, all but layers 0, 1": (1 / 64, MEANS, every - {0, 1})}
    cases |= {f"{MEANS}, layer {layer} alone": (1 / 64, MEANS, {layer}) for layer in sorted(every)}
    right, logprob, count = dict.fromkeys(cases, 0), dict.fromkeys(cases, 0.0), 0
    trials, device = haystacks(args.length, args.seeds)
    for trial in trials:
        start = min(span.begin for span in trial.spans) - 8
        _, cache = model.forward(trial.token_ids[:start], [], SUMMARIES[MEANS][1], none, args.budget)
        count += len(trial.spans)
        for case, (_, name, layers) in cases.items():
            hidden, _ = model.forward(trial.token_ids, cache, SUMMARIES[name][1], layers, args.budget)
            for span in trial.spans:
                given = hidden[span.begin - 1 - start : span.end - 1 - start] @ model.weights["token_embd"].t()
                wanted = torch.tensor(trial.token_ids[span.begin : span.end])
                right[case] += bool((given.argmax(-1) == wanted).all())
                logprob[case] += float(given.log_softmax(-1).gather(1, wanted[:, None]).sum())
            print(f"{case}: {right[case]} of {count}, {logprob[case] / count:.2f}", flush=True)
    table = {
        case: {"of K": share, "answers": right[case] / count, "log-probability": logprob[case] / count}
        for case, (share, _, _) in cases.items()
    }
    alone = sorted((case for case in table if case.endswith("alone")), key=lambda case: logprob[case])
    shown = {case: row for case, row in table.items() if case not in alone[5:]}
    report = {
        **environment(device, "python benchmarks/sparse_summaries.py"),
        "unit": "share of answers that greedy decoding gets right",
    }
    shapes = f"{Path(default_model()).stem}; keys in {args.length} tokens, {args.budget} selected; {count} questions"
    write_report(args.out, report | {"shapes": shapes, "repeats": 1, "table": shown, "all": [table]})


if __name__ == "__main__":
    main()
