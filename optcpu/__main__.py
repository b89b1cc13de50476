"""``python -m optcpu``: the same as the console script ``optcpu``."""

from __future__ import annotations

import sys

from optcpu.cli import main

if __name__ == "__main__":
    sys.exit(main())
