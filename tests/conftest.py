"""Where the optional real data lie: MSCLIP_SHARED, or a folder `shared` beside the checkout."""

import os
from pathlib import Path

import pytest


def _shared(part: str) -> Path:
    root = Path(os.environ.get("MSCLIP_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (root / part).is_dir():
        pytest.skip(f"no {part} at {root / part}; set MSCLIP_SHARED to the folder that holds it")
    return root / part


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real image-text data (Flickr8k, emoji art, labelled sets)."""
    return _shared("data")


@pytest.fixture(scope="session")
def shared_fixtures() -> Path:
    """Recorded outputs of published models."""
    return _shared("fixtures")
