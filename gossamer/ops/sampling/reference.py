"""Sampling in plain torch, vectorised over rows; serves CPU and CUDA tensors alike.

Filters are prefixes of one total order (value falling, then id rising), so results do not depend on a sort's
stability or on the other rows of the batch. Long sums run in float64.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this are greedy: dividing by them would leave one token with probability 1 anyway."""

UNIFORM_TOLERANCE = 4e-6
"""How far float32 weights may move a step of the cumulative distribution: an exponent's rounding, 2**-24 of it, over
the exponents that carry the mass (up to the log of the vocabulary, about 12), twice, and the exponential's own."""

_BLOCK = 128
# Few nuclei hold more tokens than this; those that do cost a CPU five times as much.
_PROBE = 128


def argmax(logits: Tensor) -> Tensor:
    """Index of each row's largest value, the lowest of equals: int64 [num_rows] of [num_rows, vocab]."""
    if logits.is_cuda or logits.dtype != torch.float32:
        return logits.argmax(-1)
    # numpy's is vectorised, and an order of magnitude faster than torch's on a CPU.
    return torch.from_numpy(logits.detach().numpy().argmax(-1))


def apply_penalties(
    logits: Tensor, prompt_mask: Tensor, output_counts: Tensor, presence: Tensor, frequency: Tensor, repetition: Tensor
) -> Tensor:
    """Lowers the logits of tokens that have occurred (OpenAI's presence and frequency, CTRL's repetition penalty).

    Tokens of prompt or output: a positive logit is divided by `repetition`, a negative one multiplied. Then those of
    the output alone lose `frequency` per occurrence and `presence` once.

    Args:
        logits: float32 [num_rows, vocab].
        prompt_mask: bool [num_rows, vocab], true where the prompt has the token.
        output_counts: int32 [num_rows, vocab].
        presence, frequency, repetition: float32 [num_rows], CPU tensors: penalties that no row has cost nothing.
    Returns: float32 [num_rows, vocab]; `logits` is not modified.
    """
    out = logits
    seen = output_counts > 0
    if bool((repetition != 1.0).any()):
        factor = torch.where(prompt_mask | seen, repetition.to(out.device, non_blocking=True).unsqueeze(1), 1.0)
        out = torch.where(out > 0, out / factor, out * factor)
    if bool((frequency != 0.0).any()):
        out = out - output_counts * frequency.to(out.device, non_blocking=True).unsqueeze(1)
    if bool((presence != 0.0).any()):
        out = out - seen * presence.to(out.device, non_blocking=True).unsqueeze(1)
    return out


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """Draws one token per row: temperature, then min_p, top_k and top_p, each renormalised over what the last left.

    The parameters are CPU tensors, for they decide on the host what work is needed at all (greedy rows: an argmax;
    neither top_k nor top_p: no ordering). A row's token depends on its own logits and parameters alone.

    Args:
        logits: float32 [num_rows, vocab], on any device.
        temperature: float64 [num_rows]; below 1e-5 is greedy.
        top_k: int64 [num_rows]; below 1 or at least vocab is off. Ties go to the lowest ids: top_k=1 is greedy.
        top_p: float64 [num_rows] in (0, 1]: keeps tokens while the mass of the more likely ones is below it.
        min_p: float64 [num_rows] in [0, 1]: keeps tokens at least this times as likely as the likeliest.
        uniform: float64 [num_rows] in [0, 1): the only randomness.
    Returns: int64 [num_rows]; -1 where the row's largest logit is not finite, so that nothing can be drawn.
    """
    num_rows = logits.shape[0]
    parameters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "uniform": uniform}
    for name, value in parameters.items():
        if value.shape != (num_rows,) or value.is_cuda:
            raise ValueError(f"{name} must be a CPU tensor of shape [{num_rows}], got {list(value.shape)}")
    if num_rows == 0:
        return torch.empty(0, dtype=torch.int64, device=logits.device)
    greedy = temperature < GREEDY_TEMPERATURE
    if bool(greedy.all()):
        return _mark_invalid(argmax(logits), logits)
    limited = ~greedy & (top_k > 0) & (top_k < logits.shape[1])
    nucleus = ~greedy & ~limited & (top_p < 1.0)
    out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    # How a row is drawn follows from its own parameters alone, so its token cannot depend on its neighbours'.
    for chosen, draw in (
        (greedy, _sample_greedy),
        (limited, _sample_top_k),
        (nucleus, _sample_nucleus),
        (~(greedy | limited | nucleus), _sample_plain),
    ):
        rows = chosen.nonzero().squeeze(1)
        if len(rows) == 0:
            continue
        on_device = rows.to(out.device, non_blocking=True)
        part = logits if len(rows) == len(out) else logits.index_select(0, on_device)
        token_ids = draw(part, temperature[rows], top_k[rows], top_p[rows], min_p[rows], uniform[rows])
        out[on_device] = _mark_invalid(token_ids, part)
    return out


