"""The check of a variant: the same bits on one rank, resized and sharded, or a refusal with the listed words."""

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
    """Return the variant as a parameter of a test: slow unless it is short, and expected to fail if it is awaited."""
    marks = [] if variant in SHORT else [pytest.mark.slow]
    marks += [pytest.mark.xfail(strict=True, reason=AWAITED[variant])] if variant in AWAITED else []
    return pytest.param(variant, marks=marks, id=variant)


def variants_of(*modules: str):
    """Return the variants of some modules as parameters of a test."""
    return [marked(variant) for variant in variants() if variant.partition(".")[0] in modules]


def check_variant(ranks: Ranks, folder: Path, variant: str) -> None:
    """Run all lives of a variant."""
    found, problems = {}, []
    for name, lives in LIVES.items():
        if name == "one-fsdp" and variant not in {**REFUSED, **REFUSED_SHARDED}:
            continue  # on one rank nothing is cut: the strategy's checks alone differ
        expected = REFUSED.get(variant) or (REFUSED_SHARDED.get(variant) if "fsdp" in name else None)
        outcomes = run_lives(ranks, variant, lives, folder / name)
        problems += [f"{name}: {problem}" for problem in unexpected(outcomes, expected)]
        if expected is None and all(outcome.status == "completed" for outcome in outcomes):
            found[name] = evidence(folder / name)
    if "one" in found:
        if (plain := ranks(1, live_plainly, variant)[0]) is not None:
            problems += [f"plain: {text}" for text in [difference_from_plain(found["one"], plain)] if text]
        compared = {name: difference(found["one"], each) for name, each in found.items()}
        problems += [f"{name}: {text}" for name, text in compared.items() if text]
    assert not problems, "\n".join(problems)


def unexpected(outcomes: list[Outcome], expected: str | None) -> list[str]:
    """Return the deviations: a life is completed, or with `expected` refused before its first step in these words."""
    if expected is None:
        return sorted({f"{each.status}: {each.message}" for each in outcomes if each.status != "completed"})
    problems = {
        f"{each.status}: {each.message}" for each in outcomes if each.status not in ("ConfigError", "DataError")
    }
    problems |= {f"other words: {each.message}" for each in outcomes if expected not in each.message}
    problems |= {"after a step" for each in outcomes if each.num_steps}
    return sorted(problems)
