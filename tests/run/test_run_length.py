"""The steps of a run are those of its config, or of its epochs over whole global batches."""

from small_run import small_config

from disttrain.run.length import run_length, total_steps


def test_max_steps_are_the_steps() -> None:
    config = small_config(max_epochs=None, max_steps=7)
    assert total_steps(config, {"dataset_length": 1}) == 7
    assert run_length(config) == {"max_epochs": None, "max_steps": 7}


def test_an_epoch_has_whole_global_batches_of_the_data_or_of_its_order() -> None:
    config = small_config(max_epochs=3, global_batch_size=8)
    assert total_steps(config, {"dataset_length": 39}) == 3 * 4
    assert total_steps(config, {"dataset_length": 39, "order_length": 80}) == 3 * 10
    assert run_length(config) == {"max_epochs": 3, "max_steps": None}
