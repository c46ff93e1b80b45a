"""What is counted, in Prometheus' form: `docs/metrics.md` lists it. The sets of labels are bounded.

A model is a version that answered, so a name that someone made up is never a label; a tenant comes from a key. Of each
there are so many series at most: a new one takes the place of one that has been idle for a while, or is counted as
`other`, and what is removed from the registry or from the keys is dropped with the next reading.
This module does not know how requests are answered.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tenon.serve.jobs import Engines, Load
from tenon.serve.watching.life_metrics import LifeMetrics
from tenon.serve.watching.records import OUTCOMES, Record

OTHER = "other"
MOST_MODELS = 100
MOST_TENANTS = 100
MOST_CODES = 100
# A series that got nothing for so long makes room for a new one. Shorter, and a thousand adapters that are asked in
# turn would make a thousand series an hour.
_IDLE_SECONDS = 600.0
_REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TTFT_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_WAIT_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Labels:
    """The names that have series of their own, at most so many."""

    def __init__(self, most: int, drop: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._drop, self._clock = most, drop, clock
        self._used: OrderedDict[str, float] = OrderedDict()

    def of(self, name: str) -> str:
        """The label of a name: itself, or `other`."""
        now = self._clock()
        if name not in self._used and len(self._used) >= self._most:
            oldest, used = next(iter(self._used.items()))
            if now - used < _IDLE_SECONDS:
                return OTHER
            self._forget(oldest)
        self._used[name] = now
        self._used.move_to_end(name)
        return name

    def keep(self, names: Collection[str]) -> None:
        """Drop the series of all others."""
        for name in [name for name in self._used if name not in names]:
            self._forget(name)

    def _forget(self, name: str) -> None:
        del self._used[name]
        self._drop(name)


@dataclass(frozen=True, slots=True)
class _Engine(Collector):
    """The engine's own numbers, read when they are asked for."""

    engine: Engines

    def collect(self) -> Iterator[Metric]:
        """Gauges of now, counters since the start."""
        load: Load = self.engine.load
        for name, text, value in (
            ("tenon_sequences_running", "Sequences that have a place.", load.running),
            ("tenon_sequences_waiting", "Sequences that wait for a place.", load.waiting),
            ("tenon_sequences_parked", "Sequences that wait for their adapter.", load.parked),
            ("tenon_cache_used_ratio", "Share of the cache that sequences hold.", load.cache_used),
            ("tenon_adapters_resident", "Adapters in slots.", len(self.engine.resident)),
            ("tenon_adapter_memory_bytes", "Host memory of adapters beside slots.", load.adapters.memory_bytes),
            ("tenon_adapter_wait_seconds_most", "The longest wait for a slot.", load.adapters.most_wait_seconds),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        for name, text, value in (
            ("tenon_prefix_hit_tokens", "Tokens of prompts that were not computed again.", load.prefix_hit_tokens),
            ("tenon_preemptions", "Places given up to a full cache.", load.preemptions),
            ("tenon_adapter_loads", "Adapters put into slots.", self.engine.loads),
            ("tenon_adapter_evictions", "Adapters that left a slot for another.", load.adapters.evictions),
            ("tenon_adapter_reads", "Adapters read from disk.", load.adapters.reads),
            ("tenon_adapter_read_seconds", "Time that reading them took.", load.adapters.read_seconds),
            ("tenon_adapter_checks", "Adapters whose probes were asked.", load.adapters.checks),
            ("tenon_adapter_check_seconds", "Time that asking them took.", load.adapters.check_seconds),
            ("tenon_adapter_check_refusals", "Adapters that spoke otherwise.", load.adapters.check_refusals),
            ("tenon_adapter_drops", "Adapters dropped from host memory.", load.adapters.dropped),
        ):
            yield CounterMetricFamily(name, text, value=value)
        text = "Sequences, by where their adapter was when they came."
        tiers = CounterMetricFamily("tenon_adapter_sequences", text, labels=["tier"])
        tiers.add_metric(["slot"], load.adapters.from_slot)
        tiers.add_metric(["memory"], load.adapters.from_memory)
        tiers.add_metric(["disk"], load.adapters.from_disk)
        yield tiers


class Metrics:
    """The counters of one server, in a collection of their own."""

    def __init__(self, engine: Engines) -> None:
        self._collection = own = CollectorRegistry()
        self.add(_Engine(engine))
        self.life = LifeMetrics(own)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=own)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=own)

        def summary(name: str, text: str) -> Summary:
            return Summary(name, text, ["tenant"], registry=own)

        self._requests = counter("tenon_requests", "Requests answered.", "route", "status")
        self._seconds = histogram(
            "tenon_request_seconds", "From request to the end of its answer.", _REQUEST_SECONDS, "route"
        )
        self._errors = counter("tenon_errors", "Errors told to clients.", "code")
        self._by_model = _Family(
            counter("tenon_model_requests", "Requests by who answered and how they ended.", "model", "outcome"),
            counter("tenon_prompt_tokens", "Tokens of prompts.", "model"),
            counter("tenon_completion_tokens", "Tokens of answers.", "model"),
            histogram("tenon_time_to_first_token_seconds", "From request to first token.", _TTFT_SECONDS, "model"),
            histogram(
                "tenon_time_per_token_seconds", "Mean of a request's tokens after the first.", _TOKEN_SECONDS, "model"
            ),
        )
        self._by_tenant = _Family(
            counter("tenon_tenant_requests", "Requests by whose key it was and how they ended.", "tenant", "outcome"),
            counter("tenon_tenant_prompt_tokens", "Tokens of prompts.", "tenant"),
            counter("tenon_tenant_completion_tokens", "Tokens of answers.", "tenant"),
            summary("tenon_tenant_time_to_first_token_seconds", "From request to first token."),
            summary("tenon_tenant_time_per_token_seconds", "Mean of a request's tokens after the first."),
        )
        self._place_wait = histogram("tenon_queue_seconds", "Waits for a place in the batch.", _WAIT_SECONDS)
        self._adapter_wait = histogram("tenon_adapter_wait_seconds", "Waits for an adapter's slot.", _WAIT_SECONDS)
        self.models = Labels(MOST_MODELS, self._by_model.drop)
        self.tenants = Labels(MOST_TENANTS, self._by_tenant.drop)
        self._codes = Labels(MOST_CODES, lambda code: self._errors.remove(code))

    def ended(self, record: Record, /) -> None:
        """Count a request."""
        self._requests.labels(record.route, str(record.status)).inc()
        if record.ended is not None:
            self._seconds.labels(record.route).observe(record.ended - record.began)
        if record.outcome in ("refused", "error"):
            self._errors.labels(self._codes.of(record.error or f"http_{record.status}")).inc()
        if record.model is not None:
            self._by_model.count(self.models.of(record.model), record)
        if record.tenant is not None:
            self._by_tenant.count(self.tenants.of(record.tenant), record)
        if record.waits is not None:
            self._place_wait.observe(record.waits.place_seconds)
            self._adapter_wait.observe(record.waits.adapter_seconds)

    def add(self, collector: Collector) -> None:
        """Tell of something else too."""
        self._collection.register(collector)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._collection)


@dataclass(frozen=True, slots=True)
class _Family:
    """The same five things of a model or of a tenant."""

    requests: Counter
    prompt_tokens: Counter
    completion_tokens: Counter
    first_token: Histogram | Summary
    next_token: Histogram | Summary

    def count(self, label: str, record: Record) -> None:
        """Count a request."""
        self.requests.labels(label, record.outcome).inc()
        self.prompt_tokens.labels(label).inc(record.prompt_tokens)
        self.completion_tokens.labels(label).inc(record.completion_tokens)
        for family, seconds in (
            (self.first_token, record.first_token_seconds),
            (self.next_token, record.token_seconds),
        ):
            if seconds is not None:
                family.labels(label).observe(seconds)

    def drop(self, label: str) -> None:
        """Forget all series of a label."""
        for outcome in OUTCOMES:
            with suppress(KeyError):
                self.requests.remove(label, outcome)
        for family in (self.prompt_tokens, self.completion_tokens, self.first_token, self.next_token):
            with suppress(KeyError):
                family.remove(label)
