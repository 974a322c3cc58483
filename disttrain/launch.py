"""`python -m disttrain.launch cfg.py`, also under torchrun: run the command `launch` (commands/launch.py)."""

import sys

from disttrain.process import begin_process

if __name__ == "__main__":
    begin_process()  # before the import below, which imports torch and numpy

from disttrain.commands.launch import main

if __name__ == "__main__":
    sys.exit(main())