def uniform(seeds: NDArray[np.uint64], output_index: NDArray[np.int64]) -> NDArray[np.float64]:
    """Number `output_index` of each seed's stream, in [0, 1): 53 bits, a hash (modulo 2**64) of the two alone."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    step = (output_index.astype(np.uint64) + np.uint64(1)) * golden
    return (_mix(_mix(seeds + golden) + step) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample_slots(
    logits: Tensor, slots: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor,
    output_index: Tensor, last_token: Tensor, out: Tensor,
) -> Tensor:  # fmt: skip
    """Waits for the device: the parameters of `sample` are host values."""
    real = (slots >= 0).nonzero().squeeze(1)
    slot = slots[real].long()
    t, k, p, least = (value[slot].cpu() for value in (temperature, top_k.long(), top_p, min_p))
    numbers = uniform(seed[slot].cpu().numpy().view(np.uint64), output_index[real].cpu().long().numpy())
    out.fill_(-1)
    if len(real) > 0:
        out[real] = sample(logits[real].float(), t, k, p, least, torch.from_numpy(numbers))
        last_token[slot] = out[real].clamp_min(0)
    return out


def top_tokens(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row, falling, and their ids; equal logits by rising id.

    Args: logits: float32 [num_rows, vocab] without NaN. k: at least 1; more than vocab means vocab.
    Returns: values float32 and ids int64, both [num_rows, min(k, vocab)].
    """
    num_rows, vocab = logits.shape
    k = min(k, vocab)
    width = next((w for w in (32, 8) if vocab % w == 0 and k * w * 4 <= vocab), None)
    if width is None or logits.is_cuda:
        keys = _order_keys(logits, torch.arange(vocab, device=logits.device))
    else:
        # The k blocks with the largest maxima hold the k largest values; equal maxima are ranked by block, hence
        # by id, so ties come out as they would from the whole row.
        blocks = logits.view(num_rows, -1, width)
        maxima = blocks.amax(-1)
        block_keys = _order_keys(maxima, torch.arange(maxima.shape[1]))
        best = _ids_of(block_keys.topk(k, sorted=False).values)
        kept = blocks.gather(1, best.unsqueeze(2).expand(-1, -1, width)).view(num_rows, -1)
        ids = (best.unsqueeze(2) * width + torch.arange(width)).view(num_rows, -1)
        keys = _order_keys(kept, ids)
    top = keys.topk(k).values if k * 4 <= keys.shape[1] else keys.sort(descending=True).values[:, :k]
    ids = _ids_of(top)
    return logits.gather(1, ids), ids


