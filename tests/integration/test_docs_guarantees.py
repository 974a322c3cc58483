"""docs/guarantees.md names files, tests and fields that exist, and its table of fields agrees with the declarations."""

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


def test_every_item_says_why_and_who_sets_or_checks_it() -> None:
    assert len(FILES) > 20
    lists = PAGE[PAGE.index("## The run") : PAGE.index("## Config fields")]
    items = re.findall(r"(?ms)^- (.*?)(?=^-|^#|\n\n)", lists)
    assert len(items) == lists.count("- **") > 44
    for item in (" ".join(item.split()) for item in items):
        # **What changes: whether the bits are the same.** Why. *Checked by* something.
        assert re.fullmatch(r"\*\*[^*]+: [^*]+\.\*\* \S.+ \*(Set|Checked|Found) by\* \S.+", item), item


def test_every_row_of_the_table_of_fields_has_three_cells() -> None:
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in PAGE.splitlines() if line.startswith("| ")]
    assert {len(row) for row in rows} == {3}
    for row in rows:
        assert all(cell.strip() for cell in row[:2]), row


def test_every_field_that_is_set_somewhere_in_the_page_exists() -> None:
    given = {match[1] for word in QUOTED if (match := re.fullmatch(r"([a-z_.]+)=\S+", word))}
    assert {"deterministic", "reduction", "on_nan", "compile"} <= given
    assert given <= set(FIELDS)


def test_the_table_of_fields_agrees_with_their_declarations() -> None:
    table = dict(re.findall(r"(?m)^\| `([a-z_0-9.]+)` \| (same|may change) \|", PAGE))
    assert len(table) >= 12
    for name, cell in table.items():
        assert cell == ("may change" if FIELDS[name].note.may_change else "same"), name


def test_the_defaults_are_those_of_the_promise() -> None:
    assert FIELDS["deterministic"].info.default is True
    assert FIELDS["reduction"].info.default == "invariant"
    assert FIELDS["cpu_threads"].info.default == 1
