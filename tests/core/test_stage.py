"""Tests of ``stage.py``: a delayed backward is the plain one at the weights of its forward, for every kind of layer."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_ddg.core.pytree import map_tensors, tensors_of
from lightning_ddg.core.stage import Stage

Make = Callable[[], nn.Module]
Optimizer = Callable[[Any], torch.optim.Optimizer]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]


class WithMask(nn.Module):
    """Takes and gives a tuple with integers, and lets the skip connection pass through untouched."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, value: tuple[Tensor, Tensor, dict[str, Any]]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        x, ids, rest = value
        return self.linear(x).tanh() * ids, ids, {"skip": rest["skip"], "twice": [x, x], "name": rest["name"]}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())  # type: ignore[no-any-return]


class BiasOnly(nn.Module):
    """Its gradient by the input and that by the parameter are the same numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def partly_frozen() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    module[2].requires_grad_(False)
    return module


def parametrized() -> nn.Module:
    return nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh())


MODULES: dict[str, Make] = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)),
    "in_place_first": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True)),
    "in_place_only": lambda: nn.ReLU(inplace=True),
    "nothing_to_do": nn.Identity,
    "batch_norm": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.PReLU()),
    "layer_norm": lambda: nn.LayerNorm(4),
    "checkpointed": Checkpointed,
    "dropout": lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4), nn.Dropout(0.5)),
    "tuple": WithMask,
    "tied": Tied,
    "frozen": partly_frozen,
    "parametrized": parametrized,
    "bias_only": BiasOnly,
}
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1, fused=True),
}


def value_for(module: nn.Module, batch: int) -> Any:
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(batch))
    if not isinstance(module, WithMask):
        return x.requires_grad_()
    skip = x.clone().sin_().requires_grad_()
    return x.requires_grad_(), torch.tensor([[1], [0], [2], [1], [3]]), {"skip": skip, "name": "a"}


def plain_backward(module: nn.Module, value: Any, batch: int) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients by the parameters and by the inputs, at a copy of today's weights."""
    module = copy.deepcopy(module)
    module.zero_grad()
    inputs = [tensor for tensor in tensors_of(value) if tensor.requires_grad]
    with torch.random.fork_rng():
        torch.manual_seed(batch)
        # Not the leaves themselves: the module may write into its input.
        output = module(map_tensors(lambda tensor: tensor.clone(), value))
    outputs = [tensor for tensor in tensors_of(output) if tensor.requires_grad]
    torch.autograd.backward(outputs, upstream(outputs, batch))
    return [parameter.grad for parameter in module.parameters()], [tensor.grad for tensor in inputs]


def upstream(outputs: list[Tensor], batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + batch)
    return [torch.randn(output.shape, dtype=output.dtype, generator=generator) for output in outputs]


