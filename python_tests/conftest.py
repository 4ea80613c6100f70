"""Settings of all tests; in a module, since processes that tests start need them too."""

import gc

import process_settings  # noqa: F401


def pytest_collection_finish():
    """Keep what imports created out of later collections, which take a second otherwise."""
    gc.collect()
    gc.freeze()
