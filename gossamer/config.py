"""Frozen configuration: what the user may set (the command line is generated from these fields), and `resolve()`.

`None` means auto. `resolve()` returns a new object in which nothing is auto any more; nothing mutates a config.
"""

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from gossamer.core import StartupError


def option(default: Any, help: str, **extra: Any) -> Any:
    """A dataclass field that the command line shows: `--field-name`, with this help text.

    extra: `minimum` of a number; `size`: takes suffixes as 512M; `positional`: may stand without its flag;
    `many`: of files, several may follow one flag.
    """
    return field(default=default, metadata={"help": help, **extra})


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. `kind` is the checkpoint's `rope_type`; `parameters` its other fields as published."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    rotary_dim: int | None = None
    """Leading dimensions of each head that rotate; None: all of head_dim."""
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """YaRN's scale on cos and sin; None: derived from factor (and mscale, mscale_all_dim)."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """Routed experts of an MoE layer (TECHNIQUES 1)."""

    num_experts: int
    top_k: int
    intermediate_size: int
    renormalize: bool = True
    score_func: Literal["softmax", "sigmoid"] = "softmax"
    choice_bias: bool = False
    """A learned bias on the scores decides with them who is chosen; weights are without it."""
    num_groups: int = 1
    topk_groups: int = 1
    """Only experts of the best `topk_groups` of `num_groups` groups are chosen."""
    group_top: int = 1
    """A group is as good as the sum of this many of its best scores."""
    routed_scale: float = 1.0
    num_shared: int = 0
    """Experts of the same width that see every token, with weight 1."""
    shared_width: int | None = None
    """Of one shared MLP instead, where that is no multiple of theirs."""
    dense_layers: frozenset[int] = frozenset()
    """Layers that keep a dense MLP of ModelConfig.intermediate_size."""


@dataclass(frozen=True, slots=True)
class MLAConfig:
    """Multi-head latent attention (TECHNIQUES 3): a head's query and key are `nope_dim` + `rope_dim` wide."""

    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    q_lora_rank: int | None = None
    interleaved: bool = True
    """Neighbours rotate together, not the two halves."""


@dataclass(frozen=True, slots=True)
class IndexConfig:
    """The indexer of `attention` "dsa" and "msa": it chooses `top_k` tokens or blocks (TECHNIQUES 4)."""

    num_heads: int
    head_dim: int
    top_k: int
    interleaved: bool = False
    """Its own rotation of neighbours, not halves."""
    shared: frozenset[int] = frozenset()
    """Layers without an indexer: they attend to what the layer before them does ("dsa"), or to everything ("msa")."""


@dataclass(frozen=True, slots=True)
class SparseConfig:
    """Blocks of `block_size` tokens that a token attends to (TECHNIQUES 4): pages, under "msa" one or more."""

    block_size: int
    num_blocks: int
    """Forced ones included: the `first`, and the last `local`, the token's own included."""
    first: int
    local: int
    dense_below: int = 0
    """A token at a position below attends to all of its past."""
    score: Literal["mean", "bounds"] = "mean"
    """What stands for a page's keys."""


