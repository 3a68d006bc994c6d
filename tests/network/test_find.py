"""Tests of ``network/find.py``: which network is found, and what is refused. Change them with the rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_ddg.network.find import find_network
from lightning_ddg.network.replay.chain import ReplayedChain


class Root(nn.Module):
    """A module with the given children, as a LightningModule would have them."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Doubled(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Sequential):
    """Only another name for a Sequential."""


class Body(nn.Module):
    """A backbone that is not a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


# Without a list of layers.


def test_the_only_sequential_with_parameters_is_the_network() -> None:
    root = Root(augment=nn.Sequential(nn.Dropout()), net=mlp(), loss=nn.CrossEntropyLoss(), extra=nn.Linear(2, 2))
    network = find_network(root, example=lambda _, name: ((torch.ones(1, 4),), {}) if name == "net" else None)
    assert network.target is root.net
    assert network.target_name == "net"
    assert network.chain.names == ["net.0", "net.1", "net.2"]
    assert network.chain.layers == list(root.net)


def test_nested_sequentials_are_flattened() -> None:
    root = Root(net=nn.Sequential(mlp(), Renamed(nn.Tanh(), nn.Sequential()), nn.Linear(2, 2)))
    assert find_network(root).chain.names == ["net.0.0", "net.0.1", "net.0.2", "net.1.0", "net.2"]


def with_parameter(module: nn.Module) -> None:
    module.register_parameter("scale", nn.Parameter(torch.ones(())))


CALL_DOES_MORE: list[Callable[[nn.Module], Any]] = [
    lambda m: m.register_full_backward_hook(lambda *_: None),
    lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    lambda m: m.compile(backend="eager"),
]
HOLDS_MORE: list[Callable[[nn.Module], Any]] = [
    lambda m: m.register_buffer("mean", torch.zeros(())),
    with_parameter,
    lambda m: m.register_forward_hook(lambda *_: None),
    lambda m: m.register_forward_pre_hook(lambda *_: None),
]


@pytest.mark.parametrize("change", CALL_DOES_MORE)
def test_a_nested_sequential_whose_call_does_more_stays_one_layer(change: Callable[[nn.Module], Any]) -> None:
    inner = mlp()
    change(inner)
    assert find_network(Root(net=nn.Sequential(inner, nn.Linear(2, 2)))).chain.names == ["net.0", "net.1"]


@pytest.mark.parametrize("change", HOLDS_MORE)
def test_a_nested_sequential_that_holds_more_is_looked_into(change: Callable[[nn.Module], Any]) -> None:
    inner = mlp()
    change(inner)
    assert find_network(Root(net=nn.Sequential(inner, nn.Linear(2, 2)))).chain.names == ["net.0.0", "net.0.2", "net.1"]


def test_a_nested_sequential_with_an_overridden_forward_is_looked_into() -> None:
    root = Root(net=nn.Sequential(nn.Linear(4, 4), Doubled(nn.Linear(4, 4), nn.ReLU())))
    assert find_network(root).chain.names == ["net.0", "net.1.0"]


def test_hooks_on_the_network_itself_do_not_keep_it_whole() -> None:
    root = Root(net=mlp())
    root.net.register_forward_hook(lambda *_: None)
    assert len(find_network(root).chain) == 3


def test_a_module_used_twice_appears_twice() -> None:
    act = nn.ReLU()
    root = Root(net=nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act))
    network = find_network(root)
    assert network.chain.names == ["net.0", "net.1", "net.2", "net.3"]
    assert network.chain.layers[1] is network.chain.layers[3] is act


def test_of_a_sequential_and_its_parts_the_outer_one_is_the_network() -> None:
    features, classifier = mlp(), nn.Sequential(nn.Linear(2, 2))
    root = Root(features=features, classifier=classifier, net=nn.Sequential(features, classifier))
    network = find_network(root)
    assert network.target_name == "net"
    assert network.chain.names == ["net.0.0", "net.0.1", "net.0.2", "net.1.0"]


def test_a_network_that_is_no_sequential_has_the_layers_that_it_calls() -> None:
    network = find_network(Root(net=Body(), loss=nn.MSELoss()))
    assert network.target_name == "net"
    assert network.chain.names == ["net.stem", "net.blocks.0", "net.blocks.1", "net.head"]


def test_a_sequential_of_larger_blocks_is_cut_inside_them() -> None:
    assert find_network(Root(net=nn.Sequential(Body(), nn.ReLU(), nn.Linear(2, 2)))).chain.names == [
        "net.0.stem", "net.0.blocks.0", "net.0.blocks.1", "net.0.head", "net.2",
    ]  # fmt: skip


def test_split_points_may_name_modules_without_parameters() -> None:
    root = Root(net=nn.Sequential(Body(), nn.ReLU(), nn.Linear(2, 2)))
    assert "net.1" in find_network(root, points=["net.1"]).chain.names


class TwoParts(Root):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class OnePart(Root):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x.flatten(1)).softmax(-1)


class OwnParameter(Root):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__(**children)
        self.shift = nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x + self.shift)


class NoForward(Root):
    forward = nn.Module.forward  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("root", "target"),
    [
        (TwoParts(body=Body(), head=nn.Linear(2, 2)), ""),
        (TwoParts(body=mlp(), head=nn.Linear(2, 2)), ""),
        (OnePart(body=Body(), teacher=Body()), ""),
        (OnePart(body=Body(), teacher=mlp()), ""),
        (OwnParameter(body=Body()), ""),
        (OwnParameter(body=Body(), teacher=mlp()), ""),
        (NoForward(a=Body(), b=mlp()), "b"),
        (NoForward(a=nn.ModuleDict({"only": mlp()}), b=nn.ModuleList([nn.ReLU()])), "a.only"),
        (TwoParts(blocks=nn.ModuleList([mlp(), mlp()])), ""),
        (NoForward(a=Body(), b=Body().requires_grad_(False)), "a"),
    ],
)
def test_the_network_is_what_the_forward_calls(root: nn.Module, target: str) -> None:
    network = find_network(root)
    assert network.target_name == target
    assert network.target is root.get_submodule(target)


def test_an_example_call_says_how_the_network_is_called() -> None:
    class Masked(Body):
        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(x) if mask is None else self.head(x)

    asked = []

    def example(target: nn.Module, name: str) -> Any:
        asked.append((target, name))
        return (torch.ones(1, 4),), {"mask": torch.ones(1)}

    root = Root(net=Masked())
    assert find_network(root, example=example).chain.names[0] == "net.head"
    assert find_network(root).chain.names[0] == "net.stem"
    assert asked == [(root.net, "net")]


@pytest.mark.parametrize(
    ("children", "problem"),
    [
        ({}, r"parameters are none \(all children: none\)\."),
        (
            {"a": mlp(), "b": mlp(), "loss": nn.MSELoss()},
            r"are 'a', 'b' \(all .*: a: Sequential, b: .*, loss: MSELoss\)\.",
        ),
        ({"a": Body(), "b": Body()}, r"parameters are 'a', 'b' \(all children: a: Body, b: Body\)\."),
    ],
)
def test_none_or_several_networks_are_refused(children: dict[str, nn.Module], problem: str) -> None:
    message = rf"Strategy X cannot tell which part of NoForward is .*{problem} Call .*, or .* `configure_stages\(\)`"
    with pytest.raises(TypeError, match=message):
        find_network(NoForward(**children), requirer="Strategy X")


class Branching(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x) if x.sum() > 0 else -layer(x)
        return x


def test_what_cannot_be_followed_runs_its_own_code_in_parts() -> None:
    network = find_network(Root(net=Branching(nn.Linear(4, 4), nn.Linear(4, 4))))
    assert isinstance(network.chain, ReplayedChain)
    assert network.chain.names == ["net.layers.0", "net.layers.1"]


def test_what_hides_most_of_its_layers_runs_its_own_code_in_parts() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Branching(nn.Linear(4, 4), nn.Linear(4, 4))
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

    names = find_network(Root(net=Wrapped())).chain.names
    assert names == ["net.body.layers.0", "net.body.layers.1", "net.head"]


def test_a_network_whose_own_code_fails_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"'net' \(Body\) cannot be run in parts: .* failed .*mat1 and mat2.* Return the layers"
    ):
        find_network(Root(net=Body()), example=lambda target, name: ((torch.ones(1, 3),), {}))


def test_parameters_of_the_network_outside_its_layers_are_refused() -> None:
    root = Root(net=mlp())
    with_parameter(root.net)
    with pytest.raises(ValueError, match=r"network 'net' \(Sequential\) holds 'net.scale'.*move them out"):
        find_network(root)


def test_parameters_that_are_not_initialized_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layer 'net.0' \(LazyLinear\).*not initialized yet: run the network once"):
        find_network(Root(net=nn.Sequential(nn.LazyLinear(3))))


# With a list of layers.


def test_the_innermost_module_with_a_forward_is_the_target() -> None:
    root = Root(net=Root(body=Body()))
    body = root.net.body
    network = find_network(root, [body.stem, *body.blocks, body.head])
    assert network.target is body
    assert network.target_name == "net.body"
    assert network.chain.names == ["net.body.stem", "net.body.blocks.0", "net.body.blocks.1", "net.body.head"]


def test_module_lists_are_opened_and_are_never_the_target() -> None:
    root = Root(blocks=nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), other=nn.Linear(2, 2))
    for layers in (root.blocks, [root.blocks], list(root.blocks)):
        network = find_network(root, layers)
        assert network.target is root
        assert network.target_name == ""
        assert network.chain.names == ["blocks.0", "blocks.1"]


def test_one_registered_sequential_is_the_target() -> None:
    root = Root(a=mlp(), b=mlp())
    root.b.register_forward_hook(lambda *_: None)
    for layers in (root.b, [root.b]):
        network = find_network(root, layers)
        assert network.target is root.b
        assert network.chain.names == ["b.0", "b.1", "b.2"]


def test_the_layers_of_a_sequential_make_it_the_target() -> None:
    root = Root(net=mlp())
    for layers in (list(root.net), [root.net[:2], root.net[2:]], nn.Sequential(*root.net)):
        network = find_network(root, layers)
        assert network.target is root.net
        assert network.chain.names == ["net.0", "net.1", "net.2"]


def test_a_listed_part_is_not_the_target() -> None:
    root = Root(features=mlp())
    assert find_network(root, [root.features, nn.Flatten()]).target is root


def test_groups_and_functions_made_for_the_list() -> None:
    root = Root(stem=nn.Linear(4, 4), head=nn.Linear(4, 2))
    network = find_network(root, [nn.Sequential(root.stem, nn.ReLU()), nn.Flatten(), nn.Sequential(root.head)])
    assert network.target is root
    assert network.chain.names == ["stem", "layers[0].1", "layers[1]", "head"]
    x = torch.randn(3, 4)
    assert torch.equal(network.chain.segment(0, 4)(x), root.head(root.stem(x).relu()))


def test_a_wrapper_around_a_registered_module_is_a_layer() -> None:
    root = Root(net=Body())
    network = find_network(root, [Doubled(root.net.stem), root.net.head, *root.net.blocks])
    assert network.target is root.net
    assert network.chain.names[0] == "layers[0]"


def test_a_layer_without_parameters_may_come_twice() -> None:
    root = Root(a=nn.Linear(2, 2), act=nn.ReLU(), b=nn.Linear(2, 2))
    network = find_network(root, [root.a, root.act, root.b, root.act])
    assert network.chain.names == ["a", "act", "b", "layers[3]"]


def test_parameters_beside_the_layers_are_fine_when_the_target_is_the_root() -> None:
    root = Root(a=nn.Linear(2, 2), b=nn.Linear(2, 2), loss=nn.Linear(2, 2))
    assert find_network(root, [root.a, root.b]).target is root


def test_layers_without_parameters_only() -> None:
    assert find_network(Root(net=mlp()), [nn.Flatten(), nn.ReLU()]).target_name == ""


def test_parameters_that_no_layer_holds_are_refused() -> None:
    root = Root(net=Body())
    with pytest.raises(ValueError, match=r"'net' \(Body\) holds 'net.blocks.0.weight', .*'net.blocks.1.bias': every"):
        find_network(root, [root.net.stem, root.net.head])


@pytest.mark.parametrize("layers", [[], (), nn.Sequential(), nn.ModuleList(), [nn.Sequential()]])
def test_no_layers_are_refused(layers: Any) -> None:
    with pytest.raises(ValueError, match=r"configure_stages\(\) returned 0 layers"):
        find_network(Root(net=mlp()), layers)


@pytest.mark.parametrize("layers", [nn.Linear(2, 2), "net", 3, iter([nn.Linear(2, 2)])])
def test_something_else_than_a_list_is_refused(layers: Any) -> None:
    with pytest.raises(TypeError, match=rf"returned a {type(layers).__name__}: return the layers"):
        find_network(Root(net=mlp()), layers)


def test_something_else_than_a_module_is_refused() -> None:
    root = Root(net=mlp())
    with pytest.raises(TypeError, match=r"returned a builtin_function_or_method at index 1: every layer must be"):
        find_network(root, [root.net, torch.relu])  # type: ignore[list-item]


def test_a_layer_without_forward_is_refused() -> None:
    root = Root(blocks=nn.ModuleDict({"a": nn.Linear(2, 2)}))
    with pytest.raises(TypeError, match=r"'blocks' .* is a ModuleDict, which has no `forward`"):
        find_network(root, [root.blocks])


def test_parameters_that_the_root_does_not_have_are_refused() -> None:
    root = Root(net=mlp())
    with pytest.raises(ValueError, match=r"'layers\[1\]' \(Linear\) .* Root does not have, .*in __init__"):
        find_network(root, [root.net, nn.Linear(2, 2)])


def test_a_layer_with_parameters_listed_twice_is_refused() -> None:
    root = Root(a=nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"returned the layer 'a' \(Linear\) twice: .* tied to itself"):
        find_network(root, [root.a, nn.ReLU(), root.a])


def test_the_root_as_a_layer_is_refused() -> None:
    root = Root(net=mlp())
    with pytest.raises(ValueError, match="returned the Root itself as a layer"):
        find_network(root, [root])
