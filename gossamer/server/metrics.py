"""Prometheus metrics under vLLM's names, so that dashboards made for it work.

What the engine counts is read from its latest statistics when scraped; what a user feels (latencies) is observed
here, where tokens leave.
"""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from gossamer.config import CacheConfig, DeviceCeilings
from gossamer.core import EngineStats, FinishReason
from gossamer.server.outputs import SampleTimes

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_REQUEST_BUCKETS = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_LENGTH_BUCKETS = tuple(m * 10**e for e in range(7) for m in (1, 2, 5))

_FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort", "error")


class ServerMetrics:
    """Everything at /metrics. One registry of its own, so that two servers in one process do not meet.

    Times are in seconds, lengths in tokens. Each of the n continuations of a request counts as a request, as in vLLM.
    """

    def __init__(
        self, model_name: str, stats: Callable[[], EngineStats], ceilings: DeviceCeilings | None = None
    ) -> None:
        self._stats, self._model_name, self._ceilings = stats, model_name, ceilings
        self.registry = CollectorRegistry()
        self.registry.register(self)

        def counter(name: str, help_text: str) -> Counter:
            return Counter(name, help_text, ["model_name"], registry=self.registry).labels(model_name)

        def histogram(name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(name, help_text, ["model_name"], registry=self.registry, buckets=buckets)
            return family.labels(model_name)

        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of requests that got a first token.")
        self._generation_tokens = counter("vllm:generation_tokens", "Tokens generated.")
        labels = ["model_name", "finished_reason"]
        success = Counter("vllm:request_success", "Requests finished, by reason.", labels, registry=self.registry)
        self._finished = {reason: success.labels(model_name, reason) for reason in _FINISH_REASONS}
        self._first_token = histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", _TTFT_BUCKETS)
        self._inter_token = histogram("vllm:inter_token_latency_seconds", "Between two tokens.", _TOKEN_BUCKETS)
        per_output = "Mean time of a request's later tokens."
        self._per_output = [
            histogram(f"vllm:{name}time_per_output_token_seconds", per_output, _TOKEN_BUCKETS)
            for name in ("request_", "")  # the latter is its former name
        ]
        self._queue, self._prefill, self._decode, self._inference = (
            histogram(f"vllm:request_{name}_time_seconds", help_text, _REQUEST_BUCKETS)
            for name, help_text in (
                ("queue", "Arrival to first scheduling."),
                ("prefill", "First scheduling to first token."),
                ("decode", "First token to last."),
                ("inference", "First scheduling to last token."),
            )
        )
        self._e2e = histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", _REQUEST_BUCKETS)
        self._prompt_length = histogram("vllm:request_prompt_tokens", "Length of prompts.", _LENGTH_BUCKETS)
        self._output_length = histogram("vllm:request_generation_tokens", "Length of outputs.", _LENGTH_BUCKETS)
        self._longest_output = histogram(
            "vllm:request_max_num_generation_tokens", "The same, for each output is a request here.", _LENGTH_BUCKETS
        )

    def collect(self) -> Iterable[Metric]:
        """The engine's own counters and gauges, as of its latest step."""
        s = self._stats()
        usage = s.num_pages_in_use / s.num_pages if s.num_pages else 0.0
        gauges = [
            ("vllm:num_requests_running", "Requests being computed.", s.num_running),
            ("vllm:num_requests_waiting", "Requests waiting for room.", s.num_waiting),
            ("vllm:kv_cache_usage_perc", "KV cache in use, 1 is all of it.", usage),
            ("vllm:gpu_cache_usage_perc", "The former name of vllm:kv_cache_usage_perc.", usage),
            ("gossamer:kv_cache_pages", "Pages in the KV cache.", s.num_pages),
            ("gossamer:kv_cache_pages_in_use", "Pages that a request holds.", s.num_pages_in_use),
        ]
        if s.device_idle_fraction is not None:
            help_text = "Share of consecutive decode steps in which the device waited, since the start."
            gauges.append(("gossamer:device_idle_fraction", help_text, s.device_idle_fraction))
        best = self._ceilings
        if best is not None:
            peaks = (("flops", s.model_flops, best.flops_per_second), ("bytes", s.model_bytes, best.bytes_per_second))
            for unit, done, peak in peaks:
                gauges.append((f"gossamer:device_peak_{unit}_per_second", "Measured: gossamer info --measure.", peak))
                if s.device_seconds:
                    help_text = f"Model {unit} over the measured peak while the device computed, since the start."
                    gauges.append((f"gossamer:model_{unit}_utilization", help_text, done / s.device_seconds / peak))
        counters = (
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", s.prefix_cache_queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", s.prefix_cache_hits),
            ("vllm:num_preemptions", "Requests that lost their pages and start over.", s.num_preemptions),
            ("vllm:spec_decode_num_drafts", "Verifications of drafts.", s.spec_decode_num_drafts),
            ("vllm:spec_decode_num_draft_tokens", "Drafted tokens verified, one each.", s.spec_decode_num_drafts),
            ("vllm:spec_decode_num_accepted_tokens", "Drafted tokens accepted.", s.spec_decode_num_accepted_tokens),
            ("gossamer:engine_steps", "Steps of the engine.", s.num_steps),
            ("gossamer:device_seconds", "Time that the device computed.", s.device_seconds),
            ("gossamer:decode_seconds", "Device time of decode steps after decode steps.", s.decode_seconds),
            ("gossamer:decode_idle_seconds", "Time that the device waited before them.", s.decode_idle_seconds),
            ("gossamer:model_flops", "Operations that the steps' shapes ask for.", s.model_flops),
            ("gossamer:model_bytes", "Bytes that the steps cannot do without.", s.model_bytes),
            ("gossamer:prompt_tokens_computed", "Prompt tokens computed, recomputed ones too.", s.num_prompt_tokens),
        )
        for kind, rows in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, help_text, value in rows:
                family = kind(name, help_text, labels=["model_name"])
                family.add_metric([self._model_name], value)
                yield family

    def describe_cache(self, cache: CacheConfig, num_pages: int) -> None:
        """The KV cache's configuration as vLLM publishes it: the labels of a gauge that is 1."""
        labels = {
            "block_size": cache.page_size,
            "num_gpu_blocks": num_pages,
            "cache_dtype": cache.kv_cache_dtype,
            "enable_prefix_caching": cache.enable_prefix_caching,
            "gpu_memory_utilization": cache.gpu_memory_utilization,
        }
        gauge = Gauge("vllm:cache_config_info", "The KV cache's configuration.", [*labels], registry=self.registry)
        gauge.labels(*labels.values()).set(1)

    def on_tokens(self, sample: SampleTimes, num_new: int, now: float) -> None:
        """`num_new` tokens of a sample arrived together."""
        self._generation_tokens.inc(num_new)
        if sample.num_tokens == 0:
            self._first_token.observe(now - sample.arrival)
            self._prompt_tokens.inc(sample.num_prompt_tokens)
        else:
            for _ in range(num_new):
                self._inter_token.observe((now - sample.last) / num_new)

    def on_finished(self, sample: SampleTimes, reason: FinishReason, now: float) -> None:
        self._finished[reason].inc()
        if reason in ("abort", "error"):
            # Cut short by somebody else: their latencies would flatter the engine.
            return
        total, decode = now - sample.arrival, sample.last - sample.first
        self._e2e.observe(total)
        self._queue.observe(sample.queued)
        self._inference.observe(max(total - sample.queued, 0.0))
        self._prefill.observe(max(total - sample.queued - decode, 0.0))
        self._decode.observe(decode)
        self._prompt_length.observe(sample.num_prompt_tokens)
        self._output_length.observe(sample.num_tokens)
        self._longest_output.observe(sample.num_tokens)
        if sample.num_tokens > 1:
            for family in self._per_output:
                family.observe(decode / (sample.num_tokens - 1))

    def render(self) -> bytes:
        return generate_latest(self.registry)
