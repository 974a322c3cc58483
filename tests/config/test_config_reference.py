"""The table of fields is complete, and the committed reference page is up to date."""

from pathlib import Path

from config_samples import adam, sample

from disttrain.config import Config, describe, field_table, reference_markdown

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "config.md"
REWRITE = "from disttrain.config import reference_markdown; print(reference_markdown(), end='')"


def test_every_field_is_in_the_table_with_a_meaning() -> None:
    rows = field_table()
    assert [row.name for row in rows] == list(describe(sample(metrics={}, optimizer=adam)))
    assert all(row.meaning.endswith(".") and row.type and row.default and "\n" not in row.meaning for row in rows)
    assert {name.split(".")[0] for name in (row.name for row in rows)} == set(Config.model_fields)


def test_rows_say_type_unit_and_default() -> None:
    rows = {row.name: row for row in field_table()}
    assert rows["timeout_s"][1:4] == ("float > 0", "s", "300.0")
    assert rows["model"][1:4] == ("() -> Module", "", "required")
    assert rows["on_nan"][1:4] == ('"stop" | "skip" | "rollback"', "", '"stop"')
    assert rows["checkpoint.every_steps"][1:4] == ("int >= 0", "steps", "0")
    assert rows["metrics"][1:4] == ("dict of name: () -> Metric", "", "{}")
    assert rows["handlers"][1:4] == ("list of (trainer, run) -> None", "", "[]")


def test_what_is_known_elsewhere_by_another_name_is_found() -> None:
    meanings = {row.name: row.meaning for row in field_table()}
    assert "gradient accumulation" in meanings["num_slots"]


def test_names_with_a_unit_in_them_have_it_in_the_table() -> None:
    for row in field_table():
        if row.name.endswith("_s"):
            assert row.unit == "s"
        if "every_steps" in row.name:
            assert row.unit == "steps"


def test_the_committed_page_is_up_to_date() -> None:
    advice = f'a field has changed; write the page anew: python -c "{REWRITE}" > docs/reference/config.md'
    assert PAGE.read_text(encoding="utf-8") == reference_markdown(), advice
