"""Tests of the choice of a network interface: only where gloo would listen where no other host can reach it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from lightning_ddg.comm import interface
from lightning_ddg.comm.interface import VARIABLE, choose_interface, interface_to
from tests.harness import run_ranks


def outer() -> tuple[str, str] | None:
    """An interface of this machine that others may reach, and its address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            address = interface._address_of(name, probe)
            if address is not None and not address.startswith("127."):
                return name, address
    return None


needs_network = pytest.mark.skipif(outer() is None, reason="the machine has no interface but loopback")


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Gives names addresses; this host is called ``here``."""

    def give(addresses: dict[str, str]) -> None:
        def look_up(host: str, port: Any) -> Any:
            if host not in addresses:
                raise OSError("unknown")
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (addresses[host], 0))]

        monkeypatch.delenv(VARIABLE, raising=False)
        monkeypatch.setattr(socket, "gethostname", lambda: "here")
        monkeypatch.setattr(socket, "getaddrinfo", look_up)

    return give


@pytest.mark.parametrize(
    "addresses",
    [
        {"here": "127.0.1.1", "there": "127.0.0.1"},  # one host
        {"here": "10.0.0.7", "there": "10.0.0.1"},  # a host that knows its address
        {"here": "127.0.1.1"},  # torch says that it does not know the master
    ],
)
def test_gloo_s_own_choice_is_kept(addresses: dict[str, str], named: Callable[[dict[str, str]], None]) -> None:
    named(addresses)
    choose_interface("there")
    assert VARIABLE not in os.environ


def test_the_user_s_choice_is_kept(named: Callable[[dict[str, str]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    named({"here": "127.0.1.1", "there": "10.0.0.1"})
    monkeypatch.setenv(VARIABLE, "mine")
    choose_interface("there")
    assert os.environ[VARIABLE] == "mine"


def test_an_interface_that_cannot_be_found_is_asked_for(
    named: Callable[[dict[str, str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    named({"here": "127.0.1.1", "there": "10.0.0.1"})
    monkeypatch.setattr(interface, "interface_to", lambda address: None)
    with pytest.raises(RuntimeError, match="'here', has a loopback address, .* variable GLOO_SOCKET_IFNAME"):
        choose_interface("there")


def test_a_host_reaches_itself() -> None:
    name = interface_to("127.0.0.1")
    assert name is not None
    assert name in {name for _, name in socket.if_nameindex()}
    assert interface_to("not an address") is None


def connect(address: str) -> tuple[str | None, int]:
    socket.gethostname = lambda: "localhost"  # type: ignore[assignment]
    os.environ["MASTER_ADDR"] = address
    choose_interface(address)
    dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)
    votes = [None, None]
    dist.all_gather_object(votes, 1)
    return os.environ.get(VARIABLE), sum(votes)  # type: ignore[arg-type]


@needs_network
def test_ranks_meet_on_the_interface_that_leads_to_the_master() -> None:
    found = outer()
    assert found is not None
    assert run_ranks(connect, 2, found[1]) == [(found[0], 2)] * 2
