"""The zoo's optimizers, schedules and models: the same bits on one rank, resized and sharded, or a listed refusal."""

from pathlib import Path

import pytest
from ranks import Ranks
from zoo_checks import check_variant, variants_of

MODULES = ("zoo_optimizers", "zoo_schedules", "zoo_models")


@pytest.mark.parametrize("variant", variants_of(*MODULES))
def test_the_same_bits_or_refused(ranks: Ranks, tmp_path: Path, variant: str) -> None:
    check_variant(ranks, tmp_path, variant)
