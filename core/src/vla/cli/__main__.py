"""`python -m vla.cli`, the same as `vla`."""

import sys

from vla.cli import main

sys.exit(main())
