"""Requests as OpenTelemetry spans, with the names of its conventions for generative AI (`gen_ai.*`).

    chat bot@3                      the request, a child of the client's span where it brings a `traceparent`
    ├── load_adapter                its adapter was not in a slot
    ├── queue                       it waited for a place in the batch
    ├── prefill                     its prompt was computed, up to the first token
    └── decode                      the tokens after it

A span is made from a record that is complete, so that nothing is done while a request runs; a thread of the exporter
sends them. No prompt is in them unless prompts are asked for. Only this module imports OpenTelemetry, and only a server
that traces imports it. Source: OpenTelemetry semantic conventions, generative AI spans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tenon.serve.watching.records import Record

# What is asked all the time by machines, and says nothing.
_SILENT = frozenset({"/health", "/ready", "/metrics", "/openapi.json"})
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
_Value = str | int | float | list[str]


def otlp_processor(endpoint: str) -> SpanProcessor:
    """Spans to a collector. endpoint: of OTLP over HTTP, `http://127.0.0.1:4318`."""
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces"))


class Tracing:
    """An observer that makes spans. Close it to have the last ones sent."""

    def __init__(
        self, processor: SpanProcessor, *, version: str, decode: Callable[[Sequence[int]], str], prompts: bool = False
    ) -> None:
        """decode: token ids as text; only called with prompts."""
        resource = Resource.create({"service.name": "tenon", "service.version": version})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("tenon.serve", version)
        self._propagator = TraceContextTextMapPropagator()
        self._decode, self._prompts = decode, prompts

    def ended(self, record: Record, /) -> None:
        """Make the spans of a request."""
        if record.route in _SILENT:
            return
        operation = _OPERATIONS.get(record.route)
        name = f"{record.method} {record.route}" if operation is None else f"{operation} {record.model or ''}".rstrip()
        parent = self._propagator.extract({} if record.parent is None else {"traceparent": record.parent}, Context())
        span = self._tracer.start_span(
            name, parent, SpanKind.SERVER, self._attributes(record), start_time=_ns(record, record.began)
        )
        if record.outcome == "error":
            span.set_status(Status(StatusCode.ERROR))
        inside = set_span_in_context(span, parent)
        for stage, start, end in stages(record):
            self._tracer.start_span(stage, inside, start_time=_ns(record, start)).end(_ns(record, end))
        span.end(_ns(record, record.began if record.ended is None else record.ended))

    def close(self) -> None:
        """Send what waits."""
        self._provider.shutdown()

    def _attributes(self, record: Record) -> dict[str, _Value]:
        answered = record.submitted is not None
        found: dict[str, _Value | None] = {
            "gen_ai.operation.name": _OPERATIONS.get(record.route),
            "gen_ai.provider.name": "tenon" if record.route in _OPERATIONS else None,
            "gen_ai.response.model": record.model,
            "gen_ai.request.choice.count": record.sequences if record.sequences > 1 else None,
            "gen_ai.usage.input_tokens": record.prompt_tokens if answered else None,
            "gen_ai.usage.output_tokens": record.completion_tokens if answered else None,
            "gen_ai.response.finish_reasons": list(record.finish) or None,
            "http.request.method": record.method,
            "http.route": record.route,
            "http.response.status_code": record.status,
            "error.type": (record.error or str(record.status)) if record.outcome in ("error", "refused") else None,
            "tenon.request.id": record.id,
            "tenon.request.outcome": record.outcome,
            "tenon.tenant": record.tenant,
            "tenon.key": record.key,
            "tenon.time_to_first_token_seconds": record.first_token_seconds,
        }
        if self._prompts and record.prompts:
            found["tenon.prompts"] = [self._decode(ids) for ids in record.prompts]
        return {name: value for name, value in found.items() if value is not None}


def stages(record: Record) -> list[tuple[str, float, float]]:
    """(name, start, end) of what a request went through, as far as it came; seconds of `time.monotonic`."""
    if record.submitted is None:
        return []
    at, found = record.submitted, []
    if record.waits is not None:
        for name, seconds in (("load_adapter", record.waits.adapter_seconds), ("queue", record.waits.place_seconds)):
            # What was measured elsewhere may be a little longer than there is room for here.
            end = min(at + seconds, record.first or at + seconds)
            if end > at:
                found.append((name, at, end))
                at = end
    if record.first is not None:
        found.append(("prefill", at, record.first))
        found.append(("decode", record.first, max(record.last or record.first, record.first)))
    return found


def _ns(record: Record, moment: float) -> int:
    """Nanoseconds since 1970 of a moment of `time.monotonic`."""
    return int((record.began_unix_seconds + moment - record.began) * 1e9)
