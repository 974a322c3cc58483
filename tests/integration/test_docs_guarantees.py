"""docs/guarantees.md names files, tests and fields that are there, and says of fields what their declarations say."""

import ast
import re

import pytest
from commands import ROOT

from disttrain.config import Config
from disttrain.config.annotations import leaves

PAGE = (ROOT / "docs" / "guarantees.md").read_text()
QUOTED = re.findall(r"`([^`\n]+)`", PAGE)
FIELDS = {leaf.name: leaf for leaf in leaves(Config)}
FILES = sorted({word for word in QUOTED if re.match(r"(disttrain|tests|examples|docs|benchmarks)/", word)})


@pytest.mark.parametrize("name", FILES)
def test_every_file_and_test_that_is_named_exists(name: str) -> None:
    file, _, test = name.partition("::")
    assert (ROOT / file).is_file()
    if test:
        tree = ast.parse((ROOT / file).read_text())
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_most_rows_say_who_sets_or_checks_them() -> None:
    assert len(FILES) > 20
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in PAGE.splitlines() if line.startswith("| ")]
    assert {len(row) for row in rows} == {3, 4}
    for row in rows:
        assert all(cell.strip() for cell in (row if len(row) == 4 else row[:2])), row


def test_every_field_that_is_set_somewhere_in_the_page_exists() -> None:
    given = {match[1] for word in QUOTED if (match := re.fullmatch(r"([a-z_.]+)=\S+", word))}
    assert {"deterministic", "reduction", "on_nan", "compile"} <= given
    assert given <= set(FIELDS)


def test_the_table_of_fields_says_what_they_declare() -> None:
    table = dict(re.findall(r"(?m)^\| `([a-z_0-9.]+)` \| (same|may change) \|", PAGE))
    assert len(table) >= 12
    for name, said in table.items():
        assert said == ("may change" if FIELDS[name].about.may_change else "same"), name


def test_what_the_default_is() -> None:
    assert FIELDS["deterministic"].info.default is True
    assert FIELDS["reduction"].info.default == "invariant"
    assert FIELDS["cpu_threads"].info.default == 1
