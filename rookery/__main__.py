"""`python -m rookery`, the same as the console script."""

import sys

from rookery.cli import main

sys.exit(main())
