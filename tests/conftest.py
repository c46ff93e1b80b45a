"""Fixtures of the whole suite: the public data sets beside the checkout, and settings of one test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tenon.settings import Settings

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU, tests that need one are skipped. torch is imported when there are any, and only then."""
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data sets; tests that need it are skipped where it is absent."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the public data sets (../shared/data) are not on this machine")
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of their own for one test: nothing outside the temporary folder, no network."""
    return Settings(home=tmp_path / "home", cache=tmp_path / "cache", offline=True, threads=1, debug=False)
