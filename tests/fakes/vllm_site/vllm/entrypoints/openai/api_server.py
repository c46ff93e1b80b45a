"""A stand-in for vLLM's server: its options, its routes, its chunks; what follows a token is the token plus one.

An adapter adds its rank instead of one. What it is asked is written to FAKE_VLLM_LOG, a JSON object a line.

It fails as prompts say: one that begins with DIES ends the process before it answers, DIES_LATER after two tokens, both
only as long as the file FAKE_VLLM_MERCY does not exist; REFUSED is answered with 400. FAKE_VLLM_FAILS: what to say and
end with at the start. FAKE_VLLM_DUMB: it answers nothing. FAKE_VLLM_SECONDS: between tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

DIES, DIES_LATER, REFUSED = 13, 14, 15
VOCABULARY = 288
PAUSE_SECONDS = float(os.environ.get("FAKE_VLLM_SECONDS", "0.001"))
loaded: dict[str, int] = {}


def note(**fields: Any) -> None:
    if "FAKE_VLLM_LOG" in os.environ:
        with Path(os.environ["FAKE_VLLM_LOG"]).open("a") as file:
            file.write(json.dumps(fields) + "\n")


def failure(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "Error", "param": None, "code": status}}, status)


def merciful() -> bool:
    return Path(os.environ.get("FAKE_VLLM_MERCY", "/nowhere")).exists()


async def health(_request: Request) -> Response:
    return Response()


async def metrics(_request: Request) -> Response:
    names = {"kv_cache_usage_perc": 0.25, "num_preemptions_total": 3.0, "prefix_cache_hits_total": 128.0}
    return PlainTextResponse("".join(f'vllm:{name}{{model_name="base"}} {value}\n' for name, value in names.items()))


async def load(request: Request) -> Response:
    body = await request.json()
    folder = Path(body["lora_path"])
    note(route="load", name=body["lora_name"], path=str(folder), files=sorted(p.name for p in folder.iterdir()))
    rank = json.loads((folder / "adapter_config.json").read_text())["r"]
    if body["lora_name"] in loaded or len(loaded) == options.max_loras:
        return failure(400, "it is there, or there is no room")
    if rank == REFUSED:
        return failure(500, "this rank is not liked here")
    loaded[body["lora_name"]] = rank
    return PlainTextResponse("Success")


async def unload(request: Request) -> Response:
    body = await request.json()
    note(route="unload", name=body["lora_name"])
    return PlainTextResponse("Success") if loaded.pop(body["lora_name"], None) else failure(404, "it is not there")


async def completions(request: Request) -> Response:
    body = await request.json()
    note(route="completions", **body)
    if body["model"] != "base" and body["model"] not in loaded:
        return failure(404, f"The model `{body['model']}` does not exist.")
    if os.environ.get("FAKE_VLLM_DUMB"):
        return failure(500, "not today")
    first = body["prompt"][0]
    if first == REFUSED:
        return failure(400, "this is not understood")
    if first == DIES and not merciful():
        os._exit(3)
    return StreamingResponse(chunks(body, request), media_type="text/event-stream")


async def chunks(body: dict[str, Any], request: Request) -> AsyncIterator[str]:
    step = loaded.get(body["model"], 1)
    token, made = body["prompt"][-1], 0
    try:
        while True:
            token, made = (token + step) % VOCABULARY, made + 1
            stopped = token in body.get("stop_token_ids", ())
            finish = "stop" if stopped else "length" if made == body["max_tokens"] else None
            echoed = body["prompt"] if body.get("echo") and made == 1 else []
            yield f"data: {json.dumps(chunk([token], finish, body.get('logprobs') or 0, echoed))}\n\n"
            if finish is not None:
                break
            if made == 2 and body["prompt"][0] == DIES_LATER and not merciful():
                os._exit(3)
            await asyncio.sleep(PAUSE_SECONDS)
        yield "data: [DONE]\n\n"
    except asyncio.CancelledError:
        note(route="aborted", prompt=body["prompt"], made=made)
        raise


def chunk(tokens: list[int], finish: str | None, top: int, echoed: list[int]) -> dict[str, Any]:
    scored = [*echoed, *tokens]
    scores = {
        "tokens": [f"token_id:{t}" for t in scored],
        "token_logprobs": [None if echoed and i == 0 else -t / 1000 for i, t in enumerate(scored)],
        # The token itself comes first, then the likeliest.
        "top_logprobs": [
            None if echoed and i == 0 else {f"token_id:{n}": -n / 1000 for n in (t, *range(top))}
            for i, t in enumerate(scored)
        ],
        "text_offset": [0] * len(scored),
    }
    return {"choices": [{"index": 0, "text": "", "logprobs": scores, "finish_reason": finish, "token_ids": tokens}]}


class Locked:
    """Nobody without the key comes in."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            headers = dict(scope["headers"])
            if headers.get(b"authorization") != f"Bearer {os.environ['VLLM_API_KEY']}".encode():
                await failure(401, "Unauthorized")(scope, receive, send)
                return
        await self.app(scope, receive, send)


ROUTES = [
    Route("/health", health),
    Route("/metrics", metrics),
    Route("/v1/load_lora_adapter", load, methods=["POST"]),
    Route("/v1/unload_lora_adapter", unload, methods=["POST"]),
    Route("/v1/completions", completions, methods=["POST"]),
]
parser = argparse.ArgumentParser()
for name in ("model", "served-model-name", "host", "dtype", "generation-config"):
    parser.add_argument(f"--{name}", required=True)
for name in ("port", "max-model-len", "max-num-seqs", "max-num-batched-tokens", "kv-cache-memory-bytes", "max-loras"):
    parser.add_argument(f"--{name}", required=True, type=int)
for name in ("max-lora-rank", "max-logprobs", "shutdown-timeout"):
    parser.add_argument(f"--{name}", required=True, type=int)
for name in ("enable-lora", "enable-prefix-caching", "disable-uvicorn-access-log"):
    parser.add_argument(f"--{name}", required=True, action="store_true")
options = argparse.Namespace()

if __name__ == "__main__":
    parser.parse_args(namespace=options)
    note(route="start", pid=os.getpid(), command=sys.argv, base=sorted(p.name for p in Path(options.model).iterdir()))
    if os.environ.get("FAKE_VLLM_FAILS"):
        sys.exit(os.environ["FAKE_VLLM_FAILS"])
    app = Locked(Starlette(routes=ROUTES))
    uvicorn.run(app, host=options.host, port=options.port, log_config=None, access_log=False)
