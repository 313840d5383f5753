"""Trains one model as a YAML config says.

    accelerate launch launch/train.py --config configs/quickstart.yaml train.max_steps=20

Exit codes: 0 done, or stopped from outside (SIGTERM, SIGUSR1) and saved; 1 the run could not go on (what it saved stays); 2
something in the config or the data must change (one message with everything); 130 interrupted. A scheduler that starts a job
again only after a failure sets SCALEUP_EXIT_STOPPED to the code it wants instead of 0 (launch/slurm and launch/k8s: 75).
"""

import argparse
import os
import pathlib
import signal
import sys
import warnings


sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from scaleup import errors  # noqa: E402
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings(
    "ignore", category=FutureWarning, module="torch.distributed"
)  # between torch and DeepSpeed


class _Help(argparse.Action):
    """--help with every setting: needs the package, which is slow to import, so only when asked."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        from scaleup.settings.schema import describe

        print(parser.format_help() + describe())
        parser.exit()


def main() -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file with the sections model, method, data, train")
    parser.add_argument(
        "--print-config", action="store_true", help="show the resolved config and stop"
    )
    parser.add_argument("-h", "--help", action=_Help, nargs=0, help="show this and every setting")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that override the file"
    )
    options = parser.parse_intermixed_args()  # overrides before and after --config
    parent = os.getppid()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _stop_early)
    try:
        return _run(options, parent)
    except _StoppedEarly as stopped:
        print(f"stopped by {stopped} before the first step; nothing was lost", file=sys.stderr)
        return _stopped_code()


def _run(options: argparse.Namespace, parent: int) -> int:
    """The run, its watchdog and its processes, in good order; the exit code."""
    from scaleup.training import distributed as runtime
    from scaleup.training import watchdog

    runtime.die_with_launcher(parent)
    code = 1
    try:
        code = _train(options)
    finally:
        watchdog.stop(
            0 if code == _stopped_code() else code
        )  # a rank that has saved is no failure to the others
    if code in (
        0,
        _stopped_code(),
    ):  # after a failure others may be gone, and leaving in good order could wait for them
        runtime.leave()
    return code


class _StoppedEarly(BaseException):
    """SIGTERM or SIGUSR1 before the loop has taken them over: nothing is there to be saved."""


def _stop_early(number: int, frame: object) -> None:
    raise _StoppedEarly(signal.Signals(number).name)


def _stopped_code() -> int:
    return int(os.environ.get("SCALEUP_EXIT_STOPPED", "0"))


def _train(options: argparse.Namespace) -> int:
    """The run; its exit code."""
    from scaleup.settings import schema as config
    from scaleup.training import distributed as runtime
    from scaleup.training import run as train
    from scaleup.training import watchdog
    from scaleup.training.preflight import CHECKS

    try:
        settings = config.load(options.config, options.overrides, checks=CHECKS)
        if options.print_config:
            print(config.to_yaml(settings), end="")
            return 0
        runtime.respawn(__file__, sys.argv[1:])
        train.run(settings)
    except errors.ConfigError as error:
        if (
            os.environ.get("LOCAL_RANK", "0") == "0"
        ):  # once on each host: what is wrong may be wrong on one only
            count = len(error.problems)
            print(
                f"error: {count} problem{'s' * (count > 1)}:"
                + "".join(f"\n  - {p}" for p in error.problems),
                file=sys.stderr,
            )
        return 2
    except (errors.RunError, errors.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except errors.Preempted as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped, file=sys.stderr)
        return _stopped_code()
    except RuntimeError as error:
        lost = watchdog.lost_connection(error)
        if lost is None:
            raise
        print(f"error: {lost}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"error: {error.strerror or error}{': ' + str(error.filename) if error.filename else ''}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted; continue with train.resume=auto", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
