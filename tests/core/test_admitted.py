"""Tests of what the pickles of another process may name."""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import io
import os
import pickle
import re
import subprocess
import sys
import types
import uuid
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from lightning_ddg.core.admitted import AdmittedUnpickler
from lightning_ddg.core.pytree import flatten, received


@dataclass
class Sample:
    text: str
    when: datetime.date


class Pair(NamedTuple):
    left: int
    right: Any


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def load(data: bytes) -> Any:
    return AdmittedUnpickler(io.BytesIO(data)).load()


VALUES = [
    [1, 2.5, True, None, "text", b"bytes", bytearray(b"more"), 3j, {4}, frozenset({5}), range(3), slice(1, 2), ...],
    {"a": (1, [2]), (3, 4): collections.OrderedDict(b=5)},
    [collections.Counter("aab"), collections.deque([1]), collections.defaultdict(list, a=[1])],
    [datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC if sys.version_info >= (3, 11) else datetime.timezone.utc)],
    [decimal.Decimal("1.5"), fractions.Fraction(1, 3), uuid.UUID(int=7), Path("a/b"), re.compile("a+", re.IGNORECASE)],
    [types.SimpleNamespace(a=1), Sample("a", datetime.date(2026, 1, 1)), Pair(1, "b"), ValueError("no")],
    [torch.float16, torch.Size([2, 3]), torch.device("cpu"), torch.strided],
    [np.float32(1.5), np.dtype("int64"), torch.nn.functional.relu],
]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_what_batches_hold_is_admitted(value: Any, protocol: int) -> None:
    assert repr(load(pickle.dumps(value, protocol))) == repr(value)


def test_arrays_and_tensors_are_admitted() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert (load(pickle.dumps(array)) == array).all()
    sparse = torch.eye(3).to_sparse()
    for tensor in (torch.ones(2, dtype=torch.bfloat16), sparse, torch.nn.Parameter(torch.ones(2))):
        form, tensors = flatten({"x": tensor}, travels=True)
        back = received(form, [one.detach() for one in tensors], [False] * len(tensors))["x"]
        assert torch.equal(back.to_dense(), tensor.detach().to_dense())


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (Calls(os.system, "true"), "posix.system"),
        (Calls(eval, "1"), "builtins.eval"),
        (Calls(getattr, "", "join"), "builtins.getattr"),
        (Calls(subprocess.Popen, ["true"]), "subprocess.Popen"),
        (partial(print, "x"), "functools.partial"),
        ("".join, "builtins.getattr"),
    ],
    ids=["os.system", "eval", "getattr", "Popen", "partial", "method"],
)
def test_what_can_become_a_command_is_not_called(value: Any, names: str) -> None:
    data = pickle.dumps([value])
    with pytest.raises(pickle.UnpicklingError, match=rf"names {names}, which is not taken from another process. If it"):
        load(data)


@pytest.mark.parametrize("name", ["os.system", "os", "sys.modules", "sys.modules.pop"])
def test_a_library_lends_no_names_of_others(name: str) -> None:
    data = pickle.PROTO + b"\x04" + pickle.SHORT_BINUNICODE + b"\x05torch" + pickle.SHORT_BINUNICODE
    data += bytes([len(name)]) + name.encode() + pickle.STACK_GLOBAL + pickle.STOP
    with pytest.raises(pickle.UnpicklingError, match=rf"names torch.{name}, which is not taken"):
        load(data)


def test_forms_are_read_so_too() -> None:
    form, _ = flatten({"x": torch.ones(1), "bad": Calls(os.system, "true")}, travels=True)
    with pytest.raises(pickle.UnpicklingError, match=r"posix\.system"):
        received(form, [torch.ones(1)], [False])
