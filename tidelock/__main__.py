"""`python -m tidelock`."""

import sys

from tidelock.cli.main import main

sys.exit(main())
