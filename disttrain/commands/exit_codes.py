"""Define the exit codes of the commands: 0 is success, and 2 is a command that cannot be run as it was typed."""

from disttrain.errors import Interrupted

USAGE = 2
"""Of every command."""
COMPLETED, FAILED, INTERRUPTED = 0, 1, Interrupted.exit_code
"""Of `launch`."""
SAME, DIFFERENT = 0, 1
"""Of `compare` and `verify`."""
ALL_GOOD, DAMAGE_FOUND = 0, 1
"""Of `checkpoint`."""