def same(got: list[Tensor | None], expected: list[Tensor | None]) -> bool:
    pairs = list(zip(got, expected, strict=True))
    return all((a is None) == (b is None) for a, b in pairs) and all(
        torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in pairs if a is not None and b is not None
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize("name", MODULES)
def test_a_backward_is_that_of_the_weights_of_its_forward(name: str, delay: int, optimizer: str) -> None:
    torch.manual_seed(4)
    module = MODULES[name]().double()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    chosen = OPTIMIZERS[optimizer](trained) if trained else None
    stage = Stage(module, delay)
    expected: deque[Any] = deque()
    heads: deque[list[Tensor]] = deque()
    for batch in range(6):
        value = value_for(module, batch)
        expected.append(plain_backward(module, value, batch))
        with torch.random.fork_rng():
            torch.manual_seed(batch)
            output = stage.forward(value_for(module, batch), received=True)
        heads.append([tensor for tensor in tensors_of(output) if tensor.requires_grad])
        assert len(stage) == len(heads)
        if len(stage) <= delay:
            continue
        got_inputs = stage.backward([*upstream(heads.popleft(), batch - delay)])
        by_parameters, by_inputs = expected.popleft()
        assert same([parameter.grad for parameter in module.parameters()], by_parameters)
        assert same(got_inputs, by_inputs)
        if chosen is None:
            continue
        if delay and batch > delay and name != "bias_only":
            today = plain_backward(module, value_for(module, batch - delay), batch - delay)
            assert not same(sum(today, []), [*by_parameters, *by_inputs]), "it could not tell today's weights"
        stage.before_step()
        chosen.step()
        stage.after_step()
        # An in-place update of what was sent would be a race.
        before = [None if grad is None else grad.clone() for grad in got_inputs]
        for parameter in trained:
            assert parameter.grad is not None
            parameter.grad.fill_(float("nan"))
        assert same(got_inputs, before)
        chosen.zero_grad()
    assert len(stage) == delay


class Probe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.used: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.used.append(self.weight)
        return x * self.weight


def test_nothing_is_stashed_without_a_delay() -> None:
    probe = Probe()
    stage = Stage(probe, 0)
    stage.forward(torch.ones(3), received=False)
    assert probe.used == [probe.weight]
    assert probe.used[0] is probe.weight


def test_weights_are_stashed_once_between_two_updates() -> None:
    probe = Probe()
    stage = Stage(probe, 2)
    stage.forward(torch.ones(3), received=False)
    stage.forward(torch.ones(3), received=False)
    assert probe.used[0] is probe.used[1]
    assert probe.used[0] is not probe.weight
    stage.before_step()
    stage.forward(torch.ones(3), received=False)
    assert probe.used[2] is not probe.used[1]
    assert probe.weight is dict(probe.named_parameters())["weight"], "the module has its own parameter back"


@pytest.mark.parametrize("delay", [1, 2])
def test_there_are_as_many_sets_of_weights_as_batches_in_flight(delay: int) -> None:
    """The memory is used again in turn; the parameter stays the same object."""
    module = nn.Linear(2, 1, bias=False)
    parameter, stage = module.weight, Stage(module, delay)
    held = []
    for batch in range(3 * delay + 3):
        stage.forward(torch.ones(1, 2), received=False)
        if len(stage) > delay:
            stage.backward([torch.ones(1, 1)])
        stage.before_step()
        stage.after_step()
        held.append(parameter.data_ptr())
        assert module.weight is parameter
        with torch.no_grad():
            parameter.add_(1)
        assert len(set(held)) == min(batch + 1, delay + 1), "the first set is the one it was made with"


def test_memory_is_not_used_again_for_other_parameters() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    module[0].requires_grad_(False)
    stage = Stage(module, 1)
    for batch in range(6):
        module[0].requires_grad_(batch > 2)
        output = stage.forward(torch.ones(1, 2), received=False)
        if len(stage) > 1:
            stage.backward([torch.ones_like(output)])
        stage.before_step()
    assert [parameter.grad is None for parameter in module.parameters()] == [False] * 4


def test_what_a_validation_stashes_in_inference_mode_can_be_trained() -> None:
    module = nn.Linear(3, 3)
    stage, optimizer = Stage(module, 1), torch.optim.SGD(module.parameters(), lr=0.1)
    for batch in range(6):
        optimizer.zero_grad()
        output = stage.forward(torch.ones(2, 3), received=False)
        if len(stage) > 1:
            stage.backward([torch.ones_like(output)])
        with torch.inference_mode(batch < 3):
            stage.before_step()
        assert not module.weight.is_inference()
        optimizer.step()
        stage.after_step()


def in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(2)


def other_memory(weight: nn.Parameter) -> None:
    weight.data = weight.data * 2


@pytest.mark.parametrize("change", [in_place, other_memory])
@pytest.mark.parametrize("where", ["forward", "before_step", "after_step"])
def test_weights_that_change_too_early_are_refused(where: str, change: Callable[[nn.Parameter], None]) -> None:
    module = nn.Linear(2, 1)
    stage = Stage(module, 1)
    stage.forward(torch.ones(1, 2), received=False)
    change(module.weight)
    calls = {"forward": lambda: stage.forward(torch.ones(1, 2), received=False), "before_step": stage.before_step}
    with pytest.raises(RuntimeError, match="changed between a forward and the optimizer's step.*on_train_batch_end"):
        calls.get(where, stage.after_step)()


def test_weights_that_are_put_back_as_they_were_do_no_harm() -> None:
    module = nn.Linear(2, 1)
    stage, kept = Stage(module, 1), module.weight.data.clone()
    stage.forward(torch.ones(1, 2), received=False)
    module.weight.data = kept
    stage.before_step()
    stage.after_step()
    assert torch.equal(module.weight, kept)


def test_gradients_accumulate_until_they_are_cleared() -> None:
    module = nn.Linear(2, 1, bias=False)
    stage = Stage(module, 1)
    for value in (1.0, 10.0, 100.0):
        stage.forward(torch.full((1, 2), value), received=False)
    for _ in range(2):
        assert stage.backward([torch.ones(1, 1)]) == []
    assert module.weight.grad is not None
    assert module.weight.grad.tolist() == [[11.0, 11.0]]


def test_hooks_fire() -> None:
    module = nn.Linear(2, 2)
    stage = Stage(module, 1)
    fired: list[str] = []

    def doubled(grad: Tensor) -> Tensor:
        fired.append("gradient")
        return grad * 2

    module.weight.register_hook(doubled)  # type: ignore[no-untyped-call]
    module.weight.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
        lambda parameter: fired.append("accumulated")
    )
    module.register_forward_hook(lambda *_: fired.append("forward"))
    module.register_full_backward_hook(lambda *_: fired.append("backward"))
    stage.forward(torch.ones(1, 2).requires_grad_(), received=True)
    assert fired == ["forward"]
    stage.backward([torch.ones(1, 2)])
    assert sorted(fired[1:]) == ["accumulated", "backward", "gradient"]
    assert module.weight.grad is not None
    assert module.weight.grad.tolist() == [[2.0, 2.0], [2.0, 2.0]]