@dataclass(frozen=True, slots=True)
class NSAConfig:
    """Natively trained sparse attention (TECHNIQUES 4): `ModelConfig.sparse` says which blocks are selected.

    Blocks of half a page, one every quarter, are compressed; the window branch is every layer's sliding window.
    """

    compress_width: int
    """Between the two layers of a compression MLP."""
    shared_kv: bool = True
    """Branches share keys and values; else each has projections of its own."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The architecture of a decoder, whatever family it came from. Made by `models/<family>.py: from_hf`."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    hidden_act: Literal["silu"] = "silu"
    swiglu: tuple[float, float] | None = None
    """Alpha and limit of a clamped SwiGLU (`ops.activation.silu_mul`) in every MLP."""
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    norm_offset: bool = False
    """The checkpoint's norms multiply by 1 + weight (Gemma)."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """"head": RMSNorm over each head's dimensions (Qwen3); "full": over all heads at once (OLMoE)."""
    clip_qkv: float | None = None
    sliding_windows: tuple[int | None, ...] = ()
    """Per layer: a token sees this many tokens, itself included; None: all. Empty: no layer has a window."""
    attention: str = "gqa"
    mla: MLAConfig | None = None
    """Of `attention` "mla" and "dsa", whose `head_dim` is that of queries and keys."""
    index: IndexConfig | None = None
    num_mtp_layers: int = 0
    """Multi-token-prediction layers that a checkpoint has behind its last layer."""
    num_draft_layers: int = 0
    """How many of them run, as drafts: LoadConfig.num_speculative_tokens. The others are left aside."""
    sparse: SparseConfig | None = None
    nsa: NSAConfig | None = None
    """Of `attention` "nsa"."""
    moe: MoEConfig | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    """The checkpoint's own."""

    @property
    def num_kv_layers(self) -> int:
        """Layers with a KV cache, draft layers included."""
        return self.num_layers + self.num_draft_layers

    def sliding_window(self, layer: int) -> int | None:
        return self.sliding_windows[layer] if self.sliding_windows else None

    def has_index(self, layer: int) -> bool:
        return self.index is not None and layer not in self.index.shared


