"""HOW gradients meet: over microbatches, slots and ranks, with the same bits on any number of ranks.

    slots               the slots of a run, the rank that owns each, and the binary tree over them; pure Python
    tree                sums tensors along that tree over the ranks; a training loop of your own can use it
    strategies          makes one object per strategy: the layout of a model and its gradients
    gradients           the protocol of gradients that the step body uses; accumulation on one rank
    over_slots          a step over the slots of this rank: what all of the next four do alike
    ddp                 gradients of replicated parameters, over torch.distributed
    buckets             sends a rank's gradients in pieces while the backward of its last slot goes on
    fsdp                gradients of sharded parameters, all gathered for a step
    fsdp_modules        gradients of sharded parameters, gathered module by module
    xla_gradients       gradients on XLA devices
    weights             the weights of slots: a mean over all targets of the global batch
    global_loss         a loss over the embeddings of all slots, whose gradient each slot gets its part of
    leaving_out         leaves whole steps out of a run
    window              keeps the gradients of an update that is under way, for a checkpoint
    layout              the protocol of layouts; parameters whole on every rank
    fsdp_layout         parameters that FSDP2 cuts over the ranks
    groups              the groups of modules whose parameters FSDP2 gathers together
    spmd_layout         parameters that are cut over the XLA devices of one rank
    owners              assembles cut tensors, each on one rank, and sends them back in parts
    whole_steps         steps an optimizer that looks across a parameter over whole parameters, each on one rank
    counterparts        finds the tensor of this run that corresponds to a tensor of a checkpoint
    optimizers          the optimizers of several updates as one object
    optimizer_state     loads an optimizer's state with the dtypes that were saved
    model_checks        refuses models that cannot have the same bits on any number of ranks
    slot_checks         refuses forwards that change parameters, and loops that are left before their end
    shard_checks        refuses forwards that cannot run module by module under FSDP2
    audit               lets another rank compute each slot of a step again, and compares the gradients
    audit_exchange      holds what ranks send in an audited step against what arrives
    audit_verdicts      tells which rank is faulty, from the answers of several ranks; pure Python
    packed_batches      a microbatch as bytes, for another rank
    rehearsal           runs the first slot twice, and refuses a forward whose gradients then differ
    user_collectives    refuses collectives in the user's code
    fingerprints        numbers that tell whether a tensor has changed
    buffers             makes BatchNorm's statistics independent of the number of ranks
    recomputation       activation checkpointing: chosen modules run again in the backward
    trained_parameters  the parameters that a run trains, and a warning for those that no slot uses

| noun   | meaning                                                                                             |
|--------|-----------------------------------------------------------------------------------------------------|
| meet   | gradients meet when they have been summed over all slots of all ranks                               |
| node   | a range of slots [lo, hi) of the binary tree; its value is the sum over these slots                 |
| part   | the value of one node, as far as one rank has it                                                    |
| bucket | a piece of the gradient that is reduced on its own: some parameters' gradients, or an FSDP group's   |
| group  | the modules whose parameters FSDP2 gathers together (not the process group)                         |
| layout | the distribution of a model's parameters over ranks and devices                                     |
| whole  | of a tensor: with all its values, not cut over ranks or devices                                     |
| cut    | the device mesh and the placements of a tensor that is cut over ranks                               |
| kept   | of an object: a handler gave it to the run, which saves it with its checkpoints                     |
"""

from disttrain.parallel.ddp import SlotGradients
from disttrain.parallel.fsdp import FsdpGradients
from disttrain.parallel.global_loss import GlobalLoss
from disttrain.parallel.gradients import Accumulation, Gradients
from disttrain.parallel.layout import Layout, ReplicatedLayout, total_norm
from disttrain.parallel.over_slots import GradientsOverSlots
from disttrain.parallel.slots import Slots, TreeSum, mean_over_slots
from disttrain.parallel.strategies import Strategy, World, strategy_for
from disttrain.parallel.tree import TreeReduce
from disttrain.parallel.xla_gradients import XlaSlotGradients

__all__ = [
    "Accumulation",
    "FsdpGradients",
    "GlobalLoss",
    "Gradients",
    "GradientsOverSlots",
    "Layout",
    "ReplicatedLayout",
    "SlotGradients",
    "Slots",
    "Strategy",
    "TreeReduce",
    "TreeSum",
    "World",
    "XlaSlotGradients",
    "mean_over_slots",
    "strategy_for",
    "total_norm",
]
