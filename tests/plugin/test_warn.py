"""Tests of ``warn.py``: a warning names the line of the user's that led to it, wherever it is issued."""

from __future__ import annotations

import ast
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import lightning_ddg
from lightning_ddg import Staleness
from lightning_ddg.plugin.warn import is_users, raised_by_user, warn, warn_on_rank_zero

PACKAGE = Path(lightning_ddg.__file__).parent
SKIPPED = ["lightning_ddg.plugin.step", "torch.nn.modules", "contextlib", "lightning.pytorch.loops", "lightning_fabric"]


def called_by(function: Any, module: str) -> Any:
    """Return a function of that module's that calls the given one."""
    space: dict[str, Any] = {"__name__": module, "function": function}
    exec(compile("def call():\n    return function()", f"{module}.py", "exec"), space)
    return space["call"]


@pytest.mark.parametrize("issue", [warn, warn_on_rank_zero])
def test_the_innermost_line_of_the_users_is_named(issue: Any) -> None:
    space: dict[str, Any] = {"__name__": "lightning_ddg.plugin.step", "issue": issue}
    exec("def first():\n    issue('look')", space)
    call = reduce(called_by, [*SKIPPED, "theirs.train", *SKIPPED], space["first"])
    with pytest.warns(UserWarning, match="look") as caught:
        call()
    assert [(one.filename, one.lineno) for one in caught] == [("theirs.train.py", 2)]
    with pytest.warns(UserWarning, match="look") as caught:
        reduce(called_by, SKIPPED, space["first"])()
    assert [one.filename for one in caught] == [__file__]


def test_what_is_run_by_its_name_is_known_by_it() -> None:
    assert is_users("__main__")
    assert is_users("lightning_bolts.models")
    assert not is_users("lightning")
    space: dict[str, Any] = {"__name__": "__main__", "__spec__": lightning_ddg.__spec__, "warn": warn}
    exec("def main():\n    warn('look')", space)
    with pytest.warns(UserWarning, match="look") as caught:
        space["main"]()
    assert [one.filename for one in caught] == [__file__]


def test_whose_line_has_raised() -> None:
    def failing(function: Any) -> BaseException:
        with pytest.raises(Exception, match=".") as caught:
            function()
        return caught.value

    assert raised_by_user(failing(lambda: {}["key"]))
    assert not raised_by_user(failing(lambda: nn.Linear(1, 1).nothing))


def test_a_renamed_option_is_named_in_the_users_line() -> None:
    with pytest.warns(DeprecationWarning, match="now called extrapolate") as caught:
        Staleness(predict=True)
    assert [one.filename for one in caught] == [__file__]


def test_all_warnings_are_issued_so() -> None:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "rank_zero_warn"):
                found.add(path.relative_to(PACKAGE).as_posix())
    # The core knows no line but its caller's.
    assert found == {"core/staleness.py"}