@dataclass(frozen=True, slots=True)
class LoadConfig:
    """Which model, and in what form it is held in memory."""

    model: str = option("", "local folder, .gguf file, or hub id of the model", positional=True)
    tokenizer: str | None = option(None, "folder, .gguf file or hub id of the tokenizer (default: the model's own)")
    generation_config: Literal["auto", "none"] = option(
        "auto", "sampling defaults of requests; auto: those of the model's generation_config.json"
    )
    download_dir: str | None = option(
        None, "folder that keeps models of the hub (default: $HF_HUB_CACHE, $HF_HOME/hub, ~/.cache/huggingface/hub)"
    )
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = option(
        "auto", "weights to load; dummy draws seeded random ones"
    )
    dummy_routing: str = option(
        "uniform", "experts that dummy weights choose: uniform, or zipf:S (popularity falls as rank^-S)"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "type of activations and unquantised weights")
    quantization: Literal["auto", "none", "int8", "int4", "fp8"] = option(
        "auto", "fp8, or weights only as int8 or int4, on a CPU; auto: there as the checkpoint is quantised, else none"
    )
    max_model_len: int | None = option(
        None, "longest prompt + output in tokens, also as 32K (default: the model's, if it fits)", size=True, minimum=1
    )
    upcycle_experts: int | None = option(
        None, "load a dense checkpoint as an MoE of this many identical experts", minimum=1
    )
    upcycle_topk: int = option(2, "experts per token with --upcycle-experts", minimum=1)
    num_speculative_tokens: int = option(
        0, "1: a multi-token-prediction layer drafts a token a step, which is verified; implies --no-overlap", minimum=0
    )
    seed: int = option(0, "seed of dummy weights and of requests without a seed of their own")


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The paged KV cache."""

    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "fp8", "fp8_e4m3"] = option(
        "auto", "type of the KV cache (default: --dtype); fp8 is E4M3, scaled by page and head"
    )
    kv_cache_memory_bytes: int | None = option(
        None, "bytes for the KV cache; takes suffixes K, M, G (default: from free memory)", size=True, minimum=1
    )
    gpu_memory_utilization: float = option(0.9, "fraction of device memory that the engine may use")
    enable_prefix_caching: bool = option(True, "reuse KV pages between requests with a common prefix")
    page_size: int = option(64, "tokens per KV page", minimum=1)


@dataclass(frozen=True, slots=True)
class SparseOptions:
    """Attention to a part of the context."""

    attention: Literal["auto", "block_topk"] = option(
        "auto", "block_topk: each token attends to the pages that score best, without training; auto: as the model says"
    )
    sparse_budget: int = option(2048, "block_topk: tokens that a token attends to", size=True, minimum=1)
    sparse_window: int = option(512, "block_topk: of these, the last ones", size=True, minimum=1)
    sparse_score: Literal["mean", "bounds"] = option(
        "mean", "block_topk: pages are scored by their mean key, or by the bounds of their keys"
    )
    sparse_dense_layers: tuple[int, ...] = option(
        (), "block_topk: layers, counted from 0, that see all, such as those that find again what was said once"
    )
    sparse_from: int | None = option(
        None, "block_topk: positions below see all (default: the budget; on a GPU 8K, if more)", size=True, minimum=0
    )


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Continuous batching."""

    max_num_seqs: int | None = option(
        None, "most sequences that run at once (default: 32 on a CPU, 256 on a GPU)", minimum=1
    )
    max_num_batched_tokens: int | None = option(
        None, "token budget of a step, decode and prefill together (default: 512 on a CPU, 8192 on a GPU)", minimum=1
    )
    max_num_queued: int = option(1024, "requests that may wait; further ones get 503 and Retry-After", minimum=1)
    enable_chunked_prefill: bool = option(True, "split long prompts over steps")
    overlap: bool = option(True, "schedule the next step while the device runs this one")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """All that an engine needs to start."""

    load: LoadConfig = LoadConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    sparse: SparseOptions = SparseOptions()
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where the model runs")
    ops_backend: Literal["auto", "reference"] = option("auto", "reference: plain torch instead of kernels")
    enforce_eager: bool = option(False, "no CUDA graphs: every step launches its kernels one by one")
    num_threads: int | None = option(None, "CPU threads for the model (default: all physical cores)", minimum=1)
    disable_progress: bool = option(False, "no progress bars")
    profile_trace: str | None = option(None, "write a timeline of the engine here at exit, for Perfetto (JSON)")
    count_experts: bool = option(False, "count which experts every layer and step chooses (costs some speed)")
    cache_dir: str | None = option(
        None, "folder for what Gossamer measured (default: $XDG_CACHE_HOME/gossamer, ~/.cache/gossamer)"
    )


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The HTTP server."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on")
    served_model_name: str | None = option(None, "name in the API (default: the model folder's basename)")
    api_key: str | None = option(None, "bearer token that every /v1 route requires (default: $GOSSAMER_API_KEY)")
    chat_template: str | None = option(None, "file with a Jinja chat template instead of the model's own")
    max_body_bytes: int = option(16 << 20, "largest request body; takes suffixes K, M, G", size=True, minimum=1)
    receive_timeout: float = option(30.0, "seconds that a client may take to send its headers, or its body")
    send_timeout: float = option(60.0, "seconds that a client may leave its answer unread")
    drain_timeout: float = option(30.0, "seconds that open requests get to finish after SIGTERM")
    log_level: Literal["debug", "info", "warning", "error"] = option("info", "how much to log")


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the engine found on this machine; `memory_bytes` is free memory on the device that runs the model."""

    device: Literal["cpu", "cuda"]
    name: str
    memory_bytes: int
    num_cores: int


@dataclass(frozen=True, slots=True)
class DeviceCeilings:
    """What the device can do at best, measured: `gossamer info --measure`."""

    flops_per_second: float
    """Of a large matrix product in the model's dtype."""
    bytes_per_second: float
    """Of reading device memory."""


SECTIONS: dict[str, type] = {
    "load": LoadConfig, "cache": CacheConfig, "scheduler": SchedulerConfig, "sparse": SparseOptions,
}  # fmt: skip

GPU_PAGE_SIZES = (16, 32, 64, 128)
SPARSE_FROM_ON_GPU = 8192
"""Prefill of shorter contexts is faster dense (benchmarks/ops/bench_sparse.py)."""


def make_engine_config(**options: Any) -> EngineConfig:
    """Builds an EngineConfig from flat keyword arguments, as `LLM(...)` and the command line take them.

    Raises StartupError for an unknown name (suggesting the nearest) or a value outside a field's choices.
    """
    known = {f.name: section for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)}
    known |= {f.name: "" for f in dataclasses.fields(EngineConfig) if f.name not in SECTIONS}
    grouped: dict[str, dict[str, Any]] = {section: {} for section in ["", *SECTIONS]}
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise StartupError(f"Unknown engine option {name!r}.{hint}")
        grouped[known[name]][name] = value
    sections = {name: cls(**grouped[name]) for name, cls in SECTIONS.items()}
    config = EngineConfig(**sections, **grouped[""])
    for part in (config, *sections.values()):
        check_fields(part)
    _check_values(config)
    return config


