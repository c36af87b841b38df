"""Share jobs among MPI ranks: rank 0 hands one to each free thread.

Only main threads send and receive messages, so any level of MPI thread support works.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from shodh_moe.base.cores import bound_to, cores_per_process
from shodh_moe.base.errors import UserError

_ANSWER_S = 0.02  # longest wait of a rank that has finished a job for the next one
_STOP_S = 60.0  # how long a rank that reported an error waits for rank 0 to abort


def cores_of_rank(world: Any) -> tuple[int, int]:
    """Return this rank's number of cores (its share of the host's) and its number on the host (collective)."""
    from mpi4py import MPI

    here = world.Split_type(MPI.COMM_TYPE_SHARED)
    # Ranks may be bound to one core each, to a socket together, or not at all.
    share, number = cores_per_process(here.size, set().union(*here.allgather(bound_to()))), here.rank
    here.Free()
    return share, number


def share_jobs(world: Any, work: Callable[[int], object], count: int, threads: int) -> Iterator[None]:
    """Call ``work(n)`` once for each n below ``count``, on whichever rank has a free thread (collective).

    On rank 0, yields once per finished job, whichever rank ran it; other ranks yield nothing.

    Args:
        threads: number of jobs that this rank runs at a time.

    Raises:
        UserError: on rank 0, the first error of a job on any rank. The caller must end the others (``world.Abort``).
    """
    everywhere = world.gather(threads)
    if world.rank == 0:
        yield from _hand_out(world, work, count, threads, slots=sum(everywhere) - threads)
    else:
        _take_jobs(world, work, threads)


def _hand_out(world: Any, work: Callable[[int], object], count: int, threads: int, slots: int) -> Iterator[None]:
    """Hand out jobs on rank 0 until none of the ``slots`` (threads of other ranks) needs one any more."""
    left = iter(range(count))
    pool = ThreadPoolExecutor(threads)
    running: set[Future[object]] = set()
    try:
        while True:
            while len(running) < threads and (own := next(left, None)) is not None:
                running.add(pool.submit(work, own))
            if not running and not slots:
                return
            while slots and world.iprobe():
                rank, ended, error = world.recv()
                if error:
                    raise UserError(error)
                following = next(left, None)
                world.send(following, dest=rank)
                slots -= following is None
                if ended:
                    yield
            if running:
                done, running = wait(running, timeout=_ANSWER_S, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                    yield
            else:
                time.sleep(_ANSWER_S)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _take_jobs(world: Any, work: Callable[[int], object], threads: int) -> None:
    """On other ranks, run jobs from rank 0 until there are none left; report the first `UserError` and raise it."""

    def following(ended: bool) -> int | None:
        world.send((world.rank, ended, ""), dest=0)
        return world.recv(source=0)

    pool = ThreadPoolExecutor(threads)
    first = [following(ended=False) for _ in range(threads)]
    running = {pool.submit(work, job) for job in first if job is not None}
    while running:
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            try:
                future.result()
            except UserError as error:
                # Rank 0 reports it once, even if other ranks fail for the same reason.
                world.send((world.rank, False, str(error)), dest=0)
                time.sleep(_STOP_S)
                raise
            if (job := following(ended=True)) is not None:
                running.add(pool.submit(work, job))
