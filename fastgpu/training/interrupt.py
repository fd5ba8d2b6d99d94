"""Ctrl-C in a loop: finish what is being done, then stop."""

import signal
import threading
from types import FrameType
from typing import Any


class Interrupt:
    """Within this context the first SIGINT only sets `requested`; the second one stops at once.

    The handler that was there is put back at the end. Python runs signal handlers in the main
    thread only: in any other one this does nothing, and `requested` stays False. The same holds
    for a process that ignores SIGINT, as a shell's background jobs do.
    """

    def __init__(self) -> None:
        self.requested = False
        self._installed = False
        self._previous: Any = None

    def __enter__(self) -> "Interrupt":
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._previous = signal.signal(signal.SIGINT, self._handle)
            self._installed = True
        return self

    def __exit__(self, *error: Any) -> None:
        if self._installed:
            # None stands for a handler that was not set from Python and cannot be put back.
            previous = signal.SIG_DFL if self._previous is None else self._previous
            signal.signal(signal.SIGINT, previous)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
