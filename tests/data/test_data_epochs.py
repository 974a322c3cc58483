"""A dataset with `set_epoch` is told the epoch of each sample, whoever loads it, ahead or after a resume."""

import random

import pytest
import torch
from augmented_data import take
from torch.utils.data import ConcatDataset, Dataset, StackDataset, Subset

from disttrain.data import LoadingError, SlotBatchSampler, SlotLoader, evaluation_loader
from disttrain.data.epochs import listeners
from disttrain.data.probes import Probe

SIZE, STEPS = 12, 3


class Told(Dataset):
    """A sample is its index, the epoch that was told last, and a draw that `set_epoch` made."""

    def __init__(self):
        self.calls = []
        self.draw = -1.0

    def __len__(self):
        return SIZE

    def set_epoch(self, epoch):
        self.calls.append(epoch)
        self.draw = random.random()

    def __getitem__(self, index):
        epoch = self.calls[-1] if self.calls else -1
        return torch.tensor(index), torch.tensor([epoch, self.draw, random.random()], dtype=torch.float64), 0


def loader_of(dataset, num_workers=0):
    sampler = SlotBatchSampler(SIZE, SIZE // STEPS, 2, seed=4)
    return SlotLoader(dataset, sampler, num_workers=num_workers)


def epochs_of(steps):
    return [{row[0] for _, rows in step for row in rows} for step in steps]


def told_epoch(samples):
    ((_, (epoch, _, _), _),) = samples
    return str(float(epoch))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_sample_is_loaded_in_its_epoch_from_any_position(num_workers):
    whole = take(loader_of(Told()), 3 * STEPS)
    assert epochs_of(whole) == [{float(number // STEPS)} for number in range(3 * STEPS)]
    assert len({rows[0][1] for step in whole for _, rows in step}) == 3  # one draw of set_epoch for each epoch
    loader = loader_of(Told(), num_workers)
    for first in (0, 2, 4):
        loader.seek(*divmod(first, STEPS))
        assert take(loader, 4) == whole[first : first + 4]
    loader.close()


def test_it_is_told_once_in_each_epoch_and_process():
    dataset = Told()
    take(loader_of(dataset), 2 * STEPS + 1)
    assert dataset.calls == [0, 1, 2]


def test_an_evaluation_over_the_same_object_is_of_epoch_0_and_the_training_goes_on():
    dataset = Told()
    loader, alone = loader_of(dataset), take(loader_of(Told()), 2 * STEPS)
    steps = take(loader, STEPS + 1)
    batches = [batch for _, batch in evaluation_loader(Subset(dataset, range(4)), 2, seed=4)]
    assert {float(row[0]) for _, rows, _ in batches for row in rows} == {0.0}
    assert {float(row[1]) for _, rows, _ in batches for row in rows} == {alone[0][0][1][0][1]}
    assert steps + take(loader, STEPS - 1) == alone


def test_samples_that_are_compared_before_a_run_are_of_epoch_0():
    loader = loader_of(Told())
    loader.seek(2, 1)
    probes = [Probe(3, seed=4, digest=told_epoch)] * 2
    shown = loader.load_probes(probes)
    assert shown == ["0.0", "0.0"]
    assert epochs_of(take(loader, 1)) == [{2.0}]


def test_the_parts_of_torchs_containers_are_told():
    a, b, c = Told(), Told(), Told()
    nested = ConcatDataset([Subset(a, range(6)), StackDataset(b, range(SIZE)), StackDataset(x=c, y=b)])
    assert list(listeners(nested)) == [a, b, c, b]
    assert list(listeners(range(5))) == []


def test_an_error_of_set_epoch_is_one_line():
    class Wrong(Told):
        def set_epoch(self, epoch):
            raise ValueError("no such epoch")

    with pytest.raises(LoadingError, match=r"^dataset\.set_epoch\(0\) raised ValueError: no such epoch \("):
        take(loader_of(Wrong()), 1)
