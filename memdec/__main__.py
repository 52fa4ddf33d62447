"""`python -m memdec` is the command `memdec`."""

import sys

from memdec.cli import main

sys.exit(main())
