"""Signals, heard by a thread of their own, whatever the others wait for.

Python runs a handler in the main thread, between two of its instructions. Where the kernel has interrupted another thread, the
main thread goes on to wait (for a lock, a queue) as if nothing had been sent: the daemon was seen to live on for as long as it
liked, one time in a hundred under load. And a handler that runs amid a method of a lock or an event cannot take that again.
What is always done at once, in whichever thread, is the write of ``signal.set_wakeup_fd``.
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


@contextmanager
def heard(calls: Mapping[int, Callable[[], None]]) -> Iterator[None]:
    """Make these calls on these signals, one after the other, until the end of the block; then the signals pass unheard.

    For the main thread. A child that is forked and not executed would be heard in our place: such a process must not fork so.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # as set_wakeup_fd wants it

    def listen() -> None:
        while numbers := os.read(reading, 64):
            for number in numbers:
                if (call := calls.get(number)) is not None:
                    call()

    thread = threading.Thread(target=listen, name="signals", daemon=True)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in calls:
        signal.signal(number, _pass)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)
        thread.join()
        os.close(reading)


def _pass(*_: object) -> None:
    """Do nothing: the byte is written."""
