"""What a pool of engines says of itself, in Prometheus' form. Labels: states, and the numbers of places.

This module does not know how the engines are watched.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tenon.serve.pool.pool import EnginePool


class PoolCollector(Collector):
    """Reads the pool's facts whenever metrics are asked for."""

    def __init__(self, pool: EnginePool) -> None:
        self._pool = pool

    def collect(self) -> Iterator[Metric]:
        """The metrics, now."""
        facts = self._pool.facts
        states = GaugeMetricFamily("tenon_replicas", "Engines by their state.", labels=["state"])
        for state, count in facts.states:
            states.add_metric([state], count)
        yield states
        sequences = GaugeMetricFamily("tenon_replica_sequences", "Sequences that an engine has.", labels=["replica"])
        cache = GaugeMetricFamily("tenon_replica_cache_used_ratio", "Share of its cache in use.", labels=["replica"])
        for replica in facts.replicas:
            sequences.add_metric([str(replica.number)], replica.sequences)
            cache.add_metric([str(replica.number)], replica.load.cache_used)
        yield sequences
        yield cache
        yield GaugeMetricFamily(
            "tenon_queue_delay_seconds",
            "The longest that a sequence waits, or has just waited, for its place.",
            value=facts.delay_seconds,
        )
        yield CounterMetricFamily(
            "tenon_retries", "Sequences that went on at another engine than they began at.", value=facts.retries
        )
        yield CounterMetricFamily("tenon_replica_losses", "Engines that were lost.", value=facts.restarts)
