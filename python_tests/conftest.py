"""Settings of all tests; in a module, since processes that tests start need them too."""

import process_settings  # noqa: F401
