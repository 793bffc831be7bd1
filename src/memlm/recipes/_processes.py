"""Several arms at the same time, each in a process of one thread: twice as fast on two cores as two threads in turn."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ..errors import MemlmError
from ._experiment import Experiment, Task


def in_processes(
    experiment: Experiment,
    sizes: Any,
    output: Path,
    pairs: Sequence[tuple[str, int]],
    processes: int,
    advance: Callable[[int], None],
    tell: Callable[[str, int, float], None],
) -> None:
    """Measure arms, given with their seeds, in so many processes.

    Args:
        experiment: The experiment; it is pickled.
        sizes: Its sizes.
        output: Folder of the run.
        pairs: Arms and seeds.
        processes: At most.
        advance: Called with the tokens of work done.
        tell: Called with arm, seed and seconds when an arm is finished.

    Raises:
        MemlmError: A process ended before its work was done.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of torch's threads
    waiting = list(pairs)
    workers: dict[Connection, tuple[Any, tuple[str, int]]] = {}
    try:
        for _ in range(min(processes, len(waiting))):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(experiment, sizes, output, there), daemon=True)
            with _without_interrupts():
                process.start()
            there.close()  # so that the end of the process is the end of the pipe
            workers[here] = process, waiting.pop(0)
            here.send(workers[here][1])
        while workers:
            for connection in wait(list(workers)):
                assert isinstance(connection, Connection)
                process, pair = workers[connection]
                message = _receive(connection, process, pair)
                if isinstance(message, int):
                    advance(message)
                    continue
                tell(*pair, message)
                if waiting:
                    workers[connection] = process, waiting.pop(0)
                    connection.send(workers[connection][1])
                else:
                    del workers[connection]
                    connection.close()  # the process sees that nothing more comes
                    process.join()
    finally:
        for connection, (process, _) in workers.items():
            process.terminate()
            process.join()
            connection.close()


def _receive(connection: Connection, process: Any, pair: tuple[str, int]) -> int | float:
    """Return tokens of work (int), or the seconds that the finished arm took (float)."""
    try:
        message = connection.recv()
    except EOFError as error:
        process.join()
        raise MemlmError(
            f"the process that trained {pair[0]} from seed {pair[1]} ended with code {process.exitcode}; memory may "
            "have run out: run again with fewer processes, what is finished is kept"
        ) from error
    if isinstance(message, BaseException):
        raise message
    return message


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Let a process be started that ignores Ctrl-C: the one that started it ends it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # started with the first process, it would let interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(experiment: Experiment, sizes: Any, output: Path, connection: Connection) -> None:
    """Measure arms as they are asked for, until nothing more comes."""
    os.environ.update(OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="1")  # before torch is loaded
    from ._run import run_task

    while True:
        try:
            arm, seed = connection.recv()
        except EOFError:
            return
        try:
            _quiet_libraries()
            seconds = run_task(experiment, Task(sizes, arm, seed, output, connection.send))
        except Exception as error:  # told where somebody reads it
            connection.send(error)
            return
        connection.send(float(seconds))


def _quiet_libraries() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
