"""`python -m nlpfast` is the command `nlpfast`."""

import sys

from nlpfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
