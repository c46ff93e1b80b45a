"""What is counted of aliases, in Prometheus' form. Labels are aliases and versions of the registry: they are bounded.

This module does not know what an alias is.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class LifeMetrics:
    """The counters of aliases and their shadows, in somebody's collection."""

    def __init__(self, collection: CollectorRegistry) -> None:
        of, into = ["alias", "version"], collection
        self.outcomes = Counter(
            "tenon_alias_requests",
            "Requests through an alias: answered, or failed by the version.",
            [*of, "outcome"],
            registry=into,
        )
        self.rollbacks = Counter(
            "tenon_alias_rollbacks", "Aliases rolled back by this server.", ["alias"], registry=into
        )
        self.shadows = Counter(
            "tenon_shadow_requests", "Requests to shadows: answered, failed, dropped.", [*of, "outcome"], registry=into
        )
        self.same_first = Counter(
            "tenon_shadow_same_first_token", "Answers of shadows that began alike.", of, registry=into
        )
        self.same_whole = Counter("tenon_shadow_same_answer", "Answers of shadows that were alike.", of, registry=into)
        self.difference = Gauge(
            "tenon_shadow_logprob_difference",
            "Mean difference of log probability, shadow less version, of the answers' tokens.",
            of,
            registry=into,
        )
