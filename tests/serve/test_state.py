"""What the server says of itself: models with their state, metrics, the OpenAPI document."""

from __future__ import annotations

from openai import OpenAI

from tests.serve.house import House, Running


def test_models_with_their_state(house: House, running: Running, client: OpenAI) -> None:
    def states() -> dict[str, str]:
        return {model["id"]: model["state"] for model in running.ask("/v1/models")[1]["data"]}

    assert states() == dict.fromkeys(("low", "low@1", "high", "high@1"), "on disk") | {"tiny": "resident"}
    client.completions.create(model="low", prompt="the", max_tokens=1)
    assert states()["low"] == states()["low@1"] == "resident" and states()["high"] == "on disk"
    found = client.models.retrieve("low")
    assert found.id == "low" and found.owned_by == "tenon"
    status, body = running.ask("/v1/models/high@1")
    assert (status, body["root"], body["parent"], body["rank"]) == (200, "high@1", "tiny", 7)
    assert running.ask("/v1/models/none")[0] == running.ask("/v1/models/a/../b")[0] == 404
    # The base's name is its own, whatever is registered.
    house.register("tiny", rank=1, seed=9)
    answer = client.completions.create(model="tiny", prompt="the", max_tokens=1)
    assert answer.model == "tiny" and client.completions.create(model="tiny@1", prompt="x").model == "tiny@1"


def test_metrics_count_what_was_done(running: Running, client: OpenAI) -> None:
    def read() -> dict[str, float]:
        lines = [line for line in running.ask("/metrics")[1].splitlines() if not line.startswith("#")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    before = read()
    found = client.completions.create(
        model="high", prompt="the lake", max_tokens=7, n=2, extra_body={"ignore_eos": True}
    )
    running.ask("/v1/completions", {"model": "nobody", "prompt": "x"})
    after = read()
    assert found.usage is not None and found.usage.completion_tokens == 14

    def grown(key: str) -> float:
        return after[key] - before.get(key, 0.0)

    assert grown('tenon_completion_tokens_total{model="high@1"}') == 14
    assert grown('tenon_prompt_tokens_total{model="high@1"}') == found.usage.prompt_tokens
    assert grown('tenon_requests_total{route="/v1/completions",status="200"}') == 1
    assert grown('tenon_requests_total{route="/v1/completions",status="404"}') == 1
    assert grown('tenon_time_to_first_token_seconds_count{model="high@1"}') == 1
    assert grown('tenon_model_requests_total{model="high@1",outcome="ok"}') == 1
    assert grown('tenon_errors_total{code="model_not_found"}') == 1
    assert after["tenon_sequences_running"] == 0 and after["tenon_adapters_resident"] >= 1
    assert not [key for key in after if "nobody" in key]


def test_the_openapi_document_has_every_route_with_its_errors(running: Running) -> None:
    status, document = running.ask("/openapi.json")
    assert status == 200
    paths = document["paths"]
    assert set(paths) >= {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/ready", "/metrics"}
    chat = paths["/v1/chat/completions"]["post"]
    assert set(chat["responses"]) == {"200", "400", "401", "403", "404", "408", "413", "422", "429", "500", "503"}
    refused = chat["responses"]["422"]["content"]["application/json"]["schema"]["$ref"]
    assert refused.endswith("ErrorBody")
    body = chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    assert document["components"]["schemas"][body]["additionalProperties"] is False
