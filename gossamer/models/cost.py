"""What a step costs: its FLOPs and bytes, from the model's shapes, its weight format and its attention kind.

Figures of use (MFU, MBU) and floors divide by these, so they count the work that the model asks for, once, and
nothing that an implementation adds.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from math import prod

from gossamer.config import ModelConfig
from gossamer.core import OpCost
from gossamer.layers.attention.base import AttentionBatch, AttentionKind
from gossamer.layers.linear import WeightFormat
from gossamer.models.shapes import canonical_weights


def bytes_per_weight(fmt: WeightFormat, template: str = "layers.{i}.mlp.up.weight") -> float:
    """Bytes of one element of a matrix, scales included: quantised are projections, and the head unless FP8."""
    # MLA's kv_b is held dense, for it is multiplied head by head.
    never = template in ("embed.weight", *(["lm_head.weight"] if fmt.quantization == "fp8" else []))
    if never or "router" in template or ".kv_b." in template:
        return fmt.dtype.itemsize
    stored = {"none": fmt.dtype.itemsize, "int8": 1.0, "int4": 0.5 + 2 * fmt.dtype.itemsize / 32, "fp8": 1 + 4 / 128**2}
    return stored[fmt.quantization]


class StepCost:
    """The cost of any step of one model: a call takes microseconds, as long as decode rows are few hundred.

    FLOPs: 2 per weight and token (of the routed experts top_k), the head for rows that sample, and the attention
    kind's own. Bytes: every weight that the step needs, read once, a token's row of the embedding, and the attention
    kind's own; of a layer's experts those that are touched. Activations between layers are not counted.
    """

    def __init__(self, config: ModelConfig, kind: AttentionKind, fmt: WeightFormat, kv_itemsize: int) -> None:
        sizes: defaultdict[str, float] = defaultdict(float)
        read: defaultdict[str, float] = defaultdict(float)
        for weight in canonical_weights(config):
            part = "experts" if ".experts." in weight.template else weight.template
            part = part if part in ("experts", "embed.weight", "lm_head.weight") else "dense"
            matrix = len(weight.shape) == 2
            # Compression multiplies once for each head and stride of tokens.
            sparse = config.sparse if ".compress_" in weight.template else None
            uses = 1.0 if sparse is None else 4 * config.num_kv_heads / sparse.block_size
            sizes[part] += prod(weight.shape) * uses if matrix else 0
            read[part] += prod(weight.shape) * (
                bytes_per_weight(fmt, weight.template) if matrix else fmt.dtype.itemsize
            )
        moe = config.moe
        self._config, self._kind = config, kind
        self._itemsize, self._kv_itemsize = fmt.dtype.itemsize, kv_itemsize
        self._moe_layers = config.num_kv_layers - len(moe.dense_layers) if moe else 0
        share = moe.top_k / moe.num_experts if moe else 0.0
        self._miss = 1.0 - share
        self._num_experts = moe.num_experts if moe else 1
        self._token_flops = 2.0 * (sizes["dense"] + share * sizes["experts"])
        self._dense_bytes, self._expert_bytes = read["dense"], read["experts"]
        times = 1 + config.num_draft_layers  # a draft layer has no embedding and head of its own
        self._embed_bytes = float(times * config.hidden_size * fmt.dtype.itemsize)
        head_size = times * config.vocab_size * config.hidden_size
        self._head_flops = 2.0 * head_size
        self._head_bytes = head_size * bytes_per_weight(fmt, "lm_head.weight")
        # Layers with equal windows cost the same, with an indexer or without.
        kinds = [(config.sliding_window(layer), config.has_index(layer)) for layer in range(config.num_kv_layers)]
        self._layers = [(kinds.index(kind), count) for kind, count in Counter(kinds).items()]

    def expected_experts(self, num_tokens: int) -> float:
        """Distinct experts that a layer's tokens touch if each chooses its top k evenly: E (1 - (1 - k / E)^tokens)."""
        return self._num_experts * (1.0 - self._miss**num_tokens)

    def __call__(
        self, num_decode: int, starts: Sequence[int], lengths: Sequence[int], num_sampled: int,
        experts_touched: float | None = None,
    ) -> OpCost:  # fmt: skip
        """One step: row i has lengths[i] new tokens from position starts[i] on; the first num_decode rows have one.

        `experts_touched` is the measured mean per MoE layer; without it, the expectation under even routing.
        """
        num_tokens = num_decode + sum(lengths[num_decode:])
        flops = num_tokens * self._token_flops
        moved = self._dense_bytes + num_tokens * self._embed_bytes
        if num_sampled:
            flops += num_sampled * self._head_flops
            moved += self._head_bytes
        if self._moe_layers:
            touched = self.expected_experts(num_tokens) if experts_touched is None else experts_touched
            moved += self._expert_bytes * touched / self._num_experts
        batch = AttentionBatch(num_decode, list(starts), list(lengths), (), 0)
        for layer, count in self._layers:
            cost = self._kind.cost(self._config, layer, batch, self._itemsize, self._kv_itemsize)
            flops += count * cost.flops
            moved += count * cost.bytes
        return OpCost(flops, moved)
