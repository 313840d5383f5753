"""The network interfaces of this host, for the error of processes that cannot connect with gloo.

gloo takes the address to which the host's own name resolves, or that of the interface in
GLOO_SOCKET_IFNAME. On hosts with several interfaces either may be one that the others cannot reach.
"""

import contextlib
import os
import re
import socket
from collections.abc import Iterator

import psutil

from scaleup.errors import RunError, one_line

VARIABLE = "GLOO_SOCKET_IFNAME"
FAMILIES = (socket.AF_INET, socket.AF_INET6)
GLOO_SOURCE = re.compile(r"\[[^\]]*gloo/\S+\] ")  # the file and line that gloo's messages contain


def addresses() -> dict[str, list[str]]:
    """Return the addresses of each interface of this host that is up."""
    states = psutil.net_if_stats()
    return {
        name: [entry.address.partition("%")[0] for entry in entries if entry.family in FAMILIES]
        for name, entries in psutil.net_if_addrs().items()
        if name in states and states[name].isup
    }


def _interface_of(address: str) -> str | None:
    return next((name for name, known in addresses().items() if address in known), None)


def chosen() -> str:
    """Return which interface gloo uses on this host, and why."""
    if name := os.environ.get(VARIABLE):
        return f"{VARIABLE} is {name}"
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        return f"{VARIABLE} is not set, and the host name {host} has no address"
    place = f", which is {address}" + (f" on {name}" if (name := _interface_of(address)) else "")
    return f"{VARIABLE} is not set, so gloo takes the address of the host name {host}{place}"


def to_first_process() -> str | None:
    """Return the interface through which this host reaches MASTER_ADDR; None if that is unknown."""
    for family in FAMILIES:
        with contextlib.suppress(OSError, KeyError):
            target = socket.getaddrinfo(os.environ["MASTER_ADDR"], 9, family, socket.SOCK_DGRAM)
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(target[0][4])  # sends nothing
                return _interface_of(probe.getsockname()[0])
    return None


def problem(error: BaseException) -> str:
    """Return one line about an error of gloo: the interface, the others, and the one to choose."""
    reason = GLOO_SOURCE.sub("", one_line(error, 400))
    rank, host = os.environ.get("RANK", "0"), socket.gethostname()
    known = "; ".join(
        f"{name} {', '.join(there) or 'without address'}" for name, there in addresses().items()
    )
    first, way = os.environ.get("MASTER_ADDR"), to_first_process()
    advice = f"set {VARIABLE} on every host to the interface that connects the hosts"
    if way is not None:
        advice += f" (here probably {way}, which leads to MASTER_ADDR {first})"
    return (
        f"rank {rank} on host {host} cannot connect to the other processes with gloo ({reason})."
        f" {chosen()}. Interfaces of {host}: {known}. Check the same on the other hosts, and"
        f" {advice}"
    )


@contextlib.contextmanager
def named_in_errors() -> Iterator[None]:
    """Turn an error of gloo inside the block into a RunError that names the interfaces."""
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error).lower():
            raise
        raise RunError(problem(error)) from error
