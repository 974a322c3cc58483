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
    "zoo_models.complex_beside_real": "needs one dtype",
    "zoo_models.scalars_and_nothing": "cannot cut the parameter scale of shape ()",
}
AWAITED: dict[str, str] = {}


def variants() -> list[str]:
    """Return all variants as "module.name"."""
    return [f"{module}.{name}" for module in MODULES for name in importlib.import_module(module).VARIANTS]
