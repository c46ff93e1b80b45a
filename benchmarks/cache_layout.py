"""What a paged key/value cache costs: decoding 16 sequences with SmolLM2-135M's shape, for each layout of the cache.

The layouts decode the same requests in turns, one pass each, so that what else the machine does meets all of them.

Run: python -m benchmarks.cache_layout
"""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks.report import Row, at_least, write
from tenon.bases.facts import ModelFacts, RopeFacts
from tenon.infer.engine import Engine
from tenon.infer.requests import Request, Token
from tenon.models.cache import KvCache
from tenon.models.decoder import Decoder

SEQUENCES, THREADS, STEPS, LAYERS = 16, 2, 40, 30
FACTS = ModelFacts(
    family="llama",
    layers=LAYERS,
    hidden=576,
    heads=9,
    kv_heads=3,
    head_dim=64,
    feed_forward=1536,
    vocab=49152,
    context_tokens=8192,
    norm_eps=1e-5,
    rope=RopeFacts(theta=100_000.0),
    tied_head=True,
    qk_norm=False,
    rotary_layers=(True,) * LAYERS,
    window_layers=(0,) * LAYERS,
    eos_ids=(0,),
)


class ScatteredCache(KvCache):
    """A cache of which nothing is read in place: every context is gathered."""

    def first_block(self, place: int) -> int | None:
        """No place lies in one piece."""
        del place


def main() -> None:
    """Measure short and long contexts and write tokens/s of each layout."""
    torch.set_num_threads(THREADS)
    decoder = random_decoder()
    rows = [row for prompt_tokens in (64, 512) for row in measure(decoder, prompt_tokens)]
    path = write("cache_layout", rows)
    for row in rows:
        print(f"{row.what}: {row.value:.3g} {row.unit}{f' ({row.bound})' if row.bound else ''}")
    print(path)


def random_decoder() -> Decoder:
    """SmolLM2-135M's shape with random weights, fp32."""
    decoder = Decoder(FACTS, dtype=torch.float32, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for name, tensor in decoder.named_tensors().items():
        drawn = torch.randn(tensor.shape, generator=generator) * 0.02
        tensor.copy_(1 + drawn if "norm" in name else drawn)
    return decoder


def measure(decoder: Decoder, prompt_tokens: int) -> list[Row]:
    """Prompts from half of prompt_tokens up to all of them; contexts are as long when decoding begins."""
    longest = prompt_tokens + 2 * STEPS
    layouts = {"contiguous": (KvCache, longest)}
    layouts |= {f"blocks of {n}": (KvCache, n) for n in (16, 32)}
    layouts |= {f"blocks of {n}, gathered": (ScatteredCache, n) for n in (16, 32)}
    engines = {
        name: filled_engine(decoder, kind, block_tokens, prompt_tokens, longest)
        for name, (kind, block_tokens) in layouts.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(STEPS - 1):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.step()
            seconds[name].append(time.perf_counter() - start)
    speeds = {name: SEQUENCES / statistics.median(times) for name, times in seconds.items()}
    about = f"contexts of about {prompt_tokens * 3 // 4} tokens"
    rows = [Row(f"{about}, {name}", speed, "tokens/s") for name, speed in speeds.items()]
    ratio = speeds["blocks of 16"] / speeds["contiguous"]
    return [*rows, at_least(f"{about}, blocks of 16 against contiguous", ratio, "times", 0.97)]


def filled_engine(decoder: Decoder, kind: type[KvCache], block_tokens: int, prompt_tokens: int, longest: int) -> Engine:
    """An engine that has read all prompts and decodes from now on."""
    cache = kind(
        FACTS,
        places=SEQUENCES,
        tokens=longest,
        dtype=decoder.dtype,
        device=decoder.device,
        block_tokens=block_tokens,
    )
    generator = torch.Generator().manual_seed(1)
    told: set[int] = set()

    def tell(index: int, token: Token) -> None:
        assert token.logprob <= 0
        told.add(index)

    engine = Engine(decoder, None, cache=cache, pass_tokens=1024, on_token=tell)
    for index in range(SEQUENCES):
        length = prompt_tokens // 2 + index * prompt_tokens // (2 * SEQUENCES)
        ids = torch.randint(3, FACTS.vocab, (length,), generator=generator).tolist()
        engine.submit(index, Request(ids, max_new_tokens=10 * STEPS))
    while len(told) < SEQUENCES:
        engine.step()
    return engine


if __name__ == "__main__":
    main()
