"""What a server tells Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from fptq.runtime.service import Service

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one server."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, service: Service):
        registry = CollectorRegistry()
        registry.register(_LoadCollector(service))
        ProcessCollector(registry=registry)
        self._registry = registry
        self.requests = Counter(
            "fptq_requests", "Requests by path and status of HTTP.", ["path", "status"], registry=registry
        )
        self.prompt_tokens = Counter("fptq_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.request_seconds = Histogram(
            "fptq_request_seconds",
            "From a request to the end of its answer.",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "fptq_first_token_seconds",
            "From a request to its first token, waiting included.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.token_seconds = Histogram(
            "fptq_token_seconds", "Between two tokens of a text.", buckets=_SECONDS, registry=registry
        )

    def text(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self._registry)


class Watch:
    """Notes when the tokens of a text come, from now on."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self._last = monotonic()
        self._first = True

    def token(self) -> None:
        """Note one."""
        now = monotonic()
        into = self._metrics.first_token_seconds if self._first else self._metrics.token_seconds
        into.observe(now - self._last)
        self._last, self._first = now, False


class _LoadCollector:
    """Asks the service when Prometheus asks."""

    def __init__(self, service: Service):
        self._service = service

    def collect(self) -> Iterator[Metric]:
        load = self._service.load()
        yield GaugeMetricFamily("fptq_running_texts", "Texts that are being written.", load.running)
        yield GaugeMetricFamily("fptq_waiting_texts", "Texts in line.", load.waiting)
        yield GaugeMetricFamily("fptq_cache_tokens", "Tokens that the KV cache has room for.", load.cache_tokens)
        yield GaugeMetricFamily(
            "fptq_cache_free_tokens",
            "Of these, those that neither running nor ended texts have.",
            load.free_cache_tokens,
        )
        yield CounterMetricFamily("fptq_written_tokens", "Tokens that were written.", load.written_tokens)
        yield CounterMetricFamily(
            "fptq_reused_tokens", "Tokens of prompts that were in the KV cache already.", load.reused_tokens
        )
