"""`python -m disttrain.launch cfg.py`, also under torchrun: run the command `launch` (commands/launch.py)."""

import sys

from disttrain.commands.launch import main

if __name__ == "__main__":
    sys.exit(main())
