"""Each kind of training that was reported to go wrong is held by variants of the zoo and by tests, which exist.

`FIELD` names for each kind what holds it: "zoo_MODULE.VARIANT", which runs on one rank, on three that are killed and
resumed on two, and under fsdp; or "FILE::TEST".
"""

import re
from pathlib import Path

import pytest
from zoo_catalogue import variants

TESTS = Path(__file__).parents[1]

FIELD: dict[str, tuple[str, ...]] = {
    "an optimizer's state of another dtype than its parameter": (
        "zoo_optimizers.nadam_double",
        "zoo_optimizers.asgd_double",
        "zoo_optimizers.nadam_bfloat16",
        "zoo_optimizers.own_quantized_state",
        "zoo_optimizers.sgd_half_precision_masters",
        "parallel/test_parallel_optimizer_state.py::test_what_goes_on_from_a_loaded_state_has_the_bits_of_what_went_on",
        "run/test_run_restored.py::test_a_run_does_not_resume_with_a_rounded_state",
    ),
    "the state of a handler": (
        "zoo_handlers.average",
        "zoo_handlers.average_by_torch",
        "zoo_handlers.average_written_back",
        "zoo_handlers.counter",
        "integration/test_kept.py::test_a_kept_average_has_the_bits_of_an_uninterrupted_run",
        "integration/test_kept.py::test_verify_finds_an_average_that_is_not_kept_and_names_it",
    ),
    "a loss with parameters, buffers or a mode": (
        "zoo_losses.learned_scale",
        "zoo_losses.learned_scale_in_four_slots",
        "zoo_losses.learned_centres",
        "zoo_losses.learned_and_here_and_there",
        "zoo_losses.buffer",
        "zoo_losses.dropout",
        "zoo_losses.frozen_network",
    ),
    "frozen parameters that the forward moves": (
        "zoo_handlers.teacher_in_the_forward",
        "zoo_handlers.teacher_by_a_handler",
    ),
    "trained parameters that the forward moves": (
        "zoo_models.embedding_max_norm",
        "zoo_models.embedding_bag_max_norm",
        "zoo_forwards.moves_parameters",
        "zoo_forwards.moves_parameters_by_data",
        "parallel/test_parallel_slot_checks.py::test_what_a_forward_may_not_change_is_named_on_any_number_of_ranks",
    ),
    "buffers that change their shape, or are moved otherwise than in place": (
        "zoo_handlers.buffer_grows",
        "zoo_handlers.buffer_anew",
        "zoo_handlers.buffer_by_data",
        "zoo_handlers.buffer_registered_late",
        "zoo_handlers.buffer_not_persistent",
        "zoo_histories.buffer_sparse",
        "zoo_histories.buffer_expanded",
        "zoo_histories.queue",
    ),
    "requires_grad that changes under way": (
        "zoo_handlers.frozen_from_epoch_2",
        "zoo_handlers.frozen_after_step_4",
        "zoo_handlers.frozen_by_the_step",
        "zoo_handlers.frozen_momentum",
        "zoo_handlers.thawed_from_epoch_2",
        "zoo_handlers.thawed_after_step_3",
        "zoo_histories.group_added_under_way",
    ),
    "hooks on parameters, activations and modules": (
        "zoo_handlers.hook_on_a_gradient",
        "zoo_handlers.hook_on_a_gradient_here_and_there",
        "zoo_handlers.hook_on_accumulated",
        "zoo_handlers.hook_in_a_handler",
        "zoo_handlers.hook_on_forward",
        "zoo_handlers.hook_on_backward",
        "zoo_forwards.hook_on_an_activation",
    ),
    "complex parameters": ("zoo_models.complex_beside_real", "zoo_models.complex_alone"),
    "methods, attributes and parts of the model": (
        "zoo_forwards.method_and_call",
        "zoo_forwards.method_alone",
        "zoo_forwards.parts_alone",
        "zoo_forwards.parameter_in_the_loss",
        "zoo_forwards.generator_and_critic",
        "zoo_forwards.part_in_evaluation_mode",
    ),
    "a slot that does not call the model, or not all of it": (
        "zoo_forwards.slot_without_model",
        "zoo_forwards.slot_without_gradient",
        "zoo_forwards.head_by_slot",
        "zoo_models.routed_by_the_data",
        "zoo_models.stochastic_depth",
    ),
    "evaluation that draws": (
        "zoo_models.vae",
        "zoo_models.gumbel",
        "run/test_run_evaluation.py::test_a_model_that_samples_has_one_loss_on_any_number_of_ranks",
    ),
    "losses over targets": (
        "zoo_losses.cross_entropy_ignoring",
        "zoo_losses.weighted_in_four_slots",
        "zoo_losses.weighted_in_six_slots",
        "zoo_data.ragged_weighted",
    ),
    "time-first batches": (
        "zoo_data.time_first",
        "run/test_run_evaluation.py::test_the_number_of_samples_is_that_of_the_sampler",
    ),
    "numpy's scalars in a state": ("zoo_schedules.rate_of_numpy",),
    "a schedule that follows a value": (
        "zoo_schedules.torch_ReduceLROnPlateau",
        "run/test_run_updates.py::test_a_schedule_whose_step_needs_a_value_steps_after_evaluations_alone",
        "integration/test_zoo_killed.py::test_killed_by_a_signal_and_resumed_on_fewer_ranks",
    ),
    "an optimizer that needs a closure": ("zoo_optimizers.torch_LBFGS", "zoo_optimizers.own_with_closure"),
    "training and validation data of one random split": (
        "zoo_data.random_split",
        "run/test_run_data.py::test_both_factories_may_cut_one_data_set_by_the_same_random_split",
    ),
    "a run that its own code ends": ("zoo_handlers.terminated",),
    "a loop over the microbatches that is left": (
        "parallel/test_parallel_slot_checks.py::test_a_loop_that_ends_may_stand_in_a_zip",
    ),
    "a block used twice, checkpoints, double backward, functional_call": (
        "zoo_models.used_twice",
        "zoo_models.checkpointed_reentrant",
        "zoo_models.checkpointed_twice_reentrant",
        "zoo_models.maml",
        "zoo_models.ensemble_by_vmap",
        "zoo_forwards.gradient_penalty",
        "zoo_forwards.adversarial_by_backward",
    ),
    "schedule-free optimizers": ("zoo_optimizers.own_schedule_free",),
    "mistakes in the form of an answer": (
        "zoo_forwards.loss_alone",
        "zoo_forwards.loss_in_a_dict",
        "zoo_forwards.loss_with_a_shape",
        "zoo_losses.unreduced",
    ),
}


@pytest.mark.parametrize("kind", sorted(FIELD))
def test_what_holds_a_kind_exists(kind: str) -> None:
    assert FIELD[kind]
    for name in FIELD[kind]:
        file, _, test = name.partition("::")
        if test:
            assert re.search(rf"^\s*def {test}\(", (TESTS / file).read_text(), re.MULTILINE), name
        else:
            assert name in variants()
