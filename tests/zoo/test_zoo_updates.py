"""The zoo's programs with several updates in a step: the same bits in each life, or a listed refusal."""

from pathlib import Path

import pytest
from ranks import Ranks
from zoo_checks import check_variant, variants_of

MODULES = ("zoo_updates",)


@pytest.mark.parametrize("variant", variants_of(*MODULES))
def test_the_same_bits_or_refused(ranks: Ranks, tmp_path: Path, variant: str) -> None:
    check_variant(ranks, tmp_path, variant)
