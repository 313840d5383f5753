"""The steps of the doctor, in their order."""

import faulthandler
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed

from scaleup.backbone import loading
from scaleup.memory.plan import Plan, make_plan
from scaleup.memory.report import amount, batches, warning
from scaleup.settings.schema import Settings
from scaleup.training import distributed
from scaleup.training.build_locks import QUIET_LOCAL_S
from scaleup.training.distributed import World
from scaleup.training.doctor import estimates, host, network, report
from scaleup.training.doctor.steps import Meeting, Place, Steps, place

# A process that holds its interpreter lock for this many time limits is ended by a timer.
LAST_RESORT = 20
MOST_PROBLEMS = 20
OTHERS = "the other processes"
COLLECTIVES = ("all-reduce", "broadcast", "all-gather")


def examine(read_settings: Callable[[], Settings], limit_s: float) -> int:
    """Examine hosts, network and folders for a run, and print a report in rank 0.

    Every process of the job must call this. It ends within a few time limits, whatever the others
    and the network do.

    Args:
        read_settings: loads and checks the config of the run.
        limit_s: seconds after which a step is given up.

    Returns:
        0 if all is well, 1 if something has to change.

    Raises:
        ConfigError: the launcher's variables make no sense.
    """
    stream = sys.__stderr__ or sys.stderr
    faulthandler.dump_traceback_later(LAST_RESORT * limit_s, exit=True, file=stream)
    begin = time.perf_counter()
    here = place()
    meeting = Meeting(here, limit_s)
    steps = Steps(meeting, limit_s)
    doctor = _Doctor(here, meeting, steps)
    doctor.run(read_settings)
    code = doctor.conclude(begin)
    faulthandler.cancel_dump_traceback_later()
    meeting.close()
    if steps.stuck:  # the end of the interpreter could wait for that thread, or abort
        sys.stdout.flush()
        os._exit(code)
    distributed.leave()
    return code


