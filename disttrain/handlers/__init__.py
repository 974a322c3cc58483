"""What happens around the loop, one small file each. A handler is any callable; these are the ones that ship.

`Checkpoint` and `DiskSaver` are for everybody; the others serve the recipe and may serve you.
"""

from disttrain.checkpoint import DirectorySaver, DiskSaver
from disttrain.handlers.checkpoint import Checkpoint

__all__ = ["Checkpoint", "DirectorySaver", "DiskSaver"]
