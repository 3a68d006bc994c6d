"""Tests of ``redirection.py``: the network's call is redirected while a step runs, and only then."""

from __future__ import annotations

import contextlib
import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ddg.plugin.ownership import Weights
from lightning_ddg.plugin.redirection import Redirection, StepDone


class Twice(nn.Module):
    def forward(self, x: Tensor, *, scale: float = 2.0) -> Tensor:
        return x * scale


def test_calls_are_handled_only_inside() -> None:
    net = Twice()
    redirection = Redirection(net)
    asked: list[Any] = []

    def handler(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        asked.append((args, kwargs))
        return "handled"

    assert net(torch.ones(1)).item() == 2.0
    with redirection.handled_by(handler):
        assert net(1, scale=3.0) == "handled"
        assert net(2) == "handled"
    assert asked == [((1,), {"scale": 3.0}), ((2,), {})]
    assert net(torch.ones(1), scale=5.0).item() == 5.0
    redirection.remove()


def test_the_handler_may_call_the_network_itself() -> None:
    net = Twice()
    redirection = Redirection(net)
    with redirection.handled_by(lambda args, kwargs: net(*args, **kwargs) + 1):
        assert net(torch.ones(1)).item() == 3.0


def test_an_error_in_the_handler_leaves_the_redirection_usable() -> None:
    net = Twice()
    redirection = Redirection(net)

    def fail(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise StepDone("what was captured")

    def step() -> None:
        with contextlib.suppress(Exception), redirection.handled_by(fail):  # a user's step that catches everything
            net(1)

    with pytest.raises(StepDone) as caught:
        step()
    assert caught.value.value == "what was captured"
    assert net(torch.ones(1)).item() == 2.0
    with redirection.handled_by(lambda args, kwargs: "again"):
        assert net(1) == "again"


def test_hooks_of_the_network_fire_around_the_handler() -> None:
    net = Twice()
    net.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    net.register_forward_hook(lambda module, args, output: output * 10)
    redirection = Redirection(net)
    with redirection.handled_by(lambda args, kwargs: args[0]):
        assert net(1) == 20


def test_removing_gives_the_class_its_forward_back() -> None:
    net = Twice()
    redirection = Redirection(net)
    assert "forward" in vars(net)
    redirection.remove()
    assert "forward" not in vars(net)
    assert net(torch.ones(1)).item() == 2.0


def test_removing_gives_the_instance_its_own_forward_back() -> None:
    net = Twice()

    def hundredfold(x: Tensor) -> Tensor:
        return x * 100

    net.forward = hundredfold  # type: ignore[method-assign, assignment]
    own = net.forward
    redirection = Redirection(net)
    assert net(torch.ones(1)).item() == 100.0
    redirection.remove()
    assert net.forward is own


def test_a_copy_made_meanwhile_runs_by_itself() -> None:
    """Callbacks that keep an average of the weights copy the module during the fit."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False))
    redirection = Redirection(net)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        next(twin.parameters()).fill_(7.0)
    with redirection.handled_by(lambda args, kwargs: "handled"):
        assert twin(torch.ones(1)).item() == 7.0
        assert net(torch.ones(1)) == "handled"


def test_layers_of_other_ranks_are_guarded() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    weights = Weights()
    redirection = Redirection(net, {net[1]: 2}, lambda: not weights.whole)
    net(torch.ones(1))
    with (
        redirection.handled_by(lambda args, kwargs: "handled"),
        pytest.raises(RuntimeError, match=r"calls a layer \(ReLU\) of stage 2, which lives in another process.*`self"),
    ):
        net[1](torch.ones(1))
    with redirection.handled_by(lambda args, kwargs: "handled"):
        net[0](torch.ones(1))
    weights.whole = False
    with pytest.raises(
        RuntimeError, match=r"current weights of stage 2 \(ReLU\) live in another process.*after the fit"
    ):
        net(torch.ones(1))
    weights.whole = True
    net(torch.ones(1))
    weights.whole = False
    redirection.remove()
    net(torch.ones(1))


class OwnForward(nn.Module):
    def forward(self, features: Tensor, *, scale: float = 2.0) -> Tensor:
        """Scale the features."""
        return features * scale


def test_whoever_inspects_the_call_finds_the_users_own() -> None:
    net = nn.Sequential(OwnForward(), OwnForward())
    before = [inspect.signature(module.forward) for module in (net[0], net)]
    full = inspect.getfullargspec(net[0].forward)
    for redirection in (Redirection(net[0]), Redirection(net, {net[0]: 1})):
        assert [inspect.signature(module.forward) for module in (net[0], net)] == before
        assert inspect.getfullargspec(net[0].forward) == full
        assert inspect.ismethod(net[0].forward)
        assert net[0].forward.__doc__ == "Scale the features."
        assert net[0].forward.__name__ == "forward"
        assert net[0].forward.__self__ is net[0]
        assert inspect.signature(net[0].state_dict) == inspect.signature(OwnForward().state_dict)
        redirection.remove()


def test_a_function_of_the_instance_keeps_its_signature() -> None:
    net = OwnForward()
    net.forward = lambda x, y=1: x  # type: ignore[method-assign, assignment]
    redirection = Redirection(net)
    assert list(inspect.signature(net.forward).parameters) == ["x", "y"]
    assert net(torch.ones(1)).item() == 1.0
    redirection.remove()


def test_states_of_layers_of_other_ranks_are_guarded() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1), nn.ReLU()))
    weights = Weights()
    redirection = Redirection(net, {net[1]: 2}, lambda: not weights.readable, lambda: "on_train_batch_end")
    assert len(net.state_dict()) == 4
    weights.stepped()
    for layer in (net, net[1], net[1][0]):
        with pytest.raises(RuntimeError, match=r"`state_dict\(\)` was called while training, in `on_train_batch_end`"):
            layer.state_dict()
        with pytest.raises(RuntimeError, match=r"copied or pickled .*stage 2 \(Sequential\).*`on_train_end`"):
            copy.deepcopy(layer)
    net[0].state_dict()
    with weights.read_as_they_are():
        assert len(net.state_dict()) == 4
        assert len(copy.deepcopy(net).state_dict()) == 4
    weights.shared = True
    twin = copy.deepcopy(net)
    weights.stepped()
    assert len(twin.state_dict()) == 4
    redirection.remove()
    assert len(net.state_dict()) == 4
