"""Tests of ``attached.py``: what a run sets on an object is not in its pickles and copies."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from torch import nn

from lightning_ddg.plugin.attached import checked_when_copied, replaced


class Plain:
    def __init__(self) -> None:
        self.value = [1]

    def say(self) -> str:
        return "the user's"


class WithState(Plain):
    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "seen": True}


class WithReduce(Plain):
    def __reduce__(self) -> Any:
        return _made, (self.value,)


def _made(value: list[int]) -> WithReduce:
    made = WithReduce()
    made.value = value
    return made


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = [1]
        self.layer = nn.Linear(1, 1)

    def say(self) -> str:
        return "the user's"


@pytest.mark.parametrize("kind", [Plain, WithState, WithReduce, Net])
def test_copies_and_pickles_have_the_users_own(kind: Any) -> None:
    made = kind()
    first = replaced(made, "say", lambda: "ours")
    second = replaced(made, "say", lambda: "ours again")
    undo_value = replaced(made, "value", lambda: "ours")
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), pickle.loads(pickle.dumps(made, protocol=2))):
        assert other.say() == "the user's"
        assert other.value == [1]
        assert not {"say", "__reduce_ex__"} & vars(other).keys()
    assert made.say() == "ours again"
    undo_value()
    second()
    assert made.say() == "ours"
    first()
    assert made.say() == "the user's"
    assert made.value == [1]
    assert not {"say", "__reduce_ex__"} & vars(made).keys()


def test_what_the_user_has_set_stays_in_the_copy() -> None:
    made = Net()
    made.say = int  # type: ignore[method-assign, assignment]
    undo = replaced(made, "say", lambda: "ours")
    assert copy.deepcopy(made).say is int  # type: ignore[comparison-overlap]
    undo()
    assert made.say is int  # type: ignore[comparison-overlap]


def test_a_check_before_a_copy() -> None:
    def refuse() -> None:
        raise RuntimeError("refused")

    made = Net()
    undo = checked_when_copied(made.layer, refuse)
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(RuntimeError, match="refused"):
            attempt(made)
    undo()
    assert "__reduce_ex__" not in vars(copy.deepcopy(made).layer)
