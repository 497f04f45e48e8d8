"""`python -m clusterpool.cli`, the same as the command `clusterpool`."""

from __future__ import annotations

import sys

from clusterpool.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
