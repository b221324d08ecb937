"""What asks a run to stop: a signal, or the word of the process that has started this one. It is only noted here.

Nothing is done in a handler. The engine asks at every step, and all ranks agree before one of them acts.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)  # Windows has not all of them
)
# One request: a terminal's Ctrl-C reaches every process of a run, and its launcher passes it on.
AGAIN_S = 1.0
# As cli's exit code of a run that was stopped.
STOPPED = 75
# A weak reference's callback at the end of every import: what is raised in one is printed, and lost.
_DEAF = ("<frozen importlib._bootstrap>", "cb")


class Stop:
    """Whether this process has been asked to stop, and by what."""

    def __init__(self, note: Path | None = None):
        """Take the file in which the launcher of this process says that it was asked to stop."""
        self.signal = ""
        """Name of the first signal; empty where none has come."""
        self._note = note
        self._since: float | None = None

    def asked_by(self) -> str:
        """Name of the signal that has asked, to this process or to its launcher; empty as long as none has."""
        if not self.signal and self._note is not None:
            with contextlib.suppress(OSError):
                return self._note.read_text()
        return self.signal

    @contextlib.contextmanager
    def listening(self) -> Iterator["Stop"]:
        """While it lasts signals only ask; a second one, a second or more after the first, ends the process at once.

        A thread of its own reads them from a pipe: the main thread may stand in a collective that never returns.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        with _handled(_noted):
            before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            thread = threading.Thread(target=self._listen, args=(reader,), daemon=True, name="dytrun-signals")
            thread.start()
            try:
                yield self
            finally:
                signal.set_wakeup_fd(before)
                os.close(writer)  # the thread reads the end of the pipe
                thread.join()
                os.close(reader)

    def _listen(self, reader: int) -> None:
        while received := os.read(reader, 64):
            for number in received:
                if number not in SIGNALS:  # Python's own handlers write theirs too
                    continue
                asked_s = self._asked_s()
                if asked_s is None:
                    self.signal, self._since = signal.Signals(number).name, time.monotonic()
                elif asked_s >= AGAIN_S:
                    os._exit(STOPPED)

    def _asked_s(self) -> float | None:
        """Seconds since the first request; None without one."""
        if self._since is not None:
            return time.monotonic() - self._since
        try:
            return time.time() - self._note.stat().st_mtime if self._note is not None else None
        except OSError:
            return None


def _noted(signum: int, frame: FrameType | None) -> None:
    """Stand as a handler, so that the signal is written to the pipe and does nothing else."""


@contextlib.contextmanager
def _handled(handler: Any) -> Iterator[None]:
    """While it lasts the signals have another handler; signals are the main thread's business alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)  # None: set by code that is not Python


def ignored() -> AbstractContextManager[None]:
    """While it lasts the signals have no effect here, nor ever in a process that is started meanwhile."""
    return _handled(signal.SIG_IGN)


def as_interrupt() -> AbstractContextManager[None]:
    """While it lasts every signal that asks for a stop is as Ctrl-C: KeyboardInterrupt in the main thread."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        while frame is not None:
            if (frame.f_code.co_filename, frame.f_code.co_name) == _DEAF:
                again = threading.Timer(0.01, os.kill, (os.getpid(), signum))  # when that is over
                again.daemon = True
                again.start()
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    return _handled(interrupt)


def passed_on(note: Path, say: str) -> AbstractContextManager[None]:
    """While it lasts a first signal is passed on through `note`, and a second one is as Ctrl-C.

    Args:
        note: the file that the processes started here look at (`Stop`).
        say: what a person is told on stderr.
    """

    def pass_on(signum: int, frame: FrameType | None) -> None:
        try:
            asked_s = time.time() - note.stat().st_mtime
        except FileNotFoundError:
            name = signal.Signals(signum).name
            os.utime(note.with_name(name))
            note.with_name(name).rename(note)
            os.write(2, f"dytrun: {name}: {say}\n".encode())
            return
        if asked_s >= AGAIN_S:
            raise KeyboardInterrupt

    for number in SIGNALS:  # now, because there may be no room for it then
        note.with_name(number.name).write_text(number.name)
    return _handled(pass_on)