class _Doctor:
    def __init__(self, here: Place, meeting: Meeting, steps: Steps):
        self.here, self.meeting, self.steps = here, meeting, steps
        self.found: dict[str, Any] = {"rank": here.rank, "host": meeting.hosts[0]}
        self.settings: Settings | None = None
        self.plan: Plan | None = None
        self.width = 0
        self.vote_s: float | None = None
        self.clocks: dict[str, tuple[float, float]] | None = None
        self.transfers: dict[str, network.Transfer] = {}

    def run(self, read_settings: Callable[[], Settings]) -> None:
        """Take all steps. A step that fails is reported, and does not end the others."""
        steps, here, found = self.steps, self.here, self.found
        server = f"rank 0 at {here.address}:{here.port}"
        steps.run("meeting", server, self.meeting.open, together=True)
        steps.run("processes", OTHERS, self.meeting.wait_for_all, together=True, factor=1.5)
        device = steps.run("device", "the GPU", lambda: host.device_of(here.local_rank))
        if device is not None:
            found["device"] = str(device)
            if device.type == "cuda":
                found["device"] += f" ({torch.cuda.get_device_name(device)})"
        found["packages"] = steps.run("packages", "the disk with the packages", host.packages)
        self.settings = steps.run("config", "the files that the config names", read_settings)
        world = World(here.rank, here.local_rank, here.size, device or torch.device("cpu"), False)
        if not self.meeting.alone:
            self._look_at_network(world)
        ready = self.settings is not None and device is not None
        all_ready = steps.run(
            "agreement", OTHERS, lambda: distributed.gather(world, ready), together=True
        )
        if self.settings is not None:
            self._look_at_host(self.settings, world, all(all_ready or [False]))

    def _look_at_network(self, world: World) -> None:
        steps, meeting = self.steps, self.meeting
        joined = f"{OTHERS}, which have to connect with gloo"
        steps.run("gloo", joined, lambda: network.join(meeting), together=True)
        devices = steps.run(
            "devices", OTHERS, lambda: distributed.gather(world, world.device.type), together=True
        )
        clocks = lambda: network.clock_differences(world, meeting.hosts)  # noqa: E731
        self.clocks = steps.run("clocks", OTHERS, clocks, together=True)
        for name, (ahead, _) in (self.clocks or {}).items():
            if abs(ahead) > QUIET_LOCAL_S:
                self.steps.problems.append(
                    f"clocks: that of {name} differs by {ahead:.0f} s from rank 0's host, and a run"
                    f" takes locks for abandoned that seem {QUIET_LOCAL_S:.0f} s old; synchronise"
                    " them (NTP)"
                )
        self.vote_s = steps.run("vote", OTHERS, network.measure_vote, together=True)
        group = None
        if set(devices or []) == {"cuda"}:
            waits = f"{OTHERS}, which have to connect with NCCL (NCCL_DEBUG=INFO says more)"
            join = lambda: network.join_gpus(world, meeting.limit_s)  # noqa: E731
            group = steps.run("NCCL", waits, join, together=True)
        elif len(set(devices or [])) > 1:
            steps.problems.append("some processes have a GPU and some have none")
        for name in COLLECTIVES:
            measure = lambda name=name: network.measure(name, world, group)  # noqa: E731
            if transfer := steps.run(name, OTHERS, measure, together=True):
                self.transfers[name] = transfer

    def _look_at_host(self, settings: Settings, world: World, all_ready: bool) -> None:
        steps, found, train = self.steps, self.found, settings.train
        found["precision"] = host.precision(settings, world.device)
        if all_ready:
            name = f"output folder {train.output_dir}"
            folder = steps.run(
                "output folder",
                f"{name}, or for {OTHERS} there",
                lambda: host.output_folder(settings, world),
                together=True,
            )
            if folder is not None:
                found["folder"] = folder
                steps.problems += host.check_folder(folder, train.output_dir)
        source = f"model.name {settings.model.name}: its disk or the hub"
        model = steps.run("backbone", source, lambda: host.backbone(settings))
        if world.local_main:
            found["data"] = steps.run("data", "the hub", lambda: host.data(settings))
        if model is None:
            return
        files = model.pop("files")
        found["model"] = model | {"bytes": sum(map(os.path.getsize, files))}
        local_size = max(self.meeting.hosts.count(found["host"]), 1)
        if files:
            read = lambda: host.read_speed(files, world.local_rank, local_size)  # noqa: E731
            found["read"] = steps.run("reading", f"the disk of {files[0]}", read)
        config = steps.run("model config", source, lambda: loading.load_config(settings.model))
        if config is not None:
            self.width = config.hidden_size
            compute = lambda: host.compute_speed(settings, self.width, world.device)  # noqa: E731
            found["compute"] = steps.run("computing", f"products on {world.device}", compute)
        if world.main:
            self._plan(settings, world)

    def _plan(self, settings: Settings, world: World) -> None:
        """Plan the run as configured. This replaces functions of torch, so it comes last."""
        local_size = max(self.meeting.hosts.count(self.found["host"]), 1)
        limit = None
        if world.device.type == "cuda":
            limit = torch.cuda.get_device_properties(world.device).total_memory
        self.plan = self.steps.run(
            "plan",
            "the memory plan, which needs no other process",
            lambda: make_plan(
                *(settings, world.size, world.device.type, limit),
                configured=True,
                per_host=local_size,
            ),
            factor=2,
        )

    def conclude(self, begin: float) -> int:
        """Exchange the reports, print them in rank 0, and return the exit code for all."""
        steps, meeting, found = self.steps, self.meeting, self.found
        before = len(steps.problems)
        found["problems"] = list(steps.problems)
        exchange = lambda: meeting.exchange(found)  # noqa: E731
        reports = steps.run("reports", "the store of the processes", exchange, factor=4)
        own = steps.problems[before:]
        code: int | None = None
        if self.here.rank == 0:
            reports = reports or [found]
            lines, problems = self._lines(reports)
            problems += own
            print(*lines, f"took       {time.perf_counter() - begin:.0f} s", "", sep="\n")
            print(*verdict(problems), sep="\n", flush=True)
            code = 1 if problems else 0
        agreed = steps.run("verdict", "rank 0's report", lambda: meeting.agree(code), factor=10)
        if self.here.rank == 0:
            return code or 0
        if agreed is None:  # rank 0 is gone, so nobody has printed this
            problems = [f"{self.here.name}: {problem}" for problem in steps.problems]
            print(*verdict(problems), sep="\n", flush=True)
        return 1 if agreed is None else agreed

    def _lines(self, reports: report.Reports) -> tuple[list[str], list[str]]:
        """Return the whole report, and all problems."""
        problems = report.problems(reports) + report.differences(reports)
        lines = report.hosts(reports)
        if not self.meeting.alone:
            lines += report.network(self.vote_s, self.clocks, self.transfers)
        lines += report.places(reports)
        if self.plan is None:
            return lines, problems
        plan = self.plan
        lines += [f"precision  {self.found['precision']}", f"batch      {batches(plan)}"]
        lines += filter(None, [warning(plan)])
        row = next(row for row in plan.rows if row.chosen)
        total = row.total(plan.settings.train.gradient_checkpointing)
        memory = f"memory     {amount(total)} per process"
        if plan.limit is not None:
            memory += f" of {amount(plan.limit)}: {plan.verdict(total)}"
            if not plan.fits:
                problems.append(
                    f"memory: the run needs {amount(total)} per GPU, which has"
                    f" {amount(plan.limit)}; `scaleup plan` shows what fits"
                )
        lines.append(memory)
        space = estimates.needed_space(plan)
        writers = [r["folder"] for r in reports if r.get("folder", {}).get("writes")]
        if writers and (free := min(folder["free"] for folder in writers)) < space:
            folder = plan.settings.train.output_dir
            problems.append(
                f"train.output_dir: {folder} has {amount(free)} free, and the checkpoints need"
                f" {amount(space)}; free space, or lower train.keep_checkpoints"
            )
        size = self.found.get("model", {}).get("bytes", 0)
        speeds = estimates.as_speeds(reports, self.transfers)
        lines += [
            "estimates  from the speeds above, the slowest process counting, and the sizes and"
            " operations of `scaleup plan`; only matrix products count as computing",
            *estimates.estimates(plan, speeds, size, self.width),
        ]
        if speeds.compute is not None:
            rows = plan.settings.train.per_device_train_batch_size * plan.settings.data.max_length
            lines.append(
                f"computing  {estimates.count(speeds.compute)} operations/s in products of"
                f" {rows} x {self.width} x {self.width} in {self.found['precision']}"
            )
        return lines, problems


def verdict(problems: list[str]) -> list[str]:
    """Return the last lines of the report. Many processes may report the same in other words."""
    if not problems:
        return ["all is well"]
    plural = "s" * (len(problems) > 1)
    lines = [f"{len(problems)} thing{plural} to change:"]
    lines += [f"  - {line}" for line in problems[:MOST_PROBLEMS]]
    if len(problems) > MOST_PROBLEMS:
        lines.append(f"  - and {len(problems) - MOST_PROBLEMS} more; change these first")
    return lines
