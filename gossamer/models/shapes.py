"""The canonical weight stream: which tensors a decoder has, under which names, in which shapes and order.

Torch-free, so that memory can be planned and a checkpoint refused before torch is imported or any data is read.
"""

from collections.abc import Iterator
from typing import NamedTuple

from gossamer.config import IndexConfig, MLAConfig, ModelConfig, NSAConfig

Shape = tuple[int, ...]


class CanonicalWeight(NamedTuple):
    template: str
    layer: int
    expert: int
    shape: Shape

    @property
    def name(self) -> str:
        return self.template.format(i=self.layer, e=self.expert)


def canonical_weights(config: ModelConfig) -> Iterator[CanonicalWeight]:
    """Every weight of the decoder in the order of the stream: embedding, layer by layer, final norm, head.

    Draft layers follow the last layer; embedding and head are the model's.
    """
    hidden, vocab = config.hidden_size, config.vocab_size
    experts = list(_mlp("moe.experts.{e}", config.moe.intermediate_size, hidden)) if config.moe else []
    yield CanonicalWeight("embed.weight", 0, 0, (vocab, hidden))
    for layer in range(config.num_kv_layers):
        moe = config.moe if config.moe is not None and layer not in config.moe.dense_layers else None
        weights = [*_attention(config, layer), ("mlp_norm.weight", (hidden,))]
        if layer >= config.num_layers:
            weights += [(f"mtp.{norm}.weight", (hidden,)) for norm in ("enorm", "hnorm", "norm")]
            weights.append(("mtp.eh_proj.weight", (hidden, 2 * hidden)))
        if moe is None:
            weights += _mlp("mlp", config.intermediate_size, hidden, config.mlp_bias)
        else:
            weights.append(("moe.router.weight", (moe.num_experts, hidden)))
            weights += [("moe.router.bias", (moe.num_experts,))] if moe.choice_bias else []
            shared = moe.shared_width or moe.num_shared * moe.intermediate_size
            weights += _mlp("moe.shared", shared, hidden) if shared else []
        for name, shape in weights:
            yield CanonicalWeight(f"layers.{{i}}.{name}", layer, 0, shape)
        for expert in range(moe.num_experts if moe else 0):
            for name, shape in experts:
                yield CanonicalWeight(f"layers.{{i}}.{name}", layer, expert, shape)
    yield CanonicalWeight("final_norm.weight", 0, 0, (hidden,))
    if not config.tie_word_embeddings:
        yield CanonicalWeight("lm_head.weight", 0, 0, (vocab, hidden))


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Canonical names and shapes, in the order of the stream."""
    return {weight.name: weight.shape for weight in canonical_weights(config)}


def _attention(c: ModelConfig, layer: int) -> Iterator[tuple[str, Shape]]:
    q_size, kv_size = c.num_q_heads * c.head_dim, c.num_kv_heads * c.head_dim
    yield "attn_norm.weight", (c.hidden_size,)
    if c.mla is not None:
        yield from _latent_attention(c, c.mla)
        if c.index is not None and c.has_index(layer):
            yield from _indexer(c, c.index)
        return
    for name, rows in (("q", q_size), ("k", kv_size), ("v", kv_size)):
        yield from _linear(f"attn.{name}", rows, c.hidden_size, c.qkv_bias)
    if c.qk_norm != "none":
        whole = c.qk_norm == "full"
        yield "attn.q_norm.weight", (q_size if whole else c.head_dim,)
        yield "attn.k_norm.weight", (kv_size if whole else c.head_dim,)
    if c.index is not None and c.has_index(layer):
        yield from _indexer(c, c.index)
    if c.nsa is not None and c.sparse is not None:
        yield from _native_sparse_attention(c, c.nsa, c.sparse.block_size // 2 * c.head_dim)
    yield from _linear("attn.o", c.hidden_size, q_size, c.o_bias)


def _native_sparse_attention(c: ModelConfig, nsa: NSAConfig, span: int) -> Iterator[tuple[str, Shape]]:
    """span: numbers that a compression MLP takes, token by token, to which their positions' embedding is added."""
    yield "attn.branch_gate.weight", (3 * c.num_q_heads, c.hidden_size)
    for kind in "kv":
        yield f"attn.compress_{kind}.position.weight", (span,)
        yield f"attn.compress_{kind}.in_proj.weight", (nsa.compress_width, span)
        yield f"attn.compress_{kind}.out_proj.weight", (c.head_dim, nsa.compress_width)
    for name in () if nsa.shared_kv else ("window.k", "window.v", "compressed.k", "compressed.v"):
        yield from _linear(f"attn.{name}_proj", c.num_kv_heads * c.head_dim, c.hidden_size, c.qkv_bias)


def _latent_attention(c: ModelConfig, mla: MLAConfig) -> Iterator[tuple[str, Shape]]:
    q_size, rank = c.num_q_heads * c.head_dim, mla.q_lora_rank
    if rank is None:
        yield "attn.q.weight", (q_size, c.hidden_size)
    else:
        yield "attn.q_a.weight", (rank, c.hidden_size)
        yield "attn.q_a_norm.weight", (rank,)
        yield "attn.q_b.weight", (q_size, rank)
    yield "attn.kv_a.weight", (mla.kv_lora_rank + mla.rope_dim, c.hidden_size)
    yield "attn.kv_a_norm.weight", (mla.kv_lora_rank,)
    yield "attn.kv_b.weight", (c.num_q_heads * (mla.nope_dim + mla.v_dim), mla.kv_lora_rank)
    yield "attn.o.weight", (c.hidden_size, c.num_q_heads * mla.v_dim)


def _indexer(c: ModelConfig, index: IndexConfig) -> Iterator[tuple[str, Shape]]:
    rank = c.mla.q_lora_rank if c.mla else None
    yield "attn.index_q.weight", (index.num_heads * index.head_dim, rank or c.hidden_size)
    yield "attn.index_k.weight", (index.head_dim, c.hidden_size)
    yield "attn.index_k_norm.weight", (index.head_dim,)
    if c.mla is None:
        yield "attn.index_q_norm.weight", (index.head_dim,)
        return
    yield "attn.index_k_norm.bias", (index.head_dim,)
    yield "attn.index_w.weight", (index.num_heads, c.hidden_size)


def _mlp(name: str, inner: int, hidden: int, bias: bool = False) -> Iterator[tuple[str, Shape]]:
    yield from _linear(f"{name}.gate", inner, hidden, bias)
    yield from _linear(f"{name}.up", inner, hidden, bias)
    yield from _linear(f"{name}.down", hidden, inner, bias)


def _linear(name: str, rows: int, columns: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)
