import gc

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Look for garbage rarely, and not among what was imported: tracing with torch takes a sixth longer otherwise."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
