"""A run that is resumed with other kernels warns that its bits are not the promised ones."""

from pathlib import Path

import pytest
import torch
from commands import launch_as_typed, write_cfg


@pytest.mark.slow
def test_another_instruction_set_gives_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cfg(tmp_path)
    first = launch_as_typed("cfg.py", "max_epochs=1", cwd=tmp_path)
    assert first.code == 0, first.text
    assert "WARNING" not in first.out
    usual = torch.backends.cpu.get_cpu_capability()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2" if usual == "DEFAULT" else "default")
    second = launch_as_typed("cfg.py", "max_epochs=2", cwd=tmp_path)
    assert second.code == 0, second.text
    assert "resuming from step 5" in second.out
    (warning,) = [line for line in second.out.splitlines() if line.startswith("WARNING")]
    assert f"torch {torch.__version__} on cpu {usual}" in warning
    assert "the same bits are not promised" in warning
