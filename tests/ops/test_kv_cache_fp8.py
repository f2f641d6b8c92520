"""The FP8 paged write, reference and kernel: scales, requantisation, recycled pages, numbers that are not finite."""

from __future__ import annotations

import math

import pytest
import torch

from gossamer.ops.kv_cache import write_kv, write_kv_fp8
from gossamer.ops.kv_cache.reference import page_scale
from gossamer.ops.rope import rope_write_kv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E4M3 = torch.float8_e4m3fn
PAGE = 16
BACKENDS = ["reference", "triton"]
# Half a step of E4M3 relative to the number; below 2^-6 of the scale half the smallest step.
RELATIVE, ABSOLUTE = 2.0**-4, 2.0**-10


class Cache:
    """Pages that former owners left in the worst state: NaN in every byte and scale."""

    def __init__(self, num_slots: int, max_tokens: int, heads: int, dim: int) -> None:
        per_slot = -(-max_tokens // PAGE)
        num_pages = num_slots * per_slot + 3
        self.table = torch.randperm(num_pages, device=DEVICE)[: num_slots * per_slot].view(num_slots, per_slot).int()
        shape = (num_pages, heads, PAGE, dim)
        self.pages = [torch.full(shape, 255, dtype=torch.uint8, device=DEVICE).view(E4M3) for _ in range(2)]
        self.scales = [torch.full((num_pages, heads), torch.nan, device=DEVICE) for _ in range(2)]

    def write(self, kv: torch.Tensor, positions: list[int], slots: list[int], backend: str) -> None:
        ints = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (positions, slots)]
        write_kv_fp8(kv.to(DEVICE), *ints, self.table, *self.pages, *self.scales, backend=backend)

    def read(self, slot: int, length: int) -> torch.Tensor:
        """What the slot's tokens are now, fp64 [length, 2, heads, dim]."""
        ids = self.table[slot].long()
        planes = [
            (p[ids].double() * s[ids].double()[..., None, None]).transpose(1, 2).flatten(0, 1)[:length]
            for p, s in zip(self.pages, self.scales, strict=True)
        ]
        return torch.stack(planes, 1)

    def state(self) -> list[torch.Tensor]:
        return [*(p.view(torch.uint8) for p in self.pages), *(s.view(torch.int32) for s in self.scales)]