def check_fields(part: Any) -> None:
    """Raises StartupError if a field of a config dataclass is none of its `Literal` choices, or below its minimum."""
    hints = get_type_hints(type(part))
    for item in dataclasses.fields(part):
        choices = get_args(hints[item.name]) if get_origin(hints[item.name]) is Literal else ()
        value, minimum = getattr(part, item.name), item.metadata.get("minimum")
        if choices and value not in choices:
            raise StartupError(f"{flag(item.name)} must be one of {', '.join(map(str, choices))}; got {value!r}.")
        if minimum is not None and value is not None and value < minimum:
            raise StartupError(f"{flag(item.name)} must be at least {minimum}; got {value}.")


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def zipf_exponent(routing: str) -> float:
    """`uniform` -> 0.0, `zipf:1.2` -> 1.2. Raises StartupError for anything else."""
    found = re.fullmatch(r"uniform|zipf:(\d+(?:\.\d+)?)", routing)
    if found is None:
        raise StartupError(f"--dummy-routing must be uniform or zipf:S, as in zipf:1.2; got {routing!r}.")
    return float(found[1] or 0.0)


def _check_values(config: EngineConfig) -> None:
    load, cache = config.load, config.cache
    if not 0.0 < cache.gpu_memory_utilization <= 1.0:
        raise StartupError(f"--gpu-memory-utilization must be in (0, 1]; got {cache.gpu_memory_utilization}.")
    if zipf_exponent(load.dummy_routing) and load.load_format != "dummy":
        raise StartupError(f"--dummy-routing {load.dummy_routing} needs --load-format dummy.")
    if load.num_speculative_tokens > 1:
        raise StartupError(
            f"--num-speculative-tokens must be 0 or 1, for a multi-token-prediction layer drafts one token; got "
            f"{load.num_speculative_tokens}."
        )
    if load.upcycle_experts is not None and load.upcycle_topk > load.upcycle_experts:
        raise StartupError(f"--upcycle-topk {load.upcycle_topk} is more than --upcycle-experts {load.upcycle_experts}.")


def with_attention(config: EngineConfig, hardware: Hardware, model: ModelConfig) -> ModelConfig:
    """The model under --attention. Raises StartupError where it does not apply."""
    options, page = config.sparse, config.cache.page_size
    block = page if model.sparse is None else model.sparse.block_size
    if block % page or (block != page and model.index is None):
        pages = "hence pages, of" if model.index is None else "of whole pages, of"
        raise StartupError(f"--page-size {page}: this model selects blocks, {pages} {block}.")
    if options.attention == "auto":
        for name, default in dataclasses.asdict(SparseOptions()).items():
            if getattr(options, name) != default:
                raise StartupError(f"{flag(name)} is of --attention block_topk: add that, or drop {flag(name)}.")
        return model
    if model.attention != "gqa":
        raise StartupError(
            f"--attention {options.attention} is for grouped-query attention; this is {model.attention}."
        )
    windows, dense = model.sliding_windows, {*options.sparse_dense_layers}
    if windows and None not in windows:
        raise StartupError(f"--attention {options.attention}: every layer of this model has a window already.")
    open_layers = {i for i in range(model.num_layers) if model.sliding_window(i) is None}
    if others := dense - open_layers:
        raise StartupError(
            f"--sparse-dense-layers {min(others)}: this model's layers without a window are "
            f"{','.join(map(str, sorted(open_layers)))}."
        )
    if dense == open_layers:
        raise StartupError("--sparse-dense-layers names every layer that could be sparse. Name fewer.")
    if dense:  # a layer with a window keeps it, and nothing lies outside this one
        windows = tuple(
            model.max_position_embeddings if i in dense else model.sliding_window(i) for i in range(model.num_kv_layers)
        )
    for name in ("sparse_budget", "sparse_window"):
        if (value := getattr(options, name)) % page:
            nearest = max(1, round(value / page)) * page
            raise StartupError(f"{flag(name)} {value} is no multiple of --page-size {page}; {nearest} is near.")
    num_blocks, local = options.sparse_budget // page, options.sparse_window // page
    if num_blocks < local + 2:
        raise StartupError(
            f"--sparse-budget {options.sparse_budget} leaves nothing to choose: the first page and --sparse-window "
            f"{options.sparse_window} take {(local + 1) * page}.\nSet --sparse-budget {(local + 2) * page} or more."
        )
    least = options.sparse_budget if hardware.device == "cpu" else max(options.sparse_budget, SPARSE_FROM_ON_GPU)
    below = least if options.sparse_from is None else options.sparse_from
    sparse = SparseConfig(page, num_blocks, 1, local, below, options.sparse_score)
    return dataclasses.replace(model, attention=options.attention, sparse=sparse, sliding_windows=windows)


