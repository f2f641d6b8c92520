"""DeepSeek-V3.2's sparse attention beside dense latent attention over the same context, each beside its floor.

python benchmarks/ops/bench_dsa.py [--only decode|prefill] [--out FILE]

128 heads; an indexer of 64 heads of 128 chooses 2,048 tokens. Of a step: `scores and choice`, `attention` to the
chosen, `sparse` (both, in one graph), and `dense`. Floors: index keys, chosen or all latents read once (a chunk's
chosen ones: the context's, at most), or the products that the algorithm asks for (a chunk's: with a head's own keys).
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterator

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import common
from bench_mla import NOPE, PAGE, RANK, ROPE, WIDTH, Cache, V

from gossamer.ops.attention import DecodeWorkspace
from gossamer.ops.dsa import attend_chosen, choose_tokens
from gossamer.ops.mla import latent_decode, latent_prefill

HEADS, INDEX_HEADS, INDEX_DIM, TOP = 128, 64, 128, 2048
DECODE = [(batch, context) for context in (65536, 131072) for batch in (1, 8, 32)]
PREFILL = [(2048, 65536), (2048, 131072)]
"""New tokens and context with them."""

Calls = dict[str, Callable[[int], None]]


def sparse_calls(
    cache: Cache, slots: list[torch.Tensor], positions: torch.Tensor, context: int, workspace: DecodeWorkspace
) -> Calls:
    """Choice and attention of one token for each position, of sequences that `slots` has for each input set."""
    num, num_sets = len(positions), len(slots)
    keys = torch.randn(len(cache.pages), 1, PAGE, INDEX_DIM, dtype=torch.bfloat16, device="cuda")
    q = torch.randn(num, INDEX_HEADS, INDEX_DIM, dtype=torch.bfloat16, device="cuda")
    weights = torch.randn(num, INDEX_HEADS, dtype=torch.bfloat16, device="cuda")
    latent = torch.randn(num, HEADS, RANK, dtype=torch.bfloat16, device="cuda")
    rope = torch.randn(num, HEADS, NOPE + ROPE, dtype=torch.bfloat16, device="cuda")[..., NOPE:]
    out, lists = torch.empty_like(latent), torch.empty(num_sets, num, TOP, dtype=torch.int32, device="cuda")

    def choose(i: int) -> None:
        choose_tokens(
            q, weights, keys, cache.page_table, slots[i % num_sets], positions, lists[i % num_sets], max_seq_len=context
        )

    def attend(i: int) -> None:
        attend_chosen(
            latent, rope, cache.pages, lists[i % num_sets], slots[i % num_sets], positions, 192**-0.5, out,
            workspace=workspace,
        )  # fmt: skip

    def sparse(i: int) -> None:
        choose(i)
        attend(i)

    return {"scores and choice": choose, "attention": attend, "sparse": sparse}


def workspace(rows: int) -> DecodeWorkspace:
    programs = 2 * torch.cuda.get_device_properties(0).multi_processor_count // (HEADS // 64)
    return DecodeWorkspace.allocate(rows, HEADS, HEADS // 64, RANK, "cuda", programs)


def decode_calls(batch: int, context: int) -> tuple[Calls, int]:
    num_sets = common.rotations(batch * context * INDEX_DIM * 2, most=8)
    cache, space = Cache([context] * batch, num_sets, "bf16"), workspace(batch)
    positions = cache.seq_lens - 1
    calls = sparse_calls(cache, list(cache.slots), positions, context, space)
    q = torch.randn(batch, HEADS, RANK, dtype=torch.bfloat16, device="cuda")
    rope, out = torch.randn(batch, HEADS, ROPE, dtype=torch.bfloat16, device="cuda"), torch.empty_like(q)

    def dense(i: int) -> None:
        latent_decode(
            q, rope, cache.pages, cache.page_table, cache.slots[i % num_sets], cache.seq_lens, 192**-0.5, out,
            workspace=space, max_seq_len=context,
        )  # fmt: skip

    return calls | {"dense": dense}, num_sets


def prefill_calls(num: int, context: int) -> tuple[Calls, int]:
    """A chunk; what absorbs its queries and expands its outputs is not timed."""
    cache = Cache([context], 1, "bf16")
    slots = cache.slots[0].expand(num).contiguous()
    positions = torch.arange(context - num, context, dtype=torch.int32, device="cuda")
    calls = sparse_calls(cache, [slots], positions, context, workspace(1))
    kv_b = torch.randn(HEADS, NOPE + V, RANK, dtype=torch.bfloat16, device="cuda") / RANK**0.5
    q = torch.randn(num, HEADS, NOPE + ROPE, dtype=torch.bfloat16, device="cuda")
    ends, out = torch.tensor([0, num], dtype=torch.int32, device="cuda"), q.new_empty(num, HEADS, V)

    def dense(_: int) -> None:
        latent_prefill(
            q, kv_b, cache.pages, cache.page_table, cache.slots[0], ends, cache.seq_lens, context, num, 192**-0.5, out
        )

    return calls | {"dense": dense}, 1


def floors(rows: int, num: int, context: int) -> dict[str, float]:
    """us, for `num` tokens of each row at the end of its context."""
    pairs = rows * (num * context - num * (num - 1) / 2)
    chosen = rows * num * min(TOP, context)
    per_pair = 2.0 * HEADS * (WIDTH + RANK if num == 1 else NOPE + ROPE + V)
    found = {
        "scores and choice": common.floor_us(2.0 * rows * context * INDEX_DIM, 2.0 * INDEX_HEADS * INDEX_DIM * pairs),
        "attention": common.floor_us(2.0 * WIDTH * min(chosen, rows * context), per_pair * chosen),
        "dense": common.floor_us(2.0 * WIDTH * rows * context, per_pair * pairs),
    }
    return found | {"sparse": found["scores and choice"] + found["attention"]}


def run(kind: str) -> Iterator[tuple[str, dict[str, object]]]:
    for a, b in DECODE if kind == "decode" else PREFILL:
        (calls, num_sets), context = (decode_calls if kind == "decode" else prefill_calls)(a, b), b >> 10
        name = f"decode b{a} {context}k" if kind == "decode" else f"prefill {a} of {context}k"
        floor = floors(a, 1, b) if kind == "decode" else floors(1, a, b)
        for part, call in calls.items():
            sizes = {"calls": max(4, num_sets)} if kind == "decode" else {"calls": 1, "repeats": 5}
            for i in range(num_sets):  # lists exist before what follows them is timed
                call(i)
            times = common.measure_us(call, **sizes)
            yield f"{name}: {part}", {"median": statistics.median(times), "floor": floor[part], "all": times}
        del calls, call
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["decode", "prefill"])
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.manual_seed(0)
    cases: dict[str, object] = {}
    for kind in ("decode", "prefill"):
        for name, case in run(kind) if options.only in (None, kind) else ():
            cases[name] = case
            print(f"{name:<40} us {case['median']:.4g} floor {case['floor']:.4g}", flush=True)
    shapes = {
        "heads": HEADS,
        "index heads": INDEX_HEADS,
        "index_head_dim": INDEX_DIM,
        "index_topk": TOP,
        "dtype": "bf16",
    }
    common.write(options.out, unit="us", shapes=shapes, repeats=15, cases=cases)


if __name__ == "__main__":
    main()
