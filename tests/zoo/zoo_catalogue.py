"""The zoo: all variants by "module.name", those that are refused, and those that still go wrong.

*Contract*: a variant that is in no list has the same bits in every life. One of `REFUSED` ends before its first step
with a ConfigError or DataError that has these words, the same on one rank and on several, with both strategies. One of
`REFUSED_SHARDED` is refused so with strategy="fsdp" alone. One of `AWAITED` is known to go wrong; its test fails as
soon as it does not.
"""

import importlib

MODULES = (
    "zoo_optimizers",
    "zoo_schedules",
    "zoo_models",
    "zoo_forwards",
    "zoo_losses",
    "zoo_data",
    "zoo_handlers",
    "zoo_histories",
    "zoo_updates",
)

REFUSED: dict[str, str] = {
    "zoo_losses.counts_calls": "depends on something else than weights, buffers, batch and seed",
    "zoo_losses.global_of_two_views_in_one": "expected one row for each of 4 samples in all embeddings",
    "zoo_histories.draws_from_numpy": "depends on something else than weights, buffers, batch and seed",
    "zoo_histories.draws_from_its_own_generator": "depends on something else than weights, buffers, batch and seed",
    "zoo_histories.closure_counts_calls": "depends on something else than weights, buffers, batch and seed",
    "zoo_handlers.attribute_number": "depends on something else than weights, buffers, batch and seed",
    "zoo_handlers.attribute_tensor": "depends on something else than weights, buffers, batch and seed",
    "zoo_forwards.loss_alone": "expected (loss, outputs), got",
    "zoo_forwards.loss_in_a_dict": "expected (loss, outputs), got",
    "zoo_losses.unreduced": "expected a tensor of one number, got",
    "zoo_optimizers.torch_LBFGS": "LBFGS",
    "zoo_optimizers.torch_SparseAdam": "SparseAdam does not support dense gradients",
    "zoo_optimizers.adam_capturable": "If capturable=True, params and state_steps must be on supported devices",
    "zoo_optimizers.adam_differentiable": "a leaf Variable that requires grad is being used in an in-place operation",
    "zoo_optimizers.own_with_closure": "Sharp",
    "zoo_optimizers.own_two_in_one": "expected a state_dict with state and param_groups",
    "zoo_schedules.torch_LRScheduler": "schedule raised NotImplementedError",
    "zoo_models.sync_batch_norm": "SyncBatchNorm (model.body) normalises over the samples of all ranks",
    "zoo_models.embedding_max_norm": "Embedding (model.table) has max_norm=0.5",
    "zoo_models.embedding_bag_max_norm": "EmbeddingBag (model.table) has max_norm=1.0",
    "zoo_models.embedding_sparse": "Embedding (model.table) has sparse gradients",
    "zoo_models.no_parameter_to_train": "has no parameter to train",
    "zoo_models.still_lazy": "the parameter model.0.weight has no shape yet",
    "zoo_forwards.moves_parameters": "changes its parameter model.0.weight",
    "zoo_forwards.moves_parameters_by_data": "changes its parameter model.0.weight",
    "zoo_handlers.buffer_grows": "changes its buffer seen from torch.float32 [1] to torch.float32 [4]",
    "zoo_updates.without_gradient": "expected a loss that depends on the parameters of its update",
    "zoo_updates.counts_calls": "updates.g: the gradient of model.g.0.weight",
    "zoo_updates.shares": "updates.actor.parameters: expected parameters that no other update trains",
    "zoo_updates.loss_alone": "updates.g.forward (",
    "zoo_updates.freezes_all": "updates.g: no parameter is left to train",
    "zoo_data.generator_of_its_own": "is another sample when it is loaded again",
    "zoo_data.stream_of_a_generator": "which can be read only once",
}
REFUSED_SHARDED: dict[str, str] = {
    "zoo_optimizers.own_noise_in_the_step": "Noisy gives other values on a part of a parameter",
    "zoo_histories.scripted": "the model is compiled by torch.jit",
    "zoo_models.mixed_with_float64": "needs one dtype",
    "zoo_models.mixed_with_bfloat16": "needs one dtype",
    "zoo_models.complex_beside_real": "cannot train the parameter model.filter of torch.complex64",
    "zoo_models.complex_alone": "cannot train the parameter model.filter of torch.complex64",
    "zoo_handlers.hook_on_a_gradient": "the parameter model.first.weight has a hook (register_hook)",
    "zoo_handlers.hook_on_a_gradient_here_and_there": "the parameter model.first.weight has a hook (register_hook)",
    "zoo_handlers.hook_on_accumulated": "the parameter model.first.weight has a hook",
    "zoo_handlers.hook_in_a_handler": "the parameter model.0.weight has a hook (register_hook)",
    "zoo_models.scalars_and_nothing": "cannot cut the parameter model.scale of shape ()",
}
AWAITED: dict[str, str] = {
    "zoo_histories.handler_runs_a_backward": "a handler that calls a sharded model outside gathered()",
    "zoo_histories.layer_added": "refused alike on any number of ranks, but when it happens",
    "zoo_histories.layer_made_anew": "refused alike on any number of ranks, but when it happens",
    "zoo_histories.forward_counts_calls": "state that is neither parameter nor buffer, used after many calls",
    "zoo_forwards.slot_without_gradient": "a slot that does not call the model",
    "zoo_handlers.buffer_registered_late": "buffers that are not saved, or not there when the run begins",
    "zoo_handlers.hook_on_loading": "a state_dict that does not come back as it was, said before the first step",
    "zoo_handlers.hook_on_saving": "a state_dict that does not come back as it was, said before the first step",
    "zoo_schedules.own_forgetful": "a state_dict that does not come back as it was, said before the first step",
    "zoo_handlers.noise_on_the_weights": "draws of a shard's shape in a handler",
    "zoo_handlers.average_by_torch": "a deep copy of a sharded model",
    "zoo_handlers.average_with_buffers": "a deep copy of a sharded model",
    "zoo_histories.rate_from_the_loss": "losses of one rank alone in a handler",
    "zoo_histories.handler_calls_the_model": "gathered parameters for the whole function under fsdp",
    "zoo_histories.handler_changes_the_batch": "draws of a handler for each microbatch of a rank",
    "zoo_histories.samples_changed_in_place": "samples that a forward changes",
    "zoo_histories.buffer_sparse": "sparse and expanded buffers",
    "zoo_histories.buffer_expanded": "sparse and expanded buffers",
}
SHORT = (
    "zoo_optimizers.torch_SparseAdam",
    "zoo_optimizers.own_quantized_state",
    "zoo_schedules.torch_SequentialLR",
    "zoo_models.frozen_backbone",
    "zoo_models.checkpointed",
    "zoo_forwards.method_and_call",
    "zoo_losses.learned_scale",
    "zoo_data.augmented",
    "zoo_handlers.average_written_back",
    "zoo_handlers.frozen_from_epoch_2",
    "zoo_handlers.hook_on_a_gradient",
    "zoo_updates.target_network",
)
"""Run in the default suite; the others take minutes."""


def variants() -> list[str]:
    """Return all variants as "module.name"."""
    return [f"{module}.{name}" for module in MODULES for name in importlib.import_module(module).VARIANTS]