def stream(length: int, heads: int, dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Keys and values whose size changes from token to token by orders of magnitude."""
    size = torch.exp(torch.randn(length, 2, heads, 1) * 1.5)
    return (torch.randn(length, 2, heads, dim) * size).to(dtype)


def whole_scales(kv: torch.Tensor) -> torch.Tensor:
    """[pages, 2, heads]: by logarithms, not by bits."""
    padded = torch.cat((kv.double().abs(), kv.new_zeros(-len(kv) % PAGE, *kv.shape[1:]).double()))
    amax = padded.unflatten(0, (-1, PAGE)).amax((1, 4))
    return torch.exp2(torch.log2(amax.clamp_min(1e-300) / 448).ceil().clamp_min(-40))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunks", [[45], [1] * 20, [7, 1, 24, 13], [16, 16, 1]])
@pytest.mark.parametrize(("heads", "dim", "dtype"), [(2, 16, torch.float32), (1, 24, torch.float16)])
def test_a_page_holds_its_tokens_within_half_a_step_however_they_came(
    backend: str, chunks: list[int], heads: int, dim: int, dtype: torch.dtype
) -> None:
    cache, total = Cache(3, 48, heads, dim), sum(chunks)
    kv, other = stream(total, heads, dim, dtype), stream(len(chunks), heads, dim, dtype)
    before, start = [x.clone() for x in cache.state()], 0
    for step, length in enumerate(chunks):
        # A decode row ahead, a padded token with garbage behind.
        new = torch.cat((other[step : step + 1], kv[start : start + length], torch.full_like(kv[:1], torch.nan)))
        positions = [step, *range(start, start + length), 10**6]
        cache.write(new, positions, [2, *([1] * length), -1], backend)
        start += length
    for slot, expected in ((1, kv), (2, other)):
        found = cache.read(slot, len(expected)).cpu()
        scales = whole_scales(expected)
        ids = cache.table[slot, : len(scales)].long()
        assert torch.stack([s[ids] for s in cache.scales], 1).cpu().double().equal(scales)
        # A number that rounded to a step of a smaller scale may round once more: that many smallest steps.
        bound = expected.double().abs() * RELATIVE + scales.repeat_interleave(PAGE, 0)[: len(found), ..., None] * (
            2 * ABSOLUTE
        )
        assert ((found - expected.double()).abs() <= bound).all()
        # But for those, numbers are what they would be had all tokens come at once.
        scale = scales.repeat_interleave(PAGE, 0)[: len(found), ..., None].expand_as(found)
        direct = (expected.double() / scale).float().to(E4M3).double() * scale
        normal = expected.double().abs() >= scale * 2.0**-6
        assert found[normal].equal(direct[normal])
    touched = torch.cat([cache.table[1, : -(-total // PAGE)], cache.table[2, : -(-len(chunks) // PAGE)]]).long()
    rest = torch.ones(len(cache.scales[0]), dtype=torch.bool, device=DEVICE).index_fill_(0, touched, False)
    for old, now in zip(before, cache.state(), strict=True):
        assert old[rest].equal(now[rest])


@pytest.mark.parametrize("chunks", [[33], [5, 12, 1, 15], [1] * 18])
def test_the_kernel_equals_the_reference_to_the_bit(chunks: list[int]) -> None:
    kv = stream(sum(chunks), 2, 16)
    kv[2, 0, 0, 3], kv[3, 1, 1, 0], kv[4, 0, 1, 1] = math.nan, math.inf, -math.inf
    kv[5:7] = 0.0
    caches = [Cache(1, 48, 2, 16) for _ in BACKENDS]
    caches[1].table = caches[0].table
    start = 0
    for length in chunks:
        for cache, backend in zip(caches, BACKENDS, strict=True):
            positions = list(range(start, start + length))
            cache.write(kv[start : start + length], positions, [0] * length, backend)
        start += length
    ids = caches[0].table[0, : -(-start // PAGE)].long()
    # The reference leaves zeros behind the last token, the kernel what was there.
    a, b = (cache.read(0, start) for cache in caches)
    assert a.nan_to_num(1e9).equal(b.nan_to_num(1e9))
    assert int(a.isnan().sum()) == 3
    for one, other in zip(caches[0].scales, caches[1].scales, strict=True):
        assert one[ids].equal(other[ids])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_larger_scale_costs_nothing_but_underflow(backend: str) -> None:
    cache = Cache(1, PAGE, 1, 256)
    # Every positive E4M3 number, then ones that need scales of 2, 16 and 2^11.
    codes = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    kv = torch.zeros(4, 2, 1, 256)
    kv[0, :, 0, :127], kv[0, :, 0, 127:254] = codes, -codes
    kv[1:, :, 0, 0] = torch.tensor([449.0, 7000.0, 448.0 * 2048])[:, None]
    for t, scale in enumerate((1.0, 2.0, 16.0, 2048.0)):
        cache.write(kv[t : t + 1], [t], [0], backend)
        page = int(cache.table[0, 0])
        assert cache.scales[0][page].item() == cache.scales[1][page].item() == scale
        found = cache.read(0, 1)[0, 0, 0].cpu()
        normal = kv[0, 0, 0].abs() >= scale * 2.0**-6
        assert found[normal].equal(kv[0, 0, 0].double()[normal])
        assert ((found - kv[0, 0, 0].double()).abs() <= scale * 2.0**-9).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_leave_room_for_small_numbers(backend: str) -> None:
    cache = Cache(1, PAGE, 1, 16)
    small = torch.full((1, 2, 1, 16), 3e-5)
    cache.write(torch.zeros(1, 2, 1, 16), [0], [0], backend)
    assert not cache.read(0, 1).any()
    cache.write(small, [1], [0], backend)
    assert ((cache.read(0, 2)[1].cpu() / small[0] - 1).abs() < RELATIVE).all()


def test_scales_at_the_edges() -> None:
    amax = torch.tensor([448.0, 448.0001, 1e-30, 0.0, 3.4028e38, 2.0**-140, 1.0, 1.75, 1.7501])
    expected = torch.tensor([1.0, 2.0, 2.0**-40, 2.0**-40, 2.0**120, 2.0**-40, 2.0**-8, 2.0**-8, 2.0**-7])
    assert page_scale(amax).equal(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rope_writes_what_an_unquantised_cache_would_hold(backend: str) -> None:
    tokens, num_q, num_kv, dim = 21, 3, 2, 16
    qkv = stream(tokens, 4, dim, torch.float16).flatten(1)[:, : (num_q + 2 * num_kv) * dim].contiguous()
    qkv[-1] = math.nan
    angle = torch.rand(64, dim // 2) * 6
    tables = [torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)]
    slots = torch.tensor([1] * (tokens - 3) + [0, 2, -1], dtype=torch.int32, device=DEVICE)
    positions = torch.tensor([*range(tokens - 3), 0, 32, 10**6], dtype=torch.int32, device=DEVICE)
    cache, q = Cache(3, 48, num_kv, dim), torch.empty(2, tokens, num_q, dim, dtype=torch.float16, device=DEVICE)
    plain = [torch.zeros(p.shape, dtype=torch.float16, device=DEVICE) for p in cache.pages]
    args = [x.to(DEVICE) for x in (qkv, *tables)]
    for out, pages, scales in (
        (q[0], plain, {}),
        (q[1], cache.pages, {"k_scales": cache.scales[0], "v_scales": cache.scales[1]}),
    ):
        rope_write_kv(
            args[0],
            num_q,
            num_kv,
            dim,
            *args[1:],
            positions,
            slots,
            cache.table,
            *pages,
            out,
            **scales,
            backend=backend,
        )
    assert q[0].equal(q[1])
    live = slots >= 0
    page, at = cache.table[slots[live].long(), positions[live].long() // PAGE].long(), positions[live].long() % PAGE
    kept = torch.stack([p[page, :, at] for p in plain], 1)
    other = Cache(3, 48, num_kv, dim)
    other.table = cache.table
    other.write(kept, positions[live].tolist(), slots[live].tolist(), backend)
    for one, two in zip(cache.pages, other.pages, strict=True):
        assert one.view(torch.uint8)[page, :, at].equal(two.view(torch.uint8)[page, :, at])
    assert cache.scales[0][page].equal(other.scales[0][page])
    assert cache.scales[1][page].equal(other.scales[1][page])


@pytest.mark.parametrize(
    ("num_q", "num_kv", "dim", "num_slots", "norm", "dtype"),
    [
        (5, 3, 16, 3, "", torch.float32), (2, 1, 16, 65, "", torch.float32), (4, 2, 32, 5, "head", torch.bfloat16),
        (4, 2, 16, 4, "full", torch.bfloat16),
    ],
)  # fmt: skip
def test_steps_of_single_tokens_write_in_one_launch_what_two_do(
    num_q: int, num_kv: int, dim: int, num_slots: int, norm: str, dtype: torch.dtype
) -> None:
    """Pages, scales and queries to the bit, while scales grow, NaN comes, and rows are padding."""
    whole = norm == "full"
    norms = [torch.randn(dim * (n if whole else 1), device=DEVICE).to(dtype) for n in (num_q, num_kv)] if norm else []
    options = dict(zip(("q_norm", "k_norm"), norms, strict=False)) | {"norm_full": whole}
    caches = [Cache(num_slots, 2 * PAGE, num_kv, dim) for _ in range(2)]
    caches[1].table = caches[0].table
    cos, sin = (torch.randn(2 * PAGE, dim // 2 if norm else dim, device=DEVICE) for _ in range(2))
    rows = torch.arange(num_slots, dtype=torch.int32, device=DEVICE)
    positions = rows * 5 % PAGE  # a page's start in some rows, its end in others
    past = [(slot, at) for slot, end in enumerate(positions.tolist()) for at in range(end)]
    history = stream(len(past), num_kv, dim)
    for cache in caches:
        cache.write(history, [at for _, at in past], [slot for slot, _ in past], "reference")
    for step in range(8 if num_slots < 65 else 2):
        live = (rows + step) % 5 > 0
        slots = torch.where(live, rows, -1)
        qkv = torch.randn(num_slots, (num_q + 2 * num_kv) * dim, device=DEVICE) * 2.0**step
        qkv[0, -1], qkv[2, -2] = (torch.nan, 1e15 if norm else 1e30) if step == 2 else (0.0, 0.0)
        qkv = qkv.to(dtype)
        queries = [torch.full((num_slots, num_q, dim), torch.nan, device=DEVICE, dtype=dtype) for _ in range(2)]
        for cache, single, q in zip(caches, (False, True), queries, strict=True):
            rope_write_kv(
                qkv, num_q, num_kv, dim, cos, sin, positions, slots, cache.table, *cache.pages, q,
                k_scales=cache.scales[0], v_scales=cache.scales[1], single=single, **options, backend="triton",
            )  # fmt: skip
        positions = positions + live.int()
        assert queries[0].equal(queries[1])
        for one, two in zip(caches[0].pages + caches[0].scales, caches[1].pages + caches[1].scales, strict=True):
            assert one.view(torch.uint8).equal(two.view(torch.uint8))


@pytest.mark.parametrize("heads_first", [False, True])
def test_the_list_of_slots_writes_the_same_and_zeroes_fresh_tails(heads_first: bool) -> None:
    cache, kv = Cache(1, 32, 2, 16), stream(21, 2, 16)
    pages = [torch.full((2, 5, PAGE, 16) if heads_first else (5, 2, PAGE, 16), torch.nan).to(E4M3) for _ in range(2)]
    if heads_first:
        pages = [p.transpose(0, 1) for p in pages]
    k_scales, v_scales = (torch.full((5, 2), torch.nan) for _ in range(2))
    for low, high in ((0, 5), (5, 6), (6, 21)):
        slots = torch.arange(low, high) + PAGE
        write_kv(*kv[low:high].unbind(1), *pages, slots, k_scales=k_scales, v_scales=v_scales)
        cache.write(kv[low:high], list(range(low, high)), [0] * (high - low), "reference")
    for i, scales in enumerate((k_scales, v_scales)):
        found = (pages[i][1:3].float() * scales[1:3, :, None, None]).transpose(1, 2).flatten(0, 1)
        assert found[:21].double().equal(cache.read(0, 21)[:, i].cpu())
        assert not found[21:].any()
        assert pages[i][0].float().isnan().all()


def test_no_tokens_and_wrong_tensors() -> None:
    cache = Cache(1, 16, 2, 16)
    for backend in BACKENDS:
        cache.write(torch.empty(0, 2, 2, 16), [], [], backend)
    with pytest.raises(ValueError, match=r"kv \[1, 2, 1, 16\]"):
        cache.write(torch.empty(1, 2, 1, 16), [0], [0], "reference")
    new, scales, pages = torch.empty(1, 2, 2, 16), cache.scales[0], cache.pages[1]
    cache.scales[0] = scales.double()
    with pytest.raises(ValueError, match=r"scales torch.float64"):
        cache.write(new, [0], [0], "reference")
    cache.scales[0], cache.pages[1] = scales, pages.float()
    with pytest.raises(ValueError, match=r"pages of torch.float32 with scales"):
        cache.write(new, [0], [0], "reference")


@pytest.mark.gpu
@pytest.mark.parametrize("chunks", [[3000], [700, 1, 1, 1300, 65], [1] * 40])
def test_bf16_on_the_device(chunks: list[int]) -> None:
    kv = stream(sum(chunks), 4, 128, torch.bfloat16)
    caches = [Cache(1, 3072, 4, 128) for _ in BACKENDS]
    caches[1].table = caches[0].table
    start = 0
    for length in chunks:
        for cache, backend in zip(caches, BACKENDS, strict=True):
            positions = list(range(start, start + length))
            cache.write(kv[start : start + length], positions, [0] * length, backend)
        start += length
    assert caches[0].read(0, start).equal(caches[1].read(0, start))


@pytest.mark.gpu
def test_a_captured_write_follows_its_inputs() -> None:
    kv = stream(40, 4, 128, torch.bfloat16).to(DEVICE)
    caches = [Cache(1, 64, 4, 128) for _ in range(2)]
    caches[1].table = caches[0].table
    new, ints = kv[:1].clone(), torch.zeros(2, 1, dtype=torch.int32, device=DEVICE)

    def step() -> None:
        write_kv_fp8(new, ints[0], ints[1], caches[0].table, *caches[0].pages, *caches[0].scales)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for t in range(40):
        new.copy_(kv[t : t + 1])
        ints[0].fill_(t)
        graph.replay()
        caches[1].write(kv[t : t + 1], [t], [0], "triton")
    assert caches[0].read(0, 40).equal(caches[1].read(0, 40))
