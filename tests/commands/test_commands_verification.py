"""The runs of a verification: what its ranks printed, and the settings that every run gets."""

from pathlib import Path

from disttrain.commands.verification import NUM_QUOTED_LINES, quoted_output


def test_the_output_of_the_first_rank_with_an_error_is_quoted(tmp_path: Path) -> None:
    logs = [tmp_path / f"rank-{rank}.txt" for rank in range(3)]
    assert quoted_output(logs) == ""
    logs[0].write_text("rank 0 is fine\n")
    assert quoted_output(logs) == "  rank 0 is fine"
    logs[2].write_text("".join(f"line {number}\n" for number in range(99)) + "ValueError: no\n")
    quoted = quoted_output(logs).splitlines()
    assert len(quoted) == NUM_QUOTED_LINES
    assert quoted[-2:] == ["  line 98", "  ValueError: no"]
