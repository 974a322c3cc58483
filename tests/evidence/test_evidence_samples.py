"""Equal samples have equal hashes in every process, and a sample of other content has another hash."""

import dataclasses
import os
import subprocess
import sys
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from disttrain.evidence import sample_hash


@dataclasses.dataclass
class Scan:
    pixels: Any
    label: str


class Opaque:
    """An object whose text and attributes are those of one process."""

    def __init__(self) -> None:
        self.address, self.process = id(self), os.getpid()


Pair = namedtuple("Pair", ["x", "y"])
LOOP: list[Any] = [1]
LOOP.append(LOOP)
NAN = float("nan")
FLIPPED = torch.tensor([1.0, 2.0]).view(torch.int32).add(1).view(torch.float32)  # the last bit of each

# (a value, an equal one that was made in another way, one of other content)
VALUES: dict[str, tuple[Any, Any, Any]] = {
    "tensor": (torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 2.0]])[0], FLIPPED),
    "dtype": (torch.tensor([1, 0]), torch.tensor([1, 0]), torch.tensor([1, 0], dtype=torch.int32)),
    "shape": (torch.zeros(2, 3), torch.zeros(3, 2).T, torch.zeros(3, 2)),
    "signed zero": (torch.zeros(1), torch.zeros(1), -torch.zeros(1)),
    "sparse": (torch.eye(3).to_sparse(), torch.eye(3).to_sparse(), torch.eye(3).flip(0).to_sparse()),
    "array": (np.arange(6).reshape(2, 3), np.arange(6).reshape(2, 3), np.arange(6).reshape(2, 3) + 1),
    "strided array": (np.arange(4), np.arange(8)[::2] // 2, np.arange(4)[::-1]),
    "texts": (np.array(["owl", "bee"]), np.array(["owl", "bee"]), np.array(["owl", "ant"])),
    "objects": (np.array(["owl", None]), np.array(["owl", None]), np.array(["owl", 0], dtype=object)),
    "record": (np.zeros(2, "u1,f8"), np.zeros(2, "u1,f8"), np.ones(2, "u1,f8")),
    "numpy's number": (np.float32(0.1), np.float32(0.1), np.float64(0.1)),
    "bool or int": (True, True, 1),
    "float": (0.1 + 0.2, 0.1 + 0.2, 0.3),
    "nan": (NAN, -NAN, 0.0),
    "text": ("owl", "".join(["o", "wl"]), "owl "),
    "bytes": (b"owl", bytes(bytearray(b"owl")), "owl"),
    "set": ({"owl", "bee", "ant"}, {"ant", "bee", "owl"}, {"owl", "bee"}),
    "dict": ({"x": 1, "y": 2}, {"y": 2, "x": 1}, {"x": 2, "y": 1}),
    "ordered dict": (OrderedDict(x=[1]), OrderedDict(x=[1]), {"x": [1]}),
    "list or tuple": ([1, 2], [1, 2], (1, 2)),
    "nesting": ([[1], [2, 3]], [[1], [2, 3]], [[1, 2], [3]]),
    "pair": (Pair(1, "a"), Pair(1, "a"), Pair(1, "b")),
    "dataclass": (Scan(torch.ones(2), "a"), Scan(torch.ones(2), "a"), Scan(torch.zeros(2), "a")),
    "object": (Opaque(), Opaque(), object()),
    "object in a dict": ({"x": 1, "meta": Opaque()}, {"x": 1, "meta": Opaque()}, {"x": 2, "meta": Opaque()}),
    "function": (lambda: 1, lambda: 2, Opaque),
    "a list in itself": (LOOP, LOOP, [1, [1]]),
    "without memory": (torch.ones(2, device="meta"), torch.zeros(2, device="meta"), torch.ones(3, device="meta")),
}


@pytest.mark.parametrize("name", VALUES)
def test_the_content_decides(name: str) -> None:
    value, equal, other = VALUES[name]
    assert sample_hash(value) == sample_hash(equal)
    assert sample_hash(value) != sample_hash(other)
    assert len(sample_hash(value)) == 16


def test_a_file_counts_by_its_name_wherever_it_lies(tmp_path: Path) -> None:
    here, there = tmp_path / "job-1", tmp_path / "job-2"
    for folder in (here, there):
        folder.mkdir()
        (folder / "17.png").touch()
    assert sample_hash(str(here / "17.png")) == sample_hash(str(there / "17.png"))
    assert sample_hash(here / "17.png") == sample_hash(there / "17.png")
    assert sample_hash(str(here / "17.png")) != sample_hash(str(there / "18.png"))


def test_an_image_counts_by_its_pixels() -> None:
    class Image:
        """A picture as Pillow shows it to numpy."""

        def __init__(self, *pixels: int) -> None:
            self.pixels = np.array(pixels, dtype=np.uint8)

        @property
        def __array_interface__(self) -> dict[str, Any]:
            return self.pixels.__array_interface__

    assert sample_hash(Image(1, 2)) == sample_hash(Image(1, 2)) != sample_hash(Image(2, 1))


def test_it_is_the_same_in_processes_of_other_hash_seeds() -> None:
    program = (
        "from disttrain.evidence import sample_hash; import numpy as np;"
        "print(sample_hash([{'owl', 'bee', 'ant'}, {n: n for n in {'owl', 'bee'}}, frozenset('abc'), np.ones(3)]))"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(hashes) == 1
