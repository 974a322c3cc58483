"""The zoo: all variants by "module.name", those that are refused, and those that still go wrong.

*Contract*: a variant that is in no list has the same bits in every life. One of `REFUSED` ends before its first step
with a ConfigError or DataError that has these words, the same on one rank and on several, with both strategies. One of
`REFUSED_SHARDED` is refused so with strategy="fsdp" alone. One of `AWAITED` is known to go wrong; its test fails as
soon as it does not.
"""

import importlib

MODULES = ("zoo_optimizers", "zoo_schedules", "zoo_models", "zoo_forwards", "zoo_losses", "zoo_data", "zoo_handlers")

REFUSED: dict[str, str] = {
    "zoo_optimizers.torch_LBFGS": "LBFGS",
    "zoo_optimizers.torch_SparseAdam": "SparseAdam does not support dense gradients",
    "zoo_optimizers.adam_capturable": "If capturable=True, params and state_steps must be on supported devices",
    "zoo_optimizers.adam_differentiable": "a leaf Variable that requires grad is being used in an in-place operation",
    "zoo_optimizers.own_with_closure": "Sharp.step needs closure",
    "zoo_optimizers.own_two_in_one": "expected a state_dict with state and param_groups",
    "zoo_schedules.torch_LRScheduler": "schedule raised NotImplementedError",
    "zoo_models.sync_batch_norm": "SyncBatchNorm (body) normalises over the samples of all ranks",
    "zoo_models.embedding_max_norm": "Embedding (table) has max_norm=0.5",
    "zoo_models.embedding_bag_max_norm": "EmbeddingBag (table) has max_norm=1.0",
    "zoo_models.embedding_sparse": "Embedding (table) has sparse gradients",
    "zoo_models.no_parameter_to_train": "Sequential has no parameter to train",
    "zoo_models.still_lazy": "the parameter 0.weight has no shape yet",
    "zoo_forwards.moves_parameters": "changes its parameter 0.weight",
    "zoo_handlers.buffer_grows": "changes its buffer seen from torch.float32 [1] to torch.float32 [4]",
    "zoo_data.stream_of_a_generator": "which can be read only once",
}
REFUSED_SHARDED: dict[str, str] = {
    "zoo_optimizers.torch_Adafactor": "Adafactor needs whole parameters",
    "zoo_optimizers.torch_Muon": "Muon needs whole parameters",
    "zoo_optimizers.torch_Rprop": "Rprop writes by index",
    "zoo_optimizers.adam_fused": "Adam(fused=True)",
    "zoo_optimizers.adamw_fused_amsgrad": "AdamW(fused=True)",
    "zoo_optimizers.adagrad_fused": "Adagrad(fused=True)",
    "zoo_optimizers.sgd_fused_momentum": "SGD(fused=True)",
    "zoo_optimizers.own_centred_gradients": "Centred gives other values on a part of a parameter",
    "zoo_optimizers.own_noise_in_the_step": "Noisy gives other values on a part of a parameter",
    "zoo_models.mixed_with_float64": "needs one dtype",
    "zoo_models.mixed_with_bfloat16": "needs one dtype",
    "zoo_models.scalars_and_nothing": "cannot cut the parameter scale of shape ()",
}
AWAITED: dict[str, str] = {
    "zoo_forwards.method_and_call": "the step's own function is wrapped, with the bare model inside",
    "zoo_forwards.method_alone": "the step's own function is wrapped, with the bare model inside",
    "zoo_forwards.parts_alone": "the step's own function is wrapped, with the bare model inside",
    "zoo_forwards.parameter_in_the_loss": "the step's own function is wrapped, with the bare model inside",
    "zoo_forwards.moves_a_buffer": "the step's own function is wrapped, with the bare model inside",
    "zoo_forwards.generator_and_critic": "the step's own function is wrapped, with the bare model inside",
    "zoo_forwards.freezes_inside": "the step's own function is wrapped, with the bare model inside",
    "zoo_forwards.part_in_evaluation_mode": "the step's own function is wrapped, with the bare model inside",
    "zoo_forwards.four_slots_method": "the step's own function is wrapped, with the bare model inside",
    "zoo_forwards.slot_without_model": "a slot that does not call the model",
    "zoo_forwards.slot_without_gradient": "a slot that does not call the model",
    "zoo_forwards.no_model_at_all": "a slot that does not call the model",
    "zoo_models.routed_by_the_data": "gathered parameters for the whole function under fsdp",
    "zoo_models.stochastic_depth": "gathered parameters for the whole function under fsdp",
    "zoo_models.ensemble_by_vmap": "gathered parameters for the whole function under fsdp",
    "zoo_models.maml": "gathered parameters for the whole function under fsdp",
    "zoo_models.derivative_of_the_input": "gathered parameters for the whole function under fsdp",
    "zoo_models.derivative_by_func": "gathered parameters for the whole function under fsdp",
    "zoo_models.jacobian": "gathered parameters for the whole function under fsdp",
    "zoo_forwards.penalty_on_the_weights": "gathered parameters for the whole function under fsdp",
    "zoo_forwards.gradient_penalty": "gathered parameters for the whole function under fsdp",
    "zoo_forwards.norm_of_the_gradient": "gathered parameters for the whole function under fsdp",
    "zoo_models.checkpointed_twice_reentrant": "a backward inside the forward",
    "zoo_forwards.adversarial_by_backward": "a backward inside the forward",
    "zoo_models.complex_beside_real": "complex numbers",
    "zoo_models.complex_alone": "complex numbers",
    "zoo_forwards.moves_parameters_by_data": "changes that no version counter shows",
    "zoo_forwards.loss_with_a_shape": "a mistake in the form of the answer",
    "zoo_forwards.loss_alone": "a mistake in the form of the answer",
    "zoo_forwards.loss_in_a_dict": "a mistake in the form of the answer",
    "zoo_losses.unreduced": "a mistake in the form of the answer",
    "zoo_losses.cross_entropy_ignoring": "weight=",
    "zoo_losses.learned_scale": "the loss is a part of the model",
    "zoo_losses.learned_scale_in_four_slots": "the loss is a part of the model",
    "zoo_losses.learned_centres": "the loss is a part of the model",
    "zoo_losses.learned_and_here_and_there": "the loss is a part of the model",
    "zoo_losses.buffer": "the loss is a part of the model",
    "zoo_losses.counts_calls": "state that is neither parameter nor buffer",
    "zoo_handlers.attribute_number": "state that is neither parameter nor buffer",
    "zoo_handlers.attribute_tensor": "state that is neither parameter nor buffer",
    "zoo_handlers.buffer_not_persistent": "buffers that are not saved, or not there when the run begins",
    "zoo_handlers.buffer_registered_late": "buffers that are not saved, or not there when the run begins",
    "zoo_data.generator_of_its_own": "samples that depend on what was loaded before",
    "zoo_handlers.frozen_from_epoch_2": "requires_grad that changes under way",
    "zoo_handlers.frozen_after_step_4": "requires_grad that changes under way",
    "zoo_handlers.thawed_from_epoch_2": "requires_grad that changes under way",
    "zoo_handlers.thawed_after_step_3": "requires_grad that changes under way",
    "zoo_handlers.frozen_by_the_step": "requires_grad that changes under way",
    "zoo_handlers.frozen_at_once": "requires_grad that changes under way",
    "zoo_handlers.frozen_momentum": "requires_grad that changes under way",
    "zoo_handlers.hook_on_a_gradient": "hooks on parameters",
    "zoo_handlers.hook_on_a_gradient_here_and_there": "hooks on parameters",
    "zoo_handlers.hook_on_accumulated": "hooks on parameters",
    "zoo_handlers.hook_in_a_handler": "hooks on parameters",
    "zoo_handlers.hook_on_loading": "a state_dict that does not come back as it was, said before the first step",
    "zoo_handlers.hook_on_saving": "a state_dict that does not come back as it was, said before the first step",
    "zoo_schedules.own_forgetful": "a state_dict that does not come back as it was, said before the first step",
    "zoo_handlers.teacher_in_the_forward": "frozen parameters that the forward moves",
    "zoo_handlers.noise_on_the_weights": "draws of a shard's shape in a handler",
    "zoo_handlers.average_by_torch": "a deep copy of a sharded model",
    "zoo_handlers.average_with_buffers": "a deep copy of a sharded model",
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
)
"""Run in the default suite; the others take minutes."""


def variants() -> list[str]:
    """Return all variants as "module.name"."""
    return [f"{module}.{name}" for module in MODULES for name in importlib.import_module(module).VARIANTS]
