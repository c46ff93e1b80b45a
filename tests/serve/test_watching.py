"""What a server tells of its requests: metrics with bounded labels, a log, traces; never a prompt, never a key."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest
from openai import OpenAI
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tenon.serve.front.access import Access
from tenon.serve.jobs import Waits
from tenon.serve.watching.metrics import MOST_MODELS, Labels
from tenon.serve.watching.records import Record
from tenon.serve.watching.request_log import RequestLog, line_of
from tenon.serve.watching.tracing import Tracing, otlp_processor, stages
from tenon.tenants.keys import KeyStore, Limits
from tenon.tenants.usage import UsageBook
from tests.conftest import REPOSITORY
from tests.serve.house import House, Running, serving, wait_until

SECRET = "the leather at the lake"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Watched:
    """A server with keys whose requests are logged and traced."""

    def __init__(self, running: Running, store: KeyStore, lines: list[str], spans: InMemorySpanExporter) -> None:
        self.running, self.store, self.lines, self.spans = running, store, lines, spans

    def client(self, tenant: str, **changes: Any) -> OpenAI:
        typed, _ = self.store.create(tenant, **changes)
        return OpenAI(base_url=self.running.url, api_key=typed, max_retries=0, timeout=30)

    def series(self) -> dict[str, float]:
        lines = [line for line in self.running.ask("/metrics")[1].splitlines() if not line.startswith("#")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    def line(self, name: str) -> dict[str, Any]:
        """The line of the request of that name."""
        wait_until(lambda: any(f'"id":"{name}"' in line for line in self.lines))
        return next(json.loads(line) for line in self.lines if f'"id":"{name}"' in line)


def test_waits_of_sequences_are_counted(house: House) -> None:
    """By the engine, all the way to /metrics."""
    with serving(house, rows=1, slots=1) as running:
        for model in ("low", "base"):
            assert running.ask("/v1/completions", {"model": model, "prompt": "the", "max_tokens": 2})[0] == 200
        text = running.ask("/metrics")[1]
    lines = [line.partition(" ")[::2] for line in text.splitlines() if not line.startswith("#")]
    told = {name: float(value) for name, value in lines}
    assert told["tenon_queue_seconds_count"] == told["tenon_adapter_wait_seconds_count"] == 2
    assert 0 < told["tenon_adapter_wait_seconds_sum"] == pytest.approx(told["tenon_adapter_wait_seconds_most"])


def nothing(_ids: object) -> str:
    raise AssertionError("prompts were not asked for")


@pytest.fixture(scope="module")
def watched(house: House, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    home = tmp_path_factory.mktemp("watched")
    store, lines, spans = KeyStore(home / "keys.json"), [], InMemorySpanExporter()
    log = RequestLog(lines.append, decode=nothing)
    tracing = Tracing(SimpleSpanProcessor(spans), version="0", decode=nothing)
    access = Access(store, UsageBook(home / "usage.db"))
    with serving(house, access=access, observers=(log, tracing)) as running:
        yield Watched(running, store, lines, spans)
    log.close()


def ask(client: OpenAI, name: str, **fields: Any) -> Any:
    asked = {"model": "low", "prompt": SECRET, "max_tokens": 4, "extra_body": {"ignore_eos": True}, **fields}
    return client.completions.create(**asked, extra_headers={"X-Request-Id": name, "traceparent": PARENT})


def test_a_request_is_counted_logged_and_traced(watched: Watched) -> None:
    with watched.client("acme") as client:
        found = ask(client, "one", n=2)
    key = next(key.id for key in watched.store.keys().values() if key.tenant == "acme")
    line = watched.line("one")
    assert line["status"] == 200 and line["outcome"] == "ok" and line["route"] == "/v1/completions"
    assert (line["tenant"], line["key"], line["model"], line["sequences"]) == ("acme", key, "low@1", 2)
    assert line["completion_tokens"] == 8 == found.usage.completion_tokens and line["finish"] == ["length"] * 2
    assert line["prompt_tokens"] == found.usage.prompt_tokens
    assert 0 < line["first_token_seconds"] < line["seconds"] and line["token_seconds"] > 0 and "error" not in line
    series = watched.series()
    assert series['tenon_tenant_requests_total{outcome="ok",tenant="acme"}'] == 1
    assert series['tenon_tenant_completion_tokens_total{tenant="acme"}'] == 8
    assert series['tenon_tenant_time_to_first_token_seconds_count{tenant="acme"}'] == 1
    (span,) = [span for span in watched.spans.get_finished_spans() if span.name == "text_completion low@1"]
    assert span.parent is not None and f"{span.parent.trace_id:032x}" == PARENT.split("-")[1]
    told = dict(span.attributes or {})
    assert told["gen_ai.operation.name"] == "text_completion" and told["gen_ai.response.model"] == "low@1"
    assert told["gen_ai.usage.output_tokens"] == 8 and told["tenon.request.id"] == "one"
    assert told["gen_ai.response.finish_reasons"] == ("length", "length") and told["http.response.status_code"] == 200
    assert span.context is not None
    mine = span.context.span_id
    inside = [each for each in watched.spans.get_finished_spans() if each.parent and each.parent.span_id == mine]
    assert {"prefill", "decode"} <= {each.name for each in inside}
    for each in inside:
        times = (span.start_time, each.start_time, each.end_time, span.end_time)
        assert None not in times and list(times) == sorted(time for time in times if time is not None)


def test_what_is_refused_cut_off_or_streamed_is_told_so(watched: Watched) -> None:
    with watched.client("refused", limits=Limits(requests_per_minute=1)) as client:
        with ask(client, "cut", stream=True, max_tokens=200) as stream:
            next(iter(stream))
        with pytest.raises(openai.RateLimitError):
            ask(client, "limited")
        with pytest.raises(openai.NotFoundError):
            ask(client, "unknown", model="nobody")
    line = watched.line("cut")
    assert line["stream"] is True and line["outcome"] == "cancelled" and line["status"] == 200
    assert 1 <= line["completion_tokens"] < 200 and "finish" not in line
    assert watched.line("limited")["error"] == "rate_limit_exceeded" and watched.line("limited")["outcome"] == "refused"
    assert "model" not in watched.line("unknown") and watched.line("unknown")["error"] == "model_not_found"
    series = watched.series()
    assert series['tenon_tenant_requests_total{outcome="cancelled",tenant="refused"}'] == 1
    assert series['tenon_tenant_requests_total{outcome="refused",tenant="refused"}'] == 2
    assert series['tenon_errors_total{code="rate_limit_exceeded"}'] == 1


def test_a_flood_of_names_that_nobody_registered_makes_no_series(watched: Watched) -> None:
    with watched.client("flood") as client:

        def flood(number: int) -> None:
            with pytest.raises(openai.NotFoundError):
                ask(client, f"name-{number}", model=f"made-up-{number}@{number}")
            watched.running.ask(f"/v1/models/made-up-{number}")
            watched.running.ask(f"/v1/route-{number}")
            for method in (f"VERB{number}", "GET"):
                connection = watched.running.connect()
                connection.request(method, "/v1/models", headers={"Authorization": f"Bearer tn-{number}"})
                connection.getresponse().read()
                connection.close()

        flood(0)
        before = set(watched.series())
        for number in range(1, 60):
            flood(number)
    assert set(watched.series()) == before
    assert not [name for name in before if re.search(r"made-up|VERB|route-\d|tn-", name)]
    spans = {span.name for span in watched.spans.get_finished_spans()}
    assert not [name for name in spans if re.search(r"made-up|VERB|route-\d", name)]


def test_what_is_removed_is_dropped(house: House, watched: Watched) -> None:
    house.register("passing", rank=2, seed=70)
    typed, key = watched.store.create("leaving")
    with OpenAI(base_url=watched.running.url, api_key=typed, max_retries=0) as client:
        ask(client, "passing", model="passing")
    assert [name for name in watched.series() if 'model="passing@1"' in name]
    assert [name for name in watched.series() if 'tenant="leaving"' in name]
    house.registry.remove("passing@1")
    watched.store.revoke(key.id)
    assert not [name for name in watched.series() if "passing" in name or "leaving" in name]


def test_labels_are_bounded_and_an_idle_one_makes_room() -> None:
    now, dropped = [0.0], []
    labels = Labels(MOST_MODELS, dropped.append, clock=lambda: now[0])
    for number in range(3 * MOST_MODELS):
        assert labels.of(f"m@{number}") == (f"m@{number}" if number < MOST_MODELS else "other")
    now[0] = 599.0
    assert labels.of("m@0") == "m@0" and labels.of("late") == "other" and not dropped
    now[0] = 601.0
    assert labels.of("late") == "late" and dropped == ["m@1"], "the one that was idle for longest"
    labels.keep({"late", "m@0"})
    assert len(dropped) == MOST_MODELS - 1 and labels.of("new") == "new"


def test_neither_prompts_nor_keys_are_told_anywhere(watched: Watched) -> None:
    typed, _ = watched.store.create("private")
    with OpenAI(base_url=watched.running.url, api_key=typed, max_retries=0, timeout=30) as client:
        ask(client, "plain")
        ask(client, "streamed", stream=True).close()
        client.chat.completions.create(model="low", messages=[{"role": "user", "content": SECRET}], max_tokens=2)
        errors = []
        for fields in (
            {"prompt": [SECRET, 5]},
            {"temperature": SECRET},
            {"n": 100},
            {"max_tokens": 10_000},
            {SECRET: 1},
        ):
            try:
                ask(client, "bad", **{key: value for key, value in fields.items() if key != SECRET})
            except openai.APIStatusError as error:
                errors.append(error.response.text)
    wrong = f"{typed[:-3]}xyz"
    for key in (wrong, f"{typed} ", typed.upper()):
        with (
            OpenAI(base_url=watched.running.url, api_key=key, max_retries=0) as client,
            pytest.raises(openai.APIError) as e,
        ):
            ask(client, "denied")
        errors.append(str(e.value))
    watched.line("denied")
    told = [*watched.lines, *(span.to_json() for span in watched.spans.get_finished_spans()), *errors]
    told.append(watched.running.ask("/metrics")[1])
    assert len(errors) >= 6
    for text in told:
        assert SECRET not in text and "leather" not in text and typed not in text and wrong not in text
        assert typed.rpartition("-")[2] not in text


def test_prompts_are_logged_where_they_are_asked_for(house: House) -> None:
    lines: list[str] = []
    log = RequestLog(lines.append, decode=house.renderer.tokenizer.decode, prompts=True)
    with serving(house, observers=(log,), keep_prompts=True) as running:
        running.ask("/v1/completions", {"model": "base", "prompt": SECRET, "max_tokens": 1})
    log.close()
    assert json.loads(lines[0])["prompts"] == [SECRET]


def test_a_slow_or_broken_disk_stops_nobody_and_what_is_lost_is_said() -> None:
    gate, lines, broken = threading.Event(), [], [True]

    def write(line: str) -> None:
        gate.wait(10)
        if broken[0]:
            broken[0] = False
            raise OSError("no space")
        lines.append(json.loads(line))

    log = RequestLog(write, decode=nothing)
    for number in range(10_100):
        log.ended(Record(id=f"r{number}"))
    gate.set()
    log.close()
    assert len(lines) + sum(line.get("dropped_before", 0) for line in lines) >= 10_099
    assert lines[0]["dropped_before"] >= 1


def test_stages_are_as_far_as_a_request_came() -> None:
    whole = Record(began=0.0, submitted=1.0, first=5.0, last=9.0, waits=Waits(1.5, 0.5))
    assert stages(whole) == [
        ("load_adapter", 1.0, 2.5),
        ("queue", 2.5, 3.0),
        ("prefill", 3.0, 5.0),
        ("decode", 5.0, 9.0),
    ]
    assert stages(Record()) == []
    assert stages(Record(submitted=1.0, waits=Waits(2.0, 0.0))) == [("load_adapter", 1.0, 3.0)]
    assert line_of(Record(id='a"\n', began=1.0, ended=1.5))["seconds"] == 0.5


def test_spans_reach_a_collector_over_http(house: House) -> None:
    got: list[ExportTraceServiceRequest] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf"
            got.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{collector.server_address[1]}"
        tracing = Tracing(otlp_processor(endpoint), version="1.2", decode=nothing)
        with serving(house, observers=(tracing,)) as running:
            running.ask("/v1/chat/completions", {"model": "high", "messages": [{"role": "user", "content": "x"}]})
            running.ask("/health")
        tracing.close()
        collector.shutdown()
    (resource,) = [each for request in got for each in request.resource_spans]
    assert ("service.name", "tenon") in {(each.key, each.value.string_value) for each in resource.resource.attributes}
    names = [span.name for scope in resource.scope_spans for span in scope.spans]
    assert "chat high@1" in names and "prefill" in names and not [name for name in names if "health" in name]


def test_the_page_lists_every_metric(running: Running) -> None:
    page = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([^|]*)\|", page, flags=re.MULTILINE)
    running.ask("/v1/completions", {"model": "low", "prompt": "x", "max_tokens": 2})
    text = running.ask("/metrics")[1]
    kinds = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, flags=re.MULTILINE))
    kinds = {name: kind for name, kind in kinds.items() if not name.endswith("_created")}
    assert {name: kind for name, kind, _ in rows} == kinds and len(rows) > 20
    for name, _, labels in rows:
        wanted = set(re.findall(r"`(\w+)`", labels))
        for found in re.findall(rf"^{name}(?:_count|_sum)?{{([^}}]*)}}", text, flags=re.MULTILINE):
            assert {part.partition("=")[0] for part in found.split(",")} == wanted, name