def token_logprobs(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-softmax of logits float32 [num_rows, vocab] at token_ids int64 [num_rows] and the k (0 to vocab) likeliest.

    Returns: ids int64, log-probabilities float32 and 1-based ranks int64, each [num_rows, 1 + k], the given token
        first. Ranks order equal values by rising id.
    """
    num_rows, vocab = logits.shape
    chosen_ids = token_ids.unsqueeze(1)
    chosen = logits.gather(1, chosen_ids)
    ids_below = torch.arange(vocab, device=logits.device) < chosen_ids
    rank = 1 + ((logits > chosen) | ((logits == chosen) & ids_below)).sum(-1, keepdim=True)
    top, top_ids = top_tokens(logits, k) if k > 0 else (chosen[:, :0], chosen_ids[:, :0])
    top_ranks = torch.arange(1, top.shape[1] + 1, device=logits.device).expand(num_rows, -1)
    values = torch.cat((chosen, top), 1) - logits.logsumexp(-1, keepdim=True)
    return torch.cat((chosen_ids, top_ids), 1), values, torch.cat((rank, top_ranks), 1)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014): a bijection that spreads every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mark_invalid(token_ids: Tensor, logits: Tensor) -> Tensor:
    """-1 for rows whose maximum is NaN or +inf, which win every comparison, or -inf: no token is allowed."""
    return torch.where(logits.amax(-1).isfinite(), token_ids, -1)


def _sample_greedy(logits: Tensor, *_: Tensor) -> Tensor:
    return argmax(logits)


def _sample_top_k(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    values, ids = top_tokens(logits, int(top_k.max()))
    inverse, mass, floor, limit, draw = _columns(logits.device, 1.0 / temperature, top_p, min_p, top_k, uniform)
    weights = ((values.double() - values[:, :1].double()) * inverse).exp_()
    within = torch.arange(values.shape[1], device=logits.device) < limit
    weights = torch.where(within & (weights >= floor), weights, 0.0)
    bounds = weights.cumsum(-1)
    return _draw_prefix(weights, bounds, ids, mass * bounds[:, -1:], draw)


def _sample_nucleus(
    logits: Tensor, temperature: Tensor, _top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    weights = _probabilities(logits, temperature, min_p)
    mass, draw = _columns(logits.device, top_p, uniform)
    target = mass * _block_sums(weights)[1].sum(-1, keepdim=True)
    values, ids = top_tokens(weights, _PROBE)
    bounds = values.cumsum(-1, dtype=torch.float64)
    token_ids = _draw_prefix(values.double(), bounds, ids, target, draw)
    is_wide = (bounds[:, -1:] < target).squeeze(1)
    if weights.is_cuda:  # whether any row is wide would have to be known on the host, which would stall the queue
        return torch.where(is_wide, _draw_blocks(_cut_nucleus(weights, target), draw), token_ids)
    wide = is_wide.nonzero().squeeze(1)
    if len(wide) > 0:
        token_ids[wide] = _draw_blocks(_cut_nucleus(weights[wide], target[wide]), draw[wide])
    return token_ids


def _sample_plain(
    logits: Tensor, temperature: Tensor, _top_k: Tensor, _top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    return _draw_blocks(_probabilities(logits, temperature, min_p), *_columns(logits.device, uniform))


def _columns(device: torch.device, *values: Tensor) -> tuple[Tensor, ...]:
    return tuple(v.to(device, torch.float64, non_blocking=True).unsqueeze(1) for v in values)


def _probabilities(logits: Tensor, temperature: Tensor, min_p: Tensor) -> Tensor:
    """Weights [num_rows, vocab] that sum to about 1 before min_p sets those of the tokens it removes to zero."""
    inverse = (1.0 / temperature).to(logits.device, torch.float32, non_blocking=True).unsqueeze(1)
    weights = (logits - logits.amax(-1, keepdim=True)).mul_(inverse).softmax(-1)
    if bool((min_p > 0).any()):
        floor = min_p.to(logits.device, torch.float32, non_blocking=True).unsqueeze(1)
        weights.masked_fill_(weights < floor * weights.amax(-1, keepdim=True), 0.0)
    return weights


def _cut_nucleus(weights: Tensor, target: Tensor) -> Tensor:
    """Zeroes every weight that the heavier ones already sum to `target` [num_rows, 1] without.

    A radix selection by mass over the bits of the weights, whose order is that of the non-negative floats: three
    histograms instead of a sort of the vocabulary.
    """
    bits = weights.view(torch.int32)
    inside, need = weights.double(), target
    cut = torch.zeros_like(target, dtype=torch.int32)
    for shift, size in ((21, 1 << 10), (10, 1 << 11), (0, 1 << 10)):
        digits = (bits >> shift) & (size - 1)
        histogram = torch.zeros(len(weights), size, dtype=torch.float64, device=weights.device)
        histogram.scatter_add_(1, digits.long(), inside)
        falling = histogram.flip(1).cumsum(1)
        index = torch.searchsorted(falling, need).clamp_max_(size - 1)
        need = need - torch.where(index > 0, falling.gather(1, (index - 1).clamp_min(0)), 0.0)
        digit = (size - 1 - index).int()
        cut = cut | (digit << shift)
        inside = torch.where(digits == digit, inside, 0.0)
    # Of the tokens at the cut itself, the lowest ids stay, as many as the mass still needs.
    ties = bits == cut
    num_ties = (need / cut.view(torch.float32)).ceil()
    return torch.where((bits > cut) | (ties & (ties.cumsum(1) <= num_ties)), weights, 0.0)


def _draw_prefix(weights: Tensor, bounds: Tensor, ids: Tensor, target: Tensor, uniform: Tensor) -> Tensor:
    """Draws from the leading `weights` (falling; `bounds` their sums) that do not already sum to `target` before."""
    before = torch.nn.functional.pad(bounds[:, :-1], (1, 0))
    kept = torch.where(before < target, weights, 0.0).cumsum(-1)
    return ids.gather(1, _first_above(kept, uniform * kept[:, -1:])).squeeze(1)


def _draw_blocks(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draws a token in proportion to its weight: first a block of the vocabulary, then a token of the block."""
    blocks, sums = _block_sums(weights)
    bounds = sums.cumsum(-1)
    target = uniform * bounds[:, -1:]
    block = _first_above(bounds, target)
    before = torch.where(block > 0, bounds.gather(1, (block - 1).clamp_min(0)), 0.0)
    inside = blocks.gather(1, block.unsqueeze(2).expand(-1, 1, _BLOCK)).squeeze(1).cumsum(-1, dtype=torch.float64)
    return (block * _BLOCK + _first_above(inside, target - before)).squeeze(1)


def _block_sums(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The weights in blocks [num_rows, num_blocks, 128] and the blocks' sums, float64 [num_rows, num_blocks].

    Within a block float32 is exact enough, and spares a float64 copy of everything, which would double the time.
    """
    num_rows, vocab = weights.shape
    if vocab % _BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -vocab % _BLOCK))
    blocks = weights.view(num_rows, -1, _BLOCK)
    return blocks, blocks.sum(-1).double()


def _first_above(bounds: Tensor, target: Tensor) -> Tensor:
    """Index [num_rows, 1] of the first of the rising `bounds` that exceeds `target`.

    Rounding may put the target a little too high; the last entry that adds weight is then the answer, so a token of
    weight zero is never drawn.
    """
    target = torch.minimum(target, torch.nextafter(bounds[:, -1:], torch.zeros_like(target)))
    return torch.searchsorted(bounds, target, right=True).clamp_max_(bounds.shape[1] - 1)


def _order_keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 keys that order float32 `values` (rising) and then `ids` (falling), which must be below 2**32."""
    bits = (values.float() + 0.0).view(torch.int32)  # adding zero makes -0.0 equal to 0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(torch.int64) << 32) + (0xFFFFFFFF - ids)


def _ids_of(keys: Tensor) -> Tensor:
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF)
