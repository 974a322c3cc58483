"""Datasets and loaders for the tests of data/: samples that draw from every global generator, and samples that fail."""

import itertools
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import torch
from torch.utils.data import Dataset

from disttrain.data import SlotBatchSampler, SlotLoader

NUM_SAMPLES, GLOBAL_BATCH_SIZE, NUM_SLOTS, NUM_STEPS = 70, 16, 8, 4


class Augmented(Dataset):
    """Has samples (index, draws from Python, numpy and torch, id of the loading process)."""

    def __init__(self, num_samples):
        self.num_samples = num_samples

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        draws = [random.random(), np.random.random(), torch.rand(()).item(), np.random.normal()]
        return torch.tensor(index), torch.tensor(draws, dtype=torch.float64), os.getpid()


class Broken(Augmented):
    """Has one sample that raises an error."""

    def __init__(self, num_samples, bad, error):
        super().__init__(num_samples)
        self.bad = bad
        self.error = error

    def __getitem__(self, index):
        if index == self.bad:
            raise self.error
        return super().__getitem__(index)


class Deadly(Augmented):
    """Has one sample that kills the process that loads it."""

    def __getitem__(self, index):
        if index == 17:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class InBatches(Dataset):
    """Loads whole batches by `__getitems__`. A sample is a random draw; the bad one raises an error."""

    def __init__(self, num_samples, bad=None, alone=True):
        self.num_samples = num_samples
        self.bad = bad
        self.alone = alone
        self.asked = []

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        if not self.alone:
            raise NotImplementedError
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        self.asked.append(indices)
        if self.bad in indices:
            raise ValueError("bad pixels")
        return [(index, random.random()) for index in indices]


def random_state():
    """Return the states of the global generators in a form that can be compared."""
    numpy_state = np.random.get_state()
    return random.getstate(), numpy_state[1].tolist(), numpy_state[2:], torch.get_rng_state().tolist()


def samples_of(step_batch):
    """Return the indices and draws of a step's microbatches, without the ids of the loading processes."""
    return [(indices.tolist(), draws.tolist()) for indices, draws, _ in step_batch]


def loaded_by(step_batch):
    """Return the ids of the processes that loaded a step's samples."""
    return {int(pid) for _, _, pids in step_batch for pid in pids}


class Counting(Augmented):
    """Counts the loaded samples over all processes."""

    def __init__(self, num_samples):
        super().__init__(num_samples)
        self.loaded = multiprocessing.Value("i", 0)

    def __getitem__(self, index):
        with self.loaded.get_lock():
            self.loaded.value += 1
        return super().__getitem__(index)


def sampler_of(slots=None):
    return SlotBatchSampler(NUM_SAMPLES, GLOBAL_BATCH_SIZE, NUM_SLOTS, seed=3, slots=slots)


def loader_of(slots=None, **options):
    return SlotLoader(Augmented(NUM_SAMPLES), sampler_of(slots), **options)


def take(loader, count):
    """Return the samples of the next `count` steps, over several epochs if necessary."""
    steps = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())
    return [samples_of(step) for step in itertools.islice(steps, count)]


def alive(pid):
    """Return whether a process is running; a zombie is not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def ended(pids, within_s=10.0):
    """Return True as soon as none of the processes is running, and False after `within_s`."""
    deadline = time.monotonic() + within_s
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, pids))
