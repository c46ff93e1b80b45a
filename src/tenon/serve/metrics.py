"""What is counted, in Prometheus' form. Labels come from bounded sets: routes, statuses, registered versions.

This module does not know how requests are answered.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.registry import Collector

from tenon.serve.jobs import Engines

_TTFT_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Metrics:
    """The counters of one server, in a collection of their own."""

    def __init__(self, engine: Engines) -> None:
        self._collection = own = CollectorRegistry()
        self.requests = Counter("tenon_requests", "Requests answered.", ["route", "status"], registry=own)
        self.prompt_tokens = Counter("tenon_prompt_tokens", "Tokens of prompts.", ["model"], registry=own)
        self.completion_tokens = Counter("tenon_completion_tokens", "Tokens of answers.", ["model"], registry=own)
        self.first_token = Histogram(
            "tenon_time_to_first_token_seconds", "From request to first token.", buckets=_TTFT_SECONDS, registry=own
        )
        self.next_token = Histogram(
            "tenon_time_per_token_seconds", "Mean of the tokens after the first.", buckets=_TOKEN_SECONDS, registry=own
        )
        self._gauge("tenon_sequences_running", "Sequences that have a place.", lambda: engine.load.running)
        self._gauge("tenon_sequences_waiting", "Sequences that wait for a place.", lambda: engine.load.waiting)
        self._gauge("tenon_sequences_parked", "Sequences that wait for their adapter.", lambda: engine.load.parked)
        self._gauge("tenon_cache_used_ratio", "Share of the cache that sequences hold.", lambda: engine.load.cache_used)
        self._gauge("tenon_prefix_hit_tokens", "Tokens not computed again.", lambda: engine.load.prefix_hit_tokens)
        self._gauge("tenon_preemptions", "Places given up to a full cache.", lambda: engine.load.preemptions)
        self._gauge("tenon_adapters_resident", "Adapters in the bank.", lambda: len(engine.resident))
        self._gauge("tenon_adapter_loads", "Adapters put into the bank since the start.", lambda: engine.loads)

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        Gauge(name, text, registry=self._collection).set_function(read)

    def add(self, collector: Collector) -> None:
        """Tell of something else too."""
        self._collection.register(collector)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._collection)