def test_an_output_without_a_gradient() -> None:
    module = nn.Linear(2, 2).requires_grad_(False)
    stage = Stage(module, 1)
    output = stage.forward(torch.ones(1, 2), received=False)
    assert not output.requires_grad
    assert stage.backward([]) == []
    assert module.weight.grad is None
    stage.forward(torch.ones(1, 2), received=True)
    assert stage.backward([]) == [], "nothing was received that wants a gradient"


def test_an_output_on_which_nothing_depends() -> None:
    stage = Stage(nn.Linear(2, 2), 1)
    stage.forward(torch.ones(1, 2).requires_grad_(), received=True)
    assert stage.backward([None]) == [None]
    assert stage.module.weight.grad is None


def test_an_input_on_which_nothing_depends() -> None:
    class First(nn.Module):
        def forward(self, value: tuple[Tensor, Tensor]) -> Tensor:
            return value[0] * 3

    stage = Stage(First(), 1)
    stage.forward((torch.ones(2).requires_grad_(), torch.ones(2).requires_grad_()), received=True)
    by_first, by_second = stage.backward([torch.ones(2)])
    assert by_first is not None
    assert by_first.tolist() == [3.0, 3.0]
    assert by_second is None


def test_the_last_stage_leaves_its_backward_to_the_loss() -> None:
    module = nn.Linear(2, 1, bias=False)
    stage = Stage(module, 0)
    stage.forward(torch.ones(1, 2).requires_grad_(), received=True).sum().backward()
    (grad,) = stage.backward_done()
    assert grad is not None
    assert torch.equal(grad, module.weight.detach())
    assert len(stage) == 0


def test_the_first_stage_passes_its_arguments_on() -> None:
    class TwoArguments(nn.Module):
        def forward(self, x: Tensor, *, scale: float) -> Tensor:
            return x * scale

    assert Stage(TwoArguments(), 0).forward(torch.ones(1), received=False, scale=3.0).item() == 3.0


def test_clear_forgets_what_is_in_flight() -> None:
    stage = Stage(nn.Linear(2, 2), 3)
    for _ in range(3):
        stage.forward(torch.ones(1, 2), received=False)
    assert len(stage) == 3
    stage.clear()
    assert len(stage) == 0
    with torch.no_grad():
        for parameter in stage.module.parameters():
            parameter.zero_()
    assert stage.forward(torch.ones(1, 2), received=False).tolist() == [[0.0, 0.0]], "the weights were stashed anew"
