"""Train one model as a YAML config says.

    scaleup train --config configs/quickstart.yaml train.max_steps=20
    accelerate launch launch/train.py --config configs/quickstart.yaml

Exit codes: 0 done, or stopped from outside (SIGTERM, SIGUSR1, SIGHUP) and saved; 1 the run could
not go on, and what it saved remains; 2 the config or the data must change (one message lists
everything); 130 interrupted. Set SCALEUP_EXIT_STOPPED to another code than 0 for stopped runs if
your scheduler starts a job again only after a failure (launch/slurm and launch/k8s use 75).
"""

import argparse
import contextlib
import os
import pathlib
import signal
from typing import TYPE_CHECKING, Any

from scaleup.cli.config import add_config_arguments, load_settings, without_garbage_collection
from scaleup.cli.exit_codes import DONE, FAILED, MUST_CHANGE, print_line, run_command, stopped_code
from scaleup.errors import ConfigError, RunError
from scaleup.io import NO_SPACE, write_problem
from scaleup.training.signals import handle_save_signals

if TYPE_CHECKING:
    from scaleup.settings.schema import Settings


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    add_config_arguments(parser)
    parser.add_argument(
        "--print-config", action="store_true", help="show the resolved config and exit"
    )
    parser.add_argument(
        "-h", "--help", action=_HelpWithSettings, nargs=0, help="show this and every setting"
    )


class _HelpWithSettings(argparse.Action):
    """Print the help and every setting. The settings take seconds to import."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        from scaleup.cli.entry import HELP_COLUMNS
        from scaleup.settings.describe import describe

        with contextlib.suppress(BrokenPipeError):  # as after `| head`
            print(parser.format_help() + "\n" + describe(HELP_COLUMNS), flush=True)
        parser.exit()


def run(options: argparse.Namespace) -> int:
    """Train, and leave the other processes of the run in good order. Returns the exit code."""
    launcher = os.getppid()
    handle_save_signals(_stop_early)
    try:
        return _run_and_leave(options, launcher)
    except _StoppedEarly as stopped:
        print_line(f"stopped by {stopped} before the first step; nothing was lost")
        return stopped_code()


class _StoppedEarly(BaseException):
    """A signal to save that arrived before there was anything to save."""


def _stop_early(number: int, frame: object) -> None:
    handle_save_signals(signal.SIG_IGN)  # the launcher may send another one
    raise _StoppedEarly(signal.Signals(number).name)


def _run_and_leave(options: argparse.Namespace, launcher: int) -> int:
    with without_garbage_collection():
        from scaleup.training import distributed, startup, watchdog

    distributed.die_with_launcher(launcher)
    code = FAILED
    try:
        code = run_command("train", _train, options)
        if code in (FAILED, MUST_CHANGE):
            startup.fail()
    finally:
        startup.met()  # ends its thread, which would abort a process that leaves it in the store
        # To the other processes, a process that was stopped and has saved is not a failure.
        watchdog.stop(DONE if code == stopped_code() else code)
    # After a failure other processes may be gone, and leaving the group could wait for them.
    if code in (DONE, stopped_code()):
        distributed.leave()
    return code


def _train(options: argparse.Namespace) -> int:
    settings = load_settings(options, writes=not options.print_config)
    from scaleup.settings.schema import to_yaml
    from scaleup.training import distributed, resume, watchdog
    from scaleup.training.run import run as train

    if options.print_config:
        print(to_yaml(settings), end="")
        return DONE
    distributed.check_launcher()
    uploads = settings.train.push_to_hub and os.environ.get("RANK", "0") == "0"
    if uploads:
        from scaleup.export.push import check_access

        check_access(settings.train.hub_model_id or "", "train.hub_model_id")
    try:
        train(settings)
    except RuntimeError as error:
        lost = watchdog.lost_connection(error)
        if lost is None:
            raise
        raise RunError(lost) from error
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        advice = "free space and run the same command with train.resume=auto"
        raise RunError(f"{settings.train.output_dir}: {write_problem(error)}; {advice}") from error
    except KeyboardInterrupt:
        out = pathlib.Path(settings.train.output_dir)
        raise KeyboardInterrupt(resume.how_to_continue(out)) from None
    if uploads:
        _upload(settings)
    return DONE


def _upload(settings: "Settings") -> None:
    """Upload the best checkpoint of a finished run."""
    from scaleup.cli.push import MESSAGE, adapter_of
    from scaleup.export.push import push

    best, repo = pathlib.Path(settings.train.output_dir, "best"), settings.train.hub_model_id or ""
    try:
        with adapter_of(best) as folder:
            address = push(
                folder,
                repo,
                private=settings.train.hub_private_repo,
                message=MESSAGE,
                key="train.hub_model_id",
            )
    except (RunError, ConfigError) as error:
        advice = f"the run is complete; upload it with: scaleup push {best} --repo {repo}"
        raise RunError(f"{error}; {advice}") from error
    print(f"uploaded   {address}", flush=True)
