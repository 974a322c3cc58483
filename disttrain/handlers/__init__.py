"""Handlers around the training loop: they log, validate, save and stop, and they watch over the ranks.

A handler is any callable; these are the ones that disttrain ships. `Checkpoint` and `DiskSaver` are for every program.
The other handlers serve `disttrain launch` (run/), and can serve a program of your own.

step_end           does everything that is due at the end of a step: losses, validation, checkpoint, stop
losses             fetches the losses of all slots, and makes a line for each step
values             values beside the loss: kept on the device, fetched with the losses, folded over the slots
bad_steps          finds steps whose loss or gradient is not finite, or whose loss jumps
best               remembers the best evaluation, whose checkpoint is kept
early_stop         finds that results no longer improve
checkpoint         saves objects while an engine runs, and loads them again: `Checkpoint`
checkpoint_moment  the moments at which `Checkpoint` is called, and what it may save then
rotation           chooses the saved checkpoints that stay
stateful           turns named objects into their states and back
curves             writes the curves in metrics/, as JSONL and for TensorBoard
progress           shows a progress bar, or plain lines
posts              posts the progress where an operator of Kubernetes asks for it
preemption         turns signals into a save and a stop on which all ranks agree
compilations       counts the programs that an XLA device compiles
watchdog           stops a rank that makes no progress, and reports it
stragglers         reports ranks that are slower than the others

line       the results of one step: its number, epoch, loss, gradient norm, learning rate and values
window     the steps from one log point to the next, over which metrics of the training data are computed
value      a number of a slot or a step beside its loss, which the config's forward returns
update     the gradient norm of a step, and the reason if its update was left out
pace       the newest step, and the samples per second
passenger  an object whose data travels with the losses, and so needs no collective of its own
request    NOTHING, SAVE or STOP; the ranks agree on one in each step
"""

from disttrain.checkpoint import DirectorySaver, DiskSaver
from disttrain.handlers.checkpoint import Checkpoint

__all__ = ["Checkpoint", "DirectorySaver", "DiskSaver"]
