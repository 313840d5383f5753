"""The signals on which a run saves its state and ends."""

import signal
from collections.abc import Callable

SAVE_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def handle_save_signals(handler: Callable[[int, object], None] | signal.Handlers) -> None:
    """Install a handler for these signals, but not for a SIGHUP that nohup has switched off."""
    for number in SAVE_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)
