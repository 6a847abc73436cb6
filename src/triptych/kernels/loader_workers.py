"""Ending the worker processes of a PyTorch data loader at a chosen time."""

from typing import Any


def shut_down(iterator: Any) -> None:
    """End the worker processes of a `DataLoader`'s iterator now, and kill those that do not end. Without workers, do
    nothing.

    If the garbage collector ends them instead, it may close their queues first: then they are not notified, and the
    main process waits five seconds for each. PyTorch ends a blocked worker by SIGTERM, which those of `triptych.data`
    ignore.
    """
    if has_workers(iterator):
        iterator._shutdown_workers()
        for worker in iterator._workers:
            if worker.is_alive():
                worker.kill()


def has_workers(iterator: Any) -> bool:
    """Return whether an iterator of a `DataLoader` reads in worker processes."""
    return hasattr(iterator, "_shutdown_workers")


def current_iterator(loader: Any) -> Any:
    """Return the iterator that a `StatefulDataLoader` holds, with persistent workers from one epoch to the next; or
    None."""
    return loader._iterator


def forget_iterator(loader: Any) -> None:
    """Make a `StatefulDataLoader` start new workers for the next epoch."""
    loader._iterator = None
