"""What a command prints when it fails, and with which code it exits.

| code | meaning |
|---|---|
| 0 | done |
| 0, or SCALEUP_EXIT_STOPPED | stopped by SIGTERM, SIGUSR1 or SIGHUP, and everything is saved |
| 1 | the command could not finish, or print its result; what it saved before remains |
| 2 | the config, the data or an argument must change |
| 130 | interrupted (Ctrl-C) |
| 128 + number | a signal ended `export`; nothing was kept |
"""

import argparse
import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

from scaleup.errors import CheckpointError, ConfigError, Preempted, ScaleupError
from scaleup.io import write_problem

LONGEST = 2000  # bytes of a message
DONE, FAILED, MUST_CHANGE, INTERRUPTED = 0, 1, 2, 130
# These commands have nothing to lose, so a bad path is the user's to change.
OS_ERROR_CODES = {"plan": MUST_CHANGE, "report": MUST_CHANGE, "schema": MUST_CHANGE}


def stopped_code() -> int:
    """Return the exit code of a command that was stopped from outside and has saved its state."""
    return int(os.environ.get("SCALEUP_EXIT_STOPPED", DONE))


class Stopped(BaseException):
    """A signal ended a command that has nothing to save."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def raise_on(*numbers: int) -> Iterator[None]:
    """Raise Stopped when one of these signals arrives inside the block, and ignore later ones.

    So nothing interrupts the removal of temporary files. SIGINT raises KeyboardInterrupt. Signals
    that the process ignores, as SIGHUP after `nohup`, stay ignored.
    """
    before = {number: signal.getsignal(number) for number in numbers}
    handled = [number for number, handler in before.items() if handler is not signal.SIG_IGN]

    def stop(number: int, frame: object) -> None:
        for other in handled:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)

    for number in handled:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number])


def run_command(
    name: str, command: Callable[[argparse.Namespace], int], options: argparse.Namespace
) -> int:
    """Run a command, print the error that ends it, and return its exit code.

    Errors that are not listed here are bugs and keep their traceback.
    """
    try:
        return _run(name, command, options)
    finally:
        discard_lost_output()


def _run(
    name: str, command: Callable[[argparse.Namespace], int], options: argparse.Namespace
) -> int:
    try:
        code = command(options)
        if sys.stdout is not None:  # None if the shell has closed it (>&-)
            sys.stdout.flush()  # at the end of the interpreter, a full disk would be a traceback
        return code
    except ConfigError as error:
        # Every host prints its own problems, because the files of one host only may be at fault.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _print_error(_listed(error.problems))
        return MUST_CHANGE
    except Preempted as stopped:
        if os.environ.get("RANK", "0") == "0":
            print_line(str(stopped))
        return stopped_code()
    except ScaleupError as error:
        _print_error(cut(str(error)))
        return MUST_CHANGE if isinstance(error, CheckpointError) else FAILED
    except OSError as error:
        # `train` would end in the middle of its work, which it has to say.
        if isinstance(error, BrokenPipeError) and name != "train" and _reader_is_gone():
            return FAILED
        path = f": {error.filename}" if error.filename else ""
        _print_error(cut(f"{write_problem(error)}{path}"))
        return OS_ERROR_CODES.get(name, FAILED)
    except KeyboardInterrupt as interrupt:
        # What follows may wait for other processes. A second Ctrl-C waits for nothing.
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
        advice = f"; {interrupt}" if str(interrupt) else ""  # `train` adds what was saved
        print_line(f"interrupted{advice}")
        return INTERRUPTED


def _listed(problems: Sequence[str]) -> str:
    """Return problems as a list of at most `LONGEST` characters."""
    lines = [f"{len(problems)} problem{'s' * (len(problems) > 1)}:"]
    room = LONGEST - 100
    for number, problem in enumerate(problems):
        line = f"  - {cut(problem)}"
        room -= len(line.encode("utf-8", "replace")) + 1
        if room < 0:
            lines.append(f"  - and {len(problems) - number} more; solve these first")
            break
        lines.append(line)
    return "\n".join(lines)


def cut(message: str) -> str:
    """Return a message, without its middle if it is longer than a third of `LONGEST` bytes.

    Its beginning names the key, and its end says what to do.
    """
    most = LONGEST // 3
    content = message.encode("utf-8", "replace")
    if len(content) <= most:
        return message
    begin, end = content[: 2 * most // 3], content[-most // 3 :]
    return f"{begin.decode(errors='ignore')} … {end.decode(errors='ignore')}"


def print_line(line: str) -> None:
    """Print a line to stderr, if that is possible: after SIGHUP the terminal may be gone."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _print_error(message: str) -> None:
    print_line(f"error: {message}")


def _reader_is_gone() -> bool:
    """Return whether nothing reads the output any more, as after `| head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def discard_lost_output() -> None:
    """Discard output that cannot be written. The interpreter would try it again at its end."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
