"""`python -m ambassador` and the console script."""

import sys

from ambassador.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
