"""The one distinction that loading makes: a checkpoint that is damaged, and one that cannot be judged.

*Errors*: `DamagedError` says that the bytes are not those of a checkpoint: the next older one is used. Any
other CheckpointError (no permission, a format of a newer release, a directory that one rank does not see)
stops the run, for going back would lose steps that are not lost.
"""

from disttrain.errors import CheckpointError


class DamagedError(CheckpointError):
    """The content of a checkpoint is not what was written; a person gets the file and what is wrong with it."""
