"""The zoo of variants: each has the same bits on one rank, resized and sharded, or is refused with the listed words."""

from pathlib import Path

import pytest
from ranks import Ranks
from zoo_catalogue import AWAITED, REFUSED, REFUSED_SHARDED, SHORT, variants
from zoo_lives import (
    ONE_RANK_SHARDED,
    RESIZED,
    WHOLE,
    Outcome,
    difference,
    difference_from_plain,
    evidence,
    live_plainly,
    run_lives,
)

LIVES = {"one": WHOLE, "one-fsdp": ONE_RANK_SHARDED, **RESIZED}


def marked(variant: str):
    marks = [] if variant in SHORT else [pytest.mark.slow]
    marks += [pytest.mark.xfail(strict=True, reason=AWAITED[variant])] if variant in AWAITED else []
    return pytest.param(variant, marks=marks, id=variant)


@pytest.mark.parametrize("variant", [marked(variant) for variant in variants()])
def test_a_variant_has_the_same_bits_or_is_refused(ranks: Ranks, tmp_path: Path, variant: str) -> None:
    found, problems = {}, []
    for name, lives in LIVES.items():
        if name == "one-fsdp" and variant not in {**REFUSED, **REFUSED_SHARDED}:
            continue  # on one rank nothing is cut: the strategy's checks alone differ
        expected = REFUSED.get(variant) or (REFUSED_SHARDED.get(variant) if "fsdp" in name else None)
        outcomes = run_lives(ranks, variant, lives, tmp_path / name)
        problems += [f"{name}: {problem}" for problem in unexpected(outcomes, expected)]
        if expected is None and all(outcome.status == "completed" for outcome in outcomes):
            found[name] = evidence(tmp_path / name)
    if "one" in found:
        if (plain := ranks(1, live_plainly, variant)[0]) is not None:
            problems += [f"plain: {text}" for text in [difference_from_plain(found["one"], plain)] if text]
        compared = {name: difference(found["one"], each) for name, each in found.items()}
        problems += [f"{name}: {text}" for name, text in compared.items() if text]
    assert not problems, "\n".join(problems)


def unexpected(outcomes: list[Outcome], expected: str | None) -> list[str]:
    if expected is None:
        return sorted({f"{each.status}: {each.message}" for each in outcomes if each.status != "completed"})
    problems = {
        f"{each.status}: {each.message}" for each in outcomes if each.status not in ("ConfigError", "DataError")
    }
    problems |= {f"other words: {each.message}" for each in outcomes if expected not in each.message}
    problems |= {"after a step" for each in outcomes if each.num_steps}
    return sorted(problems)
