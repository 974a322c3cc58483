"""`python -m disttrain COMMAND`: run the command `disttrain COMMAND` (commands/main.py)."""

import sys

from disttrain.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
