"""Documents that are packed into one window have the losses that each has alone."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import default_collate

from disttrain.data import IGNORED, PackedTokens, document_mask, num_targets
from disttrain.errors import DataError

VOCAB, WIDTH, HEADS, LENGTH = 20, 16, 2, 24
END = 0


def written(path: Path, tokens: object, dtype: str = "uint16") -> Path:
    np.asarray(tokens, dtype).tofile(path)
    return path


class Attention(nn.Module):
    """A model of one block of attention, with learned positions, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.mix, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, VOCAB)
        self.double()

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        x = self.tokens(tokens) + self.places(positions)
        shape = (*x.shape[:2], HEADS, WIDTH // HEADS)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.mix(x).chunk(3, dim=-1))
        seen = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.head(x + seen.transpose(1, 2).reshape(x.shape))


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")


def alone(model: nn.Module, documents: list[list[int]]) -> list[float]:
    """Return the loss of each next token of each document, computed for one document at a time."""
    each: list[float] = []
    for document in documents:
        if len(document) > 1:
            tokens = torch.tensor([document])
            logits = model(tokens[:, :-1], torch.arange(len(document) - 1)[None], None)
            each += losses(logits, tokens[:, 1:]).tolist()
    return each


@settings(deadline=None, max_examples=10)
@given(lengths=st.lists(st.integers(1, 9), min_size=8, max_size=20), way=st.sampled_from(["end", "begin", "starts"]))
def test_packed_documents_have_the_losses_that_they_have_alone(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], way: str
) -> None:
    folder = tmp_path_factory.mktemp("packed")
    generator = np.random.default_rng(sum(lengths))
    documents = [generator.integers(1, VOCAB, length).tolist() for length in lengths]
    documents = {
        "end": [[*document, END] for document in documents],
        "begin": [[END, *document] for document in documents],
        "starts": documents,
    }[way]
    row = [token for document in documents for token in document]
    if len(row) <= LENGTH:
        return
    path = written(folder / "a.bin", row)
    begins = np.cumsum([0, *map(len, documents)])
    given = {"end": END, "begin": END, "starts": written(folder / "a.idx", begins, "int64")}
    batch = default_collate(list(PackedTokens(path, LENGTH, dtype="uint16", **{way: given[way]})))
    torch.manual_seed(0)
    model = Attention()
    logits = model(batch["tokens"], batch["positions"], document_mask(batch["documents"]))
    packed = losses(logits, batch["targets"])
    packed = packed[batch["targets"].flatten() != IGNORED]
    # By hand: each window holds the documents' parts that lie in it; a part is a document that begins there.
    parts = []
    for start in range(0, len(batch["tokens"]) * LENGTH, LENGTH):
        cuts = [start, *(cut for cut in begins if start < cut < start + LENGTH + 1), start + LENGTH + 1]
        parts += [row[one:other] for one, other in pairwise(cuts)]
    expected = torch.tensor(alone(model, parts), dtype=torch.float64)
    assert num_targets(batch) == len(expected) == len(packed)
    torch.testing.assert_close(packed.detach(), expected, rtol=1e-12, atol=1e-12)


def test_without_the_mask_the_losses_are_others(tmp_path: Path) -> None:
    documents = [[3, 4, 5, 6, END], [7, 8, 9, END], [*range(1, 17), END]]
    path = written(tmp_path / "a.bin", [token for document in documents for token in document])
    batch = default_collate(list(PackedTokens(path, LENGTH, dtype="uint16", end=END)))
    torch.manual_seed(0)
    model = Attention()
    counts = batch["targets"].flatten() != IGNORED
    one, other = (
        losses(model(batch["tokens"], batch["positions"], mask), batch["targets"])[counts]
        for mask in (document_mask(batch["documents"]), None)
    )
    assert torch.equal(one[:4], other[:4])  # the first document sees the same
    assert (one[4:7] - other[4:7]).abs().min() > 1e-6


def test_the_example_of_the_docstring(tmp_path: Path) -> None:
    path = written(tmp_path / "a.bin", [5, 6, 0, 7, 8, 9, 0, 4, 3])
    (sample,) = PackedTokens(path, 8, dtype="uint16", end=0)
    ignored = IGNORED
    assert {name: tensor.tolist() for name, tensor in sample.items()} == {
        "tokens": [5, 6, 0, 7, 8, 9, 0, 4],
        "targets": [6, 0, ignored, 8, 9, 0, ignored, 3],
        "documents": [0, 0, 0, 1, 1, 1, 1, 2],
        "positions": [0, 1, 2, 0, 1, 2, 3, 0],
    }
    assert {tensor.dtype for tensor in sample.values()} == {torch.int64}


def test_the_mask_lets_a_query_see_the_earlier_keys_of_its_document() -> None:
    mask = document_mask(torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]]))
    assert mask.shape == (2, 1, 4, 4)
    assert mask.dtype == torch.bool
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert mask[1, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    assert torch.equal(document_mask(torch.zeros(3, dtype=torch.int64)), torch.ones(1, 3, 3, dtype=torch.bool).tril())


def test_each_file_with_an_index_begins_a_document(tmp_path: Path) -> None:
    paths = [written(tmp_path / "a.bin", [1, 2, 3, 4]), written(tmp_path / "b.bin", [5, 6, 7, 8, 9])]
    # Positions count in their own file; an index may leave out the 0 and may end with the number of tokens.
    indexes = [written(tmp_path / "a.idx", [2], "int64"), tmp_path / "b.npy"]
    np.save(indexes[1], np.array([3, 5], "int32"))
    (sample,) = PackedTokens(paths, 8, dtype="uint16", starts=indexes)
    assert sample["documents"].tolist() == [0, 0, 1, 1, 2, 2, 2, 3]
    assert sample["positions"].tolist() == [0, 1, 0, 1, 0, 1, 2, 0]
    assert [target == IGNORED for target in sample["targets"].tolist()] == [0, 1, 0, 1, 0, 0, 1, 0]


def test_wrong_borders_are_named(tmp_path: Path) -> None:
    path = written(tmp_path / "a.bin", range(20))
    for borders, got in (({}, "none"), ({"end": 0, "begin": 1}, "end and begin")):
        with pytest.raises(ValueError, match=f"expected one of end, begin and starts, .*, got {got}"):
            PackedTokens(path, 4, dtype="uint16", **borders)
    with pytest.raises(ValueError, match=r"end=100257: expected a token that .*a.bin can hold, as uint16"):
        PackedTokens(path, 4, dtype="uint16", end=100257)
    with pytest.raises(ValueError, match=r"begin=50: expected a token in 0..49, because of vocab_size"):
        PackedTokens(path, 4, dtype="uint16", begin=50, vocab_size=50)
    index = written(tmp_path / "a.idx", [0, 9, 3, 4], "int64")
    with pytest.raises(ValueError, match="starts: expected an index file for each of the 1 token files, got 2"):
        PackedTokens(path, 4, dtype="uint16", starts=[index, index])
    with pytest.raises(DataError, match=r"a.idx: expected ascending positions, got \[.*\] between .*; sort the index"):
        list(PackedTokens(path, 10, dtype="uint16", starts=index))


def test_the_identity_holds_the_borders(tmp_path: Path) -> None:
    path = written(tmp_path / "a.bin", range(20))
    indexes = [written(tmp_path / name, [0, 5], "int64") for name in ("a.idx", "b.idx")]
    given = [{"end": 1}, {"begin": 1}, {"end": 2}, *({"starts": index} for index in indexes)]
    assert len({PackedTokens(path, 4, dtype="uint16", **borders).fingerprint for borders in given}) == 5
