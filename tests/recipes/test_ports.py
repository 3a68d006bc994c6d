"""Tests of ports that are held."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest
import torch.distributed as dist

from recipes.ports import held_port


def test_a_held_port_is_given_to_no_other_and_can_be_listened_on() -> None:
    with held_port() as port, held_port() as other:
        assert port != other
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
        for _ in range(2):
            store = dist.TCPStore("127.0.0.1", port, 1, is_master=True, timeout=timedelta(seconds=10))
            store.set("name", "value")
            assert store.get("name") == b"value"
            del store
