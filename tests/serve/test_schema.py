"""The server against its own OpenAPI, as schemathesis makes it up; benchmarks/serve_schemathesis.py asks far more."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.serve_schemathesis import SCHEMATHESIS, tried
from tests.serve.house import House


@pytest.mark.slow
@pytest.mark.parametrize("keyed", [False, True])
def test_what_the_schema_allows_and_forbids_is_answered_as_it_says(house: House, tmp_path: Path, keyed: bool) -> None:
    if not SCHEMATHESIS.is_file():
        pytest.skip(f"{SCHEMATHESIS} is not there: sh benchmarks/prepare_clients.sh")
    found = tried(house, tmp_path, phases="fuzzing", examples=5, keyed=keyed)
    assert found.failures == 0, found.text
    assert found.cases >= 30
