"""What Prometheus reads: llama.cpp's counters and gauges, vLLM's histograms."""

from collections.abc import Iterable
from typing import Any

from jaxsplit.engine import Generation
from jaxsplit.llm import LM

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)
_TOKENS = tuple(2**n for n in range(18))

_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From submission to the first token.", _SECONDS),
    "inter_token_latency_seconds": ("Mean time between tokens of a request.", _SECONDS),
    "e2e_request_latency_seconds": ("From submission to the last token.", _SECONDS),
    "request_queue_time_seconds": ("From submission to the first chunk of the prompt.", _SECONDS),
    "request_prefill_time_seconds": ("From the first chunk to the first token.", _SECONDS),
    "request_decode_time_seconds": ("From the first token to the last.", _SECONDS),
    "request_prompt_tokens": ("Tokens of prompts.", _TOKENS),
    "request_generation_tokens": ("Tokens of answers.", _TOKENS),
}


class Metrics:
    """Counts finished requests, and reads the scheduler's statistics when it is asked."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self._registry = CollectorRegistry()
        self._lm: LM | None = None
        self._histograms = {
            name: Histogram(f"vllm:{name}", help, registry=self._registry, buckets=buckets)
            for name, (help, buckets) in _HISTOGRAMS.items()
        }
        self._finished = Counter(
            "vllm:request_success",
            "Finished requests.",
            ["finished_reason"],
            registry=self._registry,
        )
        self._prompt_seconds = Counter(
            "llamacpp:prompt_seconds", "Prompt process time.", registry=self._registry
        )
        self._predicted_seconds = Counter(
            "llamacpp:tokens_predicted_seconds", "Predict process time.", registry=self._registry
        )
        self._registry.register(self)

    def watch(self, lm: LM) -> None:
        """Reads this model's statistics from now on."""
        self._lm = lm

    def count(self, generation: Generation) -> None:
        """Counts a request that has ended."""
        request, t = generation.request, generation.request.timings
        self._finished.labels(generation.finish_reason or "abort").inc()
        if not t.first_token:
            return
        tokens, observe = len(request.tokens), self._observe
        observe("time_to_first_token_seconds", t.first_token - t.submitted)
        observe("e2e_request_latency_seconds", t.last_token - t.submitted)
        observe("request_queue_time_seconds", t.started - t.submitted)
        observe("request_prefill_time_seconds", t.first_token - t.started)
        observe("request_decode_time_seconds", t.last_token - t.first_token)
        observe("request_prompt_tokens", len(request.spec.prompt))
        observe("request_generation_tokens", tokens)
        if tokens > 1:
            observe("inter_token_latency_seconds", (t.last_token - t.first_token) / (tokens - 1))
        self._prompt_seconds.inc(max(t.first_token - t.started, 0))
        self._predicted_seconds.inc(max(t.last_token - t.first_token, 0))

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry)

    def collect(self) -> Iterable[Any]:
        """The scheduler's statistics, as prometheus_client asks for them."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        if self._lm is None:
            return
        s = self._lm.statistics
        c, used = s.counters, s.pages - s.free_pages - s.cached_pages
        read = c.prompt_tokens - c.cached_tokens
        for name, help, value in (
            ("llamacpp:prompt_tokens", "Prompt tokens read.", read),
            ("llamacpp:prompt_tokens_cached", "Prompt tokens found in the cache.", c.cached_tokens),
            ("llamacpp:tokens_predicted", "Generated tokens.", c.generated_tokens),
            ("vllm:prompt_tokens", "Prompt tokens.", c.prompt_tokens),
            ("vllm:generation_tokens", "Generated tokens.", c.generated_tokens),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up.", c.prompt_tokens),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the cache.", c.cached_tokens),
            (
                "jaxsplit:restored_tokens",
                "Prompt tokens from the host's memory.",
                s.restored_tokens,
            ),
            ("jaxsplit:loaded_tokens", "Prompt tokens from disk.", s.loaded_tokens),
            ("vllm:num_preemptions", "Sequences put back into the queue.", c.preemptions),
        ):
            yield CounterMetricFamily(name, help, value=value)
        for name, help, value in (
            ("llamacpp:requests_processing", "Requests that run.", s.running),
            ("llamacpp:requests_deferred", "Requests that wait.", s.waiting),
            ("llamacpp:kv_cache_usage_ratio", "Part of the cache in use.", used / s.pages),
            ("llamacpp:kv_cache_tokens", "Tokens that fit into the pages in use.", used * s.page),
            ("vllm:num_requests_running", "Requests that run.", s.running),
            ("vllm:num_requests_waiting", "Requests that wait.", s.waiting),
            ("vllm:kv_cache_usage_perc", "Part of the cache in use, 0 to 1.", used / s.pages),
            ("jaxsplit:cached_pages", "Pages that keep prefixes.", s.cached_pages),
            ("jaxsplit:cache_ram_bytes", "Prefixes in the host's memory.", s.ram_bytes),
            ("jaxsplit:prompt_cache_bytes", "Prefixes on disk.", s.disk_bytes),
        ):
            yield GaugeMetricFamily(name, help, value=value)
