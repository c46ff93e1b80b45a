"""Many adapters, one base, one server: `run` puts the rooms together, `jobs` is what the two sides say.

    manage, api     routes            engine   ours, in this process
    front           the way in        pool     ours, in processes of their own
    http            connections       vllm     vLLM
    text, watching  answers, records

The left does not know which of the right makes its sequences; the right knows no text and no HTTP.
"""
