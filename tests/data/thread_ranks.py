"""Ranks that are threads, for tests of data/ that need several ranks and no draws from the global generators."""

import threading

from disttrain.backend.threads import ThreadsBackend


def in_threads(world_size, function):
    """Return `function(backend)` of each rank, in the order of the ranks."""
    results = [None] * world_size

    def run(rank):
        results[rank] = function(ThreadsBackend(rank, world_size, timeout_s=60))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results
