"""HOW gradients meet: over microbatches, slots and ranks, so that a step's result is a function of its position.

`Slots` says which slots of a run this rank runs. `SlotGradients` makes their gradients the same bits on any number of
ranks, `Accumulation` adds up microbatches of one rank; both obey `Gradients`, which the step body calls. `TreeReduce`
is the reduction alone, for somebody's own loop.
"""

from disttrain.parallel.base import Accumulation, Gradients
from disttrain.parallel.ddp import SlotGradients
from disttrain.parallel.slots import Slots, TreeSum, mean_over_slots
from disttrain.parallel.tree import TreeReduce

__all__ = ["Accumulation", "Gradients", "SlotGradients", "Slots", "TreeReduce", "TreeSum", "mean_over_slots"]