def resolve(config: EngineConfig, hardware: Hardware, model: ModelConfig) -> EngineConfig:
    """Fills in every auto field that depends on the machine or the model alone.

    `kv_cache_memory_bytes` and the final `max_model_len` follow in `kv_cache.ledger.plan_memory`, which knows what
    the weights take.
    """
    load, cache, sched = config.load, config.cache, config.scheduler
    on_cpu = hardware.device == "cpu"
    own_dtype: Literal["float32", "bfloat16"] = "float32" if model.dtype == "float32" else "bfloat16"
    dtype = load.dtype if load.dtype != "auto" else own_dtype
    kv_dtype = cache.kv_cache_dtype if cache.kv_cache_dtype != "auto" else dtype
    kv_dtype = "fp8" if kv_dtype == "fp8_e4m3" else kv_dtype
    max_num_seqs = sched.max_num_seqs or (32 if on_cpu else 256)
    longest = load.max_model_len or model.max_position_embeddings
    if load.max_model_len is not None and load.max_model_len > model.max_position_embeddings:
        raise StartupError(
            f"--max-model-len {load.max_model_len} is more than the model's context of "
            f"{model.max_position_embeddings} tokens.\nSet --max-model-len {model.max_position_embeddings} or less."
        )
    widest = max_num_seqs * (1 + load.num_speculative_tokens)
    budget = sched.max_num_batched_tokens or max(512 if on_cpu else 8192, widest)
    if not sched.enable_chunked_prefill:
        budget = sched.max_num_batched_tokens or max(budget, longest)
        if budget < longest:
            raise StartupError(
                f"--max-num-batched-tokens {budget} is less than --max-model-len {longest}, and chunked prefill is "
                f"off.\nRaise --max-num-batched-tokens to {longest}, or drop --no-enable-chunked-prefill."
            )
    if not on_cpu and config.ops_backend == "auto" and cache.page_size not in GPU_PAGE_SIZES:
        sizes = ", ".join(map(str, GPU_PAGE_SIZES))
        raise StartupError(
            f"--page-size {cache.page_size}: a GPU's kernels take {sizes}.\nSet one of them, or leave it at 64."
        )
    if budget < widest:
        each = ", each with a drafted token," if widest > max_num_seqs else ""
        raise StartupError(
            f"--max-num-batched-tokens {budget} is less than --max-num-seqs {max_num_seqs}{each} needs: a decode step "
            f"would not fit.\nRaise --max-num-batched-tokens to {widest} or lower --max-num-seqs."
        )
    # Where the next step starts is known when this one's drafts are verified.
    overlap = sched.overlap and not load.num_speculative_tokens
    return dataclasses.replace(
        config,
        device=hardware.device,
        num_threads=config.num_threads or hardware.num_cores,
        load=dataclasses.replace(load, dtype=dtype, max_model_len=longest),
        cache=dataclasses.replace(cache, kv_cache_dtype=kv_dtype),
        scheduler=dataclasses.replace(sched, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, overlap=overlap),
    )
