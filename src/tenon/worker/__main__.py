"""`python -m tenon.worker KIND TARGET`: the real worker. The pipeline, and torch with it, comes once there is work."""

from __future__ import annotations

import sys

from tenon.worker.loop import Pipeline, work


def _load_pipeline() -> Pipeline:
    from tenon import pipeline

    return pipeline


if __name__ == "__main__":
    sys.exit(work(sys.argv[1:], _load_pipeline))
