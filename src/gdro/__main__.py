"""`python -m gdro` is `gdro`."""

import sys

from gdro.cli import main

if __name__ == "__main__":
    sys.exit(main())
