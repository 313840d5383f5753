"""The network interfaces in the error of processes that cannot connect with gloo."""

import datetime
import socket

import pytest
import torch.distributed as dist

from scaleup.errors import RunError
from scaleup.training import interfaces


def test_the_loopback_interface_leads_to_a_first_process_on_this_host(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert "127.0.0.1" in interfaces.addresses()[interfaces.to_first_process()]
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    assert interfaces.to_first_process() is None


def test_an_interface_that_does_not_exist_is_named_with_those_that_do(monkeypatch):
    monkeypatch.setenv(interfaces.VARIABLE, "nosuch0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("RANK", "0")
    store, timeout = dist.HashStore(), datetime.timedelta(seconds=5)
    with pytest.raises(RunError) as caught, interfaces.named_in_errors():
        dist.ProcessGroupGloo(store, 0, 1, timeout)
    message = str(caught.value)
    assert message.startswith(
        f"rank 0 on host {socket.gethostname()} cannot connect to the other processes with gloo"
    )
    assert "GLOO_SOCKET_IFNAME is nosuch0. Interfaces of " in message
    (loopback,) = (name for name, known in interfaces.addresses().items() if "127.0.0.1" in known)
    assert f"{loopback} 127.0.0.1" in message
    assert f"(here probably {loopback}, which leads to MASTER_ADDR 127.0.0.1)" in message


def test_without_the_variable_the_address_of_the_host_name_is_named(monkeypatch):
    monkeypatch.delenv(interfaces.VARIABLE, raising=False)
    address = socket.gethostbyname(socket.gethostname())
    shown = interfaces.chosen()
    assert f"the address of the host name {socket.gethostname()}, which is {address}" in shown


def test_other_errors_pass_unchanged():
    with pytest.raises(RuntimeError, match="^CUDA out of memory$"), interfaces.named_in_errors():
        raise RuntimeError("CUDA out of memory")
