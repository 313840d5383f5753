"""Turn the reports of all processes into lines for a screen."""

from typing import Any

from scaleup.memory.report import amount
from scaleup.training.console import placement
from scaleup.training.doctor.estimates import seconds
from scaleup.training.doctor.network import Transfer
from scaleup.training.doctor.steps import ABSENT

Reports = list[dict[str, Any]]


def _by_host(reports: Reports) -> dict[str, dict[str, Any]]:
    """Return the first report of every host, in the order of ranks."""
    first: dict[str, dict[str, Any]] = {}
    for report in reports:
        if report["host"] != ABSENT:
            first.setdefault(report["host"], report)
    return first


def hosts(reports: Reports) -> list[str]:
    """Return the lines about hosts, devices and packages."""
    lines = placement([(r["host"], r.get("device", "")) for r in reports])
    known = {host: r["packages"] for host, r in _by_host(reports).items() if r.get("packages")}
    if known:
        first = next(iter(known.values()))
        shown = ", ".join(f"{name} {version}" for name, version in first.items() if version)
        lines.append(f"packages   {shown}")
    return lines


def package_differences(reports: Reports) -> list[str]:
    """Return one problem per package whose version differs between hosts."""
    known = {host: r["packages"] for host, r in _by_host(reports).items() if r.get("packages")}
    problems = []
    for name in dict.fromkeys(name for packages in known.values() for name in packages):
        versions = {host: packages.get(name) or "missing" for host, packages in known.items()}
        if len(set(versions.values())) > 1:
            shown = ", ".join(f"{version} on {host}" for host, version in versions.items())
            problems.append(f"packages: {name} differs: {shown}; install the same everywhere")
    return problems


def differences(reports: Reports) -> list[str]:
    """Return what differs between processes that have to be alike."""
    problems = package_differences(reports)
    precisions = {r["precision"]: r["rank"] for r in reports if r.get("precision")}
    if len(precisions) > 1:
        shown = ", ".join(f"{name} on rank {rank}" for name, rank in precisions.items())
        problems.append(
            f"train.bf16: auto gives different types ({shown}); set train.bf16 to true or false"
        )
    models = {r["model"]["identity"]: r["host"] for r in reports if r.get("model")}
    if len(models) > 1:
        named = " and ".join(models.values())
        problems.append(f"model.name: the backbones of {named} differ; copy one to all hosts")
    return problems


def network(
    vote_s: float | None,
    clocks: dict[str, tuple[float, float]] | None,
    transfers: dict[str, Transfer],
) -> list[str]:
    """Return the lines about what lies between the processes."""
    lines = []
    if clocks:
        host, (ahead, error) = max(clocks.items(), key=lambda item: abs(item[1][0]))
        relation = "ahead of" if ahead > 0 else "behind"
        lines.append(
            f"clocks     at most {seconds(abs(ahead))} apart ({host} is {relation} rank 0's host;"
            f" error {seconds(error)})"
        )
    if vote_s is not None:
        lines.append(f"vote       {seconds(vote_s)}: one number over gloo, as after every step")
    for name, transfer in transfers.items():
        speed = amount(int(transfer.size / transfer.seconds))
        sizes = f"{amount(transfer.size)} in {seconds(transfer.seconds)}"
        lines.append(f"{name:<10} {speed}/s: {sizes}, on the slowest process")
    return lines


def places(reports: Reports) -> list[str]:
    """Return the lines about the output folder and the backbone of every host."""
    lines = []
    for host, report in _by_host(reports).items():
        if folder := report.get("folder"):
            kind = "shared by all hosts" if folder["shared"] else "its own"
            if len(reports) == 1:
                kind = "local"
            locks = "locks hold" if folder["locks"] else "locks do not hold"
            parts = [kind, locks]
            if "write" in folder:
                parts += [
                    f"writes {amount(int(folder['write']))}/s with fsync",
                    f"reads back with hashes {amount(int(folder['check']))}/s",
                    f"{amount(folder['free'])} free",
                ]
            lines.append(f"folder     {host}: {', '.join(parts)}")
        if model := report.get("model"):
            read = [r["read"] for r in reports if r["host"] == host and r.get("read")]
            speed = f", read at {amount(int(min(read)))}/s per process" if read else ""
            size = f", {amount(model['bytes'])}" if model["bytes"] else ""
            lines.append(f"model      {host}: {model['place']}{size}{speed}")
        if data := report.get("data"):
            lines.append(f"data       {host}: {data}")
    return lines


def problems(reports: Reports) -> list[str]:
    """Return the problems of all processes; those that several have are named once."""
    holders: dict[str, list[str]] = {}
    for report in reports:
        for problem in report["problems"]:
            known = holders.setdefault(problem, [])
            if report["host"] not in known:
                known.append(report["host"])
    count = len(_by_host(reports))
    lines = []
    for problem, names in holders.items():
        place = "" if count == 1 else f"{', '.join(names)}: "
        lines.append(f"{'every host: ' if 1 < count == len(names) else place}{problem}")
    return lines
