"""`python -m gossamer` is the command line, also where the scripts of the environment are not on the path."""

import sys

from gossamer.server.cli import main

if __name__ == "__main__":
    sys.exit(main())
