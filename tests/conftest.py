"""Laws are tested on examples that are the same in every run, so that a red run is somebody's change and never the day's luck.
`make fuzz` looks for new ones; what it finds becomes a test by name."""

import os

from hypothesis import settings

settings.register_profile("fixed", derandomize=True, database=None)
settings.register_profile("fuzz", print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
