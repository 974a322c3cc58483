"""Streams for the tests of data/: with and without shards and states; samples draw from every global generator."""

import itertools
import os
import random
import signal

import numpy as np
import torch

from disttrain.data import StreamLoader

NUM_SLOTS, GLOBAL_BATCH_SIZE = 4, 8
SIZES = (9, 7, 12, 8)
"""The samples of each shard. With 2 in each step the second shard ends a pass after 3 steps; one stream has 4."""


class Numbers:
    """Yields (epoch and number, draws, id of the reading process) over parts of the given sizes, one after another."""

    def __init__(self, sizes=SIZES, first=0, bad=None):
        self.sizes = sizes
        self.first = first
        self.bad = bad
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def numbers(self):
        return range(self.first, self.first + sum(self.sizes))

    def sample(self, number):
        if number == self.bad:
            raise ValueError("bad pixels")
        draws = [random.random(), np.random.random(), torch.rand(()).item(), np.random.normal()]
        return torch.tensor([self.epoch, number]), torch.tensor(draws, dtype=torch.float64), os.getpid()

    def __iter__(self):
        return map(self.sample, self.numbers())


class Shards(Numbers):
    """Yields the same samples, and can be cut into its parts."""

    def shard(self, num_shards, index):
        assert num_shards == len(self.sizes)
        return type(self)(self.sizes[index : index + 1], self.first + sum(self.sizes[:index]), self.bad)


class Shuffling(Shards):
    """Keeps a few samples in a buffer, and yields a random one of them, drawn from the global generator."""

    def __iter__(self):
        buffer = []
        for number in self.numbers():
            buffer.append(number)
            if len(buffer) > 3:
                yield self.sample(buffer.pop(random.randrange(len(buffer))))
        while buffer:
            yield self.sample(buffer.pop(np.random.randint(len(buffer))))


class Remembering(Numbers):
    """Keeps its position while it is read, resumes from a state, and counts the samples."""

    at = 0
    drawn = 0

    def __iter__(self):
        numbers = self.numbers()
        while self.at < len(numbers):
            self.at += 1
            type(self).drawn += 1
            yield self.sample(numbers[self.at - 1])
        self.at = 0

    def state_dict(self):
        return {"at": self.at, "kept": torch.tensor([self.at])}

    def load_state_dict(self, state):
        assert state["kept"].item() == state["at"]
        self.at = state["at"]


class RememberingShards(Remembering, Shards):
    pass


class Iterators(Shards):
    """Has iterators that keep the position; the stream itself does not."""

    def __iter__(self):
        return Position(self)


class Position:
    def __init__(self, numbers):
        self.numbers = numbers
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        numbers = self.numbers.numbers()
        if self.at == len(numbers):
            raise StopIteration
        self.at += 1
        return self.numbers.sample(numbers[self.at - 1])

    def state_dict(self):
        return {"at": [self.at]}

    def load_state_dict(self, state):
        self.at = state["at"].pop()


class Deadly(Shards):
    """Has one sample that kills the process that reads it."""

    def sample(self, number):
        if number == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(number)


KINDS = (Numbers, Shards, Shuffling, Remembering, RememberingShards, Iterators)


def stream_loader(dataset, slots=None, **options):
    return StreamLoader(dataset, GLOBAL_BATCH_SIZE, NUM_SLOTS, seed=3, slots=slots, **options)


def steps_of(loader):
    """Yield the steps of a loader, pass after pass."""
    return itertools.chain.from_iterable(iter(loader) for _ in itertools.count())


def content(batch):
    """Return the position and the samples of a step, without the ids of the reading processes."""
    return batch.epoch, batch.step, [(x.tolist(), draws.tolist()) for x, draws, _ in batch]


def take_steps(loader, count):
    """Return the content of the next `count` steps."""
    return [content(batch) for batch in itertools.islice(steps_of(loader), count)]
