"""`python -m fastfuse` is the command line."""

import sys

from fastfuse.cli import main

if __name__ == "__main__":
    sys.exit(main())
