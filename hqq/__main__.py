"""`python -m hqq` is the command `hqq`."""

from __future__ import annotations

import sys

from hqq.cli import main

if __name__ == "__main__":
    sys.exit(main())
