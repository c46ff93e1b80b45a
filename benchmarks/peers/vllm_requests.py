"""vLLM at the work `requests-64` of serve_gpu, in an environment of its own: `python vllm_requests.py OUT.json`.

The same shape with random weights, prompts of random token ids, greedy, answers of a fixed length. Measured is one call
of `LLM.generate` for all of them, from the first prompt to the last token, after one such call to warm up.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROWS, TOKENS_IN, TOKENS_OUT, REPEAT = 64, 512, 256, 3
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def main() -> None:
    """Measure and write."""
    import torch
    import vllm

    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(CONFIG))
    engine = vllm.LLM(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=ROWS,
        gpu_memory_utilization=0.8,
        enable_prefix_caching=False,
    )
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=TOKENS_OUT, ignore_eos=True, detokenize=False)
    generator = torch.Generator().manual_seed(ROWS)
    seconds = []
    for _ in range(REPEAT + 1):
        ids = torch.randint(10, CONFIG["vocab_size"], (ROWS, TOKENS_IN), generator=generator).tolist()
        begin = time.perf_counter()
        answers = engine.generate([{"prompt_token_ids": one} for one in ids], sampling, use_tqdm=False)
        seconds.append(time.perf_counter() - begin)
        assert all(len(answer.outputs[0].token_ids) == TOKENS_OUT for answer in answers)
    found = {
        "version": vllm.__version__,
        "tokens_a_second": ROWS * TOKENS_OUT / statistics.median(seconds[1:]),
        "seconds": seconds[1:],
    }
    Path(sys.argv[1]).write_text(json.dumps(found))
    print(found)


if __name__ == "__main__":
    main()
