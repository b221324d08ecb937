"""python -m dytrun."""

import sys

from dytrun.cli import main

if __name__ == "__main__":
    sys.exit(main())
