"""Tests of ``network/replay``: what crosses a cut, what is left behind, and what cannot be cut."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_ddg.core.pytree import tensors_of
from lightning_ddg.core.rng import Batch
from lightning_ddg.core.stage import Stage
from lightning_ddg.network.balance import cut_at, forbidden_cuts
from lightning_ddg.network.cut import Costs, decide_cut
from lightning_ddg.network.profile import flop_costs
from lightning_ddg.network.replay.analysis import analyse
from lightning_ddg.network.replay.chain import ReplayedChain
from lightning_ddg.network.replay.code import forward_of
from lightning_ddg.plugin.placeholder import zeros_like_output
from tests.network.test_replay_families import BEFORE_5_23, FAMILIES, Handmade, batch_of_ids, gpt2, language
from tests.network.uncut import Call, assert_same, assert_same_step, cuts_of, doubled, grads_of, made, run_parts


def test_the_root_itself_can_be_the_network_and_is_never_copied() -> None:
    class Trainer:
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            raise AssertionError("a copy of the trainer")

    class Root(Handmade):
        def __init__(self) -> None:
            super().__init__()
            self.trainer = Trainer()

    root = made(Root)
    call = FAMILIES["handmade"].call(2, 6)
    chain = ReplayedChain(root, "", call)
    assert chain.names[:5] == ["embed", "blocks.0.attend", "blocks.0.mlp.0", "blocks.0.mlp.2", "blocks.0.norm"]
    assert chain.names[-1] == "head"
    # The glue before the head is the stage of the block before it.
    assert "position" in dict(chain.segment(0, 1).named_parameters())
    assert "gain" in dict(chain.segment(16, 17).named_parameters())
    segment = chain.segment(10, 18)
    copied = copy.deepcopy(segment)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    root.eval()
    given = chain.segment(0, 10)(*call[0], **call[1])
    assert not copied(given)["logits"].any()
    assert segment(given)["logits"].any()
    assert root.gain.any()


# ---- what crosses, and what it costs


def test_only_what_the_next_stage_cannot_compute_crosses() -> None:
    network = made(gpt2)
    call = language(3, 6)
    chain = ReplayedChain(network, "net", call)
    value = chain.segment(0, chain.names.index("net.transformer.h.1.ln_1"))(**call[1])
    (hidden,) = value.values.values()
    assert hidden.shape == (3, 6, 16)
    assert {tensor.dtype for tensor in tensors_of(value)} == {torch.float64, torch.int64}
    vision = FAMILIES["ViT"]
    call = doubled(vision.call(2, 0))
    chain = ReplayedChain(made(vision.make), "net", call)
    before = chain.names.index("net.vit.layers.0.layernorm_before")
    shapes = [tuple(tensor.shape) for tensor in tensors_of(chain.segment(0, before)(**call[1]))]
    assert shapes == [(2,), (2, 17, 16)]
    # Called in another way, all that may be needed crosses.
    value = chain.segment(0, before)(pixel_values=call[1]["pixel_values"], interpolate_pos_encoding=True)
    assert [tuple(tensor.shape) for tensor in tensors_of(value)] == [(2, 3, 32, 32), (2, 17, 16)]


def test_gradients_cross_only_with_what_was_computed() -> None:
    call = doubled(FAMILIES["ViT"].call(2, 0))
    call[1]["pixel_values"].requires_grad_()
    value = ReplayedChain(made(FAMILIES["ViT"].make), "net").segment(0, 2)(**call[1])
    assert [tensor.requires_grad for tensor in tensors_of(value)] == [False, False, True]


def test_each_layer_can_be_costed_by_itself() -> None:
    network = made(gpt2)
    call = language(3, 6)
    chain = ReplayedChain(network, "net", call)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        chain.segment(0, len(chain))(**call[1]).loss.backward()
    assert sum(flop_costs(chain, *call)) - len(chain) == counter.get_total_flops()


def test_what_cannot_begin_a_stage_belongs_to_the_layer_before() -> None:
    network = made(Skips)
    network.mode = "again"
    x = torch.randn(2, 4, dtype=torch.float64)
    chain = ReplayedChain(network, "net", ((x,), {}))
    assert chain.names == ["net.blocks.0", "net.last"]
    assert chain.modules(0, 1) == list(network.blocks)  # type: ignore[arg-type]
    assert list(chain.segment(1, 2).state_dict()) == ["net.last.weight", "net.last.bias"]
    assert len(flop_costs(chain, (x,), {})) == 2
    with pytest.raises(ValueError, match="Layers that can: 'net.last'"):
        cut_at(chain, ["net.blocks.2"], 2)  # type: ignore[arg-type]


def test_ties_are_found() -> None:
    chain = ReplayedChain(made(lambda: Handmade(tie=True)), "net", FAMILIES["handmade"].call(2, 5))
    assert set(forbidden_cuts(chain, ties=False)) == set(range(1, 18))
    assert not forbidden_cuts(chain)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (2, 1), (-1, 2), (0, 19)])
def test_positions_outside_the_chain_are_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=f"from position {start} to {stop}: the chain has 18 layers"):
        ReplayedChain(made(Handmade), "net").segment(start, stop)


def test_the_shape_of_the_output_can_be_had_without_values_where_no_code_asks_for_them() -> None:
    network = made(Handmade)
    call = (batch_of_ids(2, 5),), {}
    chain = ReplayedChain(network, "net", call)
    make = zeros_like_output(chain.segment(9, 18))
    output = make(chain.segment(0, 9)(*call[0]))
    assert output["logits"].shape == (2, 5, 20)
    call = FAMILIES["handmade"].call(2, 5)
    with pytest.raises(RuntimeError, match="do not run on the meta device"):
        make(chain.segment(0, 9)(*call[0], **call[1]))


# ---- nothing is left behind


def state_of(network: nn.Module) -> list[Any]:
    tables = [(vars(module).get("_compiled_call_impl"), module.training) for module in network.modules()]
    tensors = [(name, id(value)) for name, value in (*network.named_parameters(), *network.named_buffers())]
    values = [value.detach().clone() for value in network.state_dict().values()]
    return [tables, tensors, [value.tolist() for value in values], torch.get_rng_state().tolist()]


@pytest.mark.parametrize("name", ["handmade", "ResNet", "GPT-2"])
def test_the_survey_leaves_everything_as_it_was(name: str) -> None:
    network = made(FAMILIES[name].make)
    network.eval()
    next(network.children()).train()
    call = doubled(FAMILIES[name].call(2, 5))
    copied = copy.deepcopy(call)
    before = state_of(network)
    ReplayedChain(network, "net", call)
    assert state_of(network) == before
    assert_same(call, copied)


def test_a_failed_run_leaves_everything_as_it_was() -> None:
    network = made(Handmade)
    chain = ReplayedChain(network, "net", FAMILIES["handmade"].call(2, 5))
    before = state_of(network)
    with pytest.raises(ValueError, match="13 tokens are more than 12"):
        chain.segment(0, 2)(batch_of_ids(2, 13))
    assert state_of(network) == before
    assert torch.backends.mha.get_fastpath_enabled()


def test_hooks_fire_for_the_layers_that_run_and_no_others() -> None:
    network = made(Handmade)
    call = FAMILIES["handmade"].call(2, 5)
    chain = ReplayedChain(network, "net", call)
    fired: list[str] = []
    for name, module in network.named_modules():
        module.register_forward_hook(lambda *_, name=name: fired.append(name))
        module.register_forward_pre_hook(lambda *_, name=name: fired.append(name))
    value = chain.segment(0, 5)(*call[0], **call[1])
    assert {name for name in fired if name.count(".") < 2} == {"embed", "blocks.0", "drops.0", "drops.1"}
    fired.clear()
    chain.segment(5, 18)(value)
    assert {"embed", "blocks.0"}.isdisjoint(fired)
    assert {"blocks.1", "blocks.2", "blocks.3", "head"} <= set(fired)


def test_a_module_calls_what_is_put_in_its_calls_place() -> None:
    """The one private name this rests on; ``nn.Module.compile`` uses it."""
    module = nn.Linear(2, 2)
    module.register_forward_hook(lambda *_: pytest.fail("a hook fired"))
    module._compiled_call_impl = lambda *args, **kwargs: (args, kwargs)
    assert module(1, a=2) == ((1,), {"a": 2})


# ---- activation checkpointing


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad", "ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(reentrant: bool) -> None:
    ours = made(gpt2)
    theirs = copy.deepcopy(ours)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    call = language(3, 6)
    chain = ReplayedChain(ours, "net", call)
    theirs.config.use_cache = False
    if reentrant and BEFORE_5_23:
        # The checkpoint is then around what a stage takes over, and no longer inside it.
        with pytest.raises(RuntimeError, match="as a reentrant checkpoint does.*Use `use_reentrant=False`"):
            assert_same_step(chain, [2, 4], call, ours, theirs)
        return
    assert_same_step(chain, [2, 4], call, ours, theirs)


class Checkpointed(nn.Module):
    """Checkpoints its blocks, and code of its own with a parameter."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.embed = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.2)) for _ in range(3))
        self.gain = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return checkpoint(lambda h: (h * self.gain).sin(), x, use_reentrant=False)  # type: ignore[no-any-return]


class CheckpointsItself(nn.Module):
    """A block whose call checkpoints it, as in older versions of Hugging Face's library."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 4), nn.Dropout(0.2)
        self.depth = self.deepest = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.depth += 1
        self.deepest = max(self.deepest, self.depth)
        try:
            return checkpoint(partial(super().__call__, **kwargs), *args, use_reentrant=False)
        finally:
            self.depth -= 1

    def forward(self, x: Tensor, gain: float) -> Tensor:
        return self.dropout(self.linear(x).tanh()) * gain  # type: ignore[no-any-return]


class CheckpointingBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CheckpointsItself() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, gain=2.0)
        return x


def test_a_layer_that_checkpoints_itself_does_so_once() -> None:
    ours = made(CheckpointingBlocks)
    theirs = copy.deepcopy(ours)
    call = (torch.randn(2, 4, dtype=torch.float64),), {}
    chain = ReplayedChain(ours, "net", call)
    assert_same_step(chain, [1, 3], call, ours, theirs)
    assert [block.deepest for block in ours.blocks] == [1] * 4


def test_checkpoints_around_layers() -> None:
    ours = made(Checkpointed)
    call = (torch.randn(2, 4, dtype=torch.float64),), {}
    chain = ReplayedChain(ours, "net", call)
    assert_same_step(chain, [1, 2, 3], call, ours, copy.deepcopy(ours))


def test_a_checkpoint_around_code_finds_the_stashed_weights() -> None:
    network = made(Checkpointed)
    x = torch.randn(2, 4, dtype=torch.float64)
    chain = ReplayedChain(network, "net", ((x,), {}))
    reference = copy.deepcopy(network).eval()
    network.eval()
    reference(x).sum().backward()
    stage = Stage(chain.segment(0, 4), 1)
    output = stage.forward(x, received=False)
    stage.before_step()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    stage.backward([torch.ones_like(output)])
    assert_same(list(grads_of(network).values()), list(grads_of(reference).values()))


# ---- what cannot be cut


class Skips(nn.Module):
    """Uses a value of the first block after the third."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.last = nn.Linear(4, 4)
        self.mode = "skip"

    def forward(self, x: Tensor) -> Any:
        kept = x
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == 0:
                kept = x if self.mode == "output" else x.tanh()
            if self.mode == "values" and index == 1 and bool((x > 100).any()):
                return x
            if self.mode == "list" and index == 1 and max(x[0].tolist()) > 100:
                return x
        if self.mode == "late":
            return self.last(x), kept
        if self.mode == "inside":
            return self.last(x) * self.blocks[0].weight.sum()
        if self.mode == "again":
            return self.last(self.blocks[0](x))
        if self.mode == "output":
            return self.last(x) * kept, kept
        return self.last(x + kept if self.mode == "skip" else x)


REASONS = {
    "inside": (
        {"blocks.1", "blocks.2", "blocks.3", "last"},
        "the parameter 'blocks.0.weight' is used on both sides, and its output needs that later",
    ),
    "again": (
        {"blocks.1", "blocks.2", "blocks.3"},
        "a Linear is called with what an output of 'blocks.3' has a part in, which is in a later stage",
    ),
}
MESSAGES = {
    "skip": r"in .*'last'.* shape \(2, 4\) comes from an output of 'blocks.0', .* no argument of 'blocks.2'",
    "late": r"in its output, a tensor of shape \(2, 4\) comes from an output of 'blocks.0'",
    "values": r"goes on by the values of an output of 'blocks.1' .* not in the stage of 'blocks.2'",
    "list": r"goes on by the values of an output of 'blocks.1' \(tolist\)",
    "inside": r"in its output, .* comes from the parameter 'blocks.0.weight'",
    "again": r"another way in the stage of 'blocks.2' .* at the call of 'blocks.0'",
}


@pytest.mark.parametrize("mode", REASONS)
def test_what_cannot_be_cut_off_is_found_and_named(mode: str) -> None:
    network = made(Skips)
    network.mode = mode
    x = torch.randn(2, 4, dtype=torch.float64)
    chain = ReplayedChain(network, "", ((x,), {}))
    names, reason = REASONS[mode]
    found = analyse(network, forward_of(network), ((x,), {}))
    assert {found.layers[position][1] for position in found.forbidden} == names
    assert names.isdisjoint(chain.names)
    assert set(found.forbidden.values()) == {reason}


def test_a_network_that_cannot_be_cut_says_why() -> None:
    network = made(lambda: Wanders([0, 1, 0]))
    chain = ReplayedChain(network, "", ((torch.randn(2, 4, dtype=torch.float64),), {}))
    message = r"has 1 layer and .* one \(elsewhere it cannot be cut: a Linear is called with what .*\): train it in one"
    with pytest.raises(ValueError, match=message):
        decide_cut(chain, 2, None, None, lambda: Costs([1.0], "parameters"))


@pytest.mark.parametrize("mode", MESSAGES)
def test_without_an_example_what_cannot_be_is_said_when_it_is_met(mode: str) -> None:
    network = made(Skips)
    network.mode = mode
    x = torch.randn(2, 4, dtype=torch.float64)
    blind = ReplayedChain(network, "")
    value = blind.segment(0, 2)(x)
    with pytest.raises(RuntimeError, match=MESSAGES[mode]) as caught:
        blind.segment(2, 5)(value)
    assert "split_points" in str(caught.value)
    assert "configure_stages()" in str(caught.value)


@pytest.mark.parametrize("mode", ["skip", "late", "values", "list"])
def test_what_the_code_computes_or_decides_is_known_in_later_stages(mode: str) -> None:
    network = made(Skips)
    network.mode = mode
    call = (torch.randn(2, 4, dtype=torch.float64),), {}
    chain = ReplayedChain(network, "", call)
    theirs = copy.deepcopy(network)
    assert len(cuts_of(chain, 2)) == 4
    for num_stages in (2, 3, 4):
        for cut in cuts_of(chain, num_stages):
            assert_same_step(chain, cut, call, network, theirs)


def test_an_output_of_a_layer_may_skip_over_stages() -> None:
    network = made(Skips)
    network.mode = "output"
    x = torch.randn(2, 4, dtype=torch.float64)
    chain = ReplayedChain(network, "", ((x,), {}))
    assert not analyse(network, forward_of(network), ((x,), {})).forbidden
    assert_same_step(chain, [1, 2, 3, 4], ((x,), {}), network, copy.deepcopy(network))
    assert_same_step(chain, [2, 3], ((x,), {}), network, copy.deepcopy(network))
    # Where it is an argument, it crosses once.
    sizes = [len(tensors_of(chain.segment(0, stop)(x))) for stop in (1, 2)]
    assert sizes == [1, 2]


class Twists(nn.Module):
    """Does with its input what a tensor that is followed does not bear; ``fail`` makes it fail at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is not Tensor or self.fail:
            raise TypeError("not my kind of tensor")
        for layer in self.layers:
            x = layer(x)
        return x


def test_an_input_that_cannot_be_followed_is_always_sent() -> None:
    network = made(Twists)
    x = torch.randn(2, 4, dtype=torch.float64)
    chain = ReplayedChain(network, "net", ((x,), {}))
    assert_same_step(chain, [1, 2], ((x,), {}), network, copy.deepcopy(network))
    network.fail = True
    with pytest.raises(RuntimeError, match=r"Twists failed .*TypeError: not my kind of tensor.*configure_stages"):
        ReplayedChain(network, "net", ((x,), {}))


class Wanders(nn.Module):
    """Calls its layers as an attribute says."""

    def __init__(self, order: Sequence[int] = (0, 1, 2)) -> None:
        super().__init__()
        self.order = list(order)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = self.layers[index](x)
        return x


def test_the_order_is_that_of_the_calls() -> None:
    network = made(lambda: Wanders([2, 0, 1]))
    x = torch.randn(2, 4, dtype=torch.float64)
    chain = ReplayedChain(network, "net", ((x,), {}))
    assert chain.names == ["net.layers.2", "net.layers.0", "net.layers.1"]
    assert_same_step(chain, [1, 2], ((x,), {}), network, copy.deepcopy(network))


def test_stages_that_take_different_ways_are_refused() -> None:
    network = made(Wanders)
    x = torch.randn(2, 4, dtype=torch.float64)
    chain = ReplayedChain(network, "net", ((x,), {}))
    value = chain.segment(0, 2)(x)
    network.order = [1, 0, 2]
    with pytest.raises(RuntimeError, match=r"another way in the stage of 'layers.2' .* 'layers.1'.*split_points"):
        chain.segment(2, 3)(value)


@pytest.mark.parametrize("order", [[0], [0, 2], [0, 1, 2, 1]])
def test_calls_that_were_not_seen_are_made_where_the_layer_is(order: list[int]) -> None:
    network = made(Wanders)
    call = (torch.randn(2, 4, dtype=torch.float64),), {}
    chain = ReplayedChain(network, "net", call)
    network.order = order
    assert_same_step(chain, [1], call, network, copy.deepcopy(network))


def test_layers_that_are_not_called_belong_to_the_last_stage() -> None:
    network = made(lambda: Wanders([0, 2]))
    chain = ReplayedChain(network, "net", ((torch.randn(2, 4, dtype=torch.float64),), {}))
    assert chain.names == ["net.layers.0", "net.layers.2"]
    assert "net.layers.1.weight" in chain.segment(1, 2).state_dict()


def test_a_network_that_calls_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Wanders calls no module with parameters.*configure_stages"):
        ReplayedChain(made(lambda: Wanders([])), "net", ((torch.randn(2, 4),), {}))


class Writes(Wanders):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


def test_an_argument_changed_in_place_is_refused() -> None:
    network = made(Writes)
    segment = ReplayedChain(network, "net").segment(0, 2)
    with pytest.raises(RuntimeError, match="Writes changes one of its arguments in place, .* on a copy"):
        segment(torch.randn(2, 4, dtype=torch.float64))


class Unsqueezes(Wanders):
    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        x.unsqueeze_(0)
        return self.layers[1](x)  # type: ignore[no-any-return]


def test_a_shape_changed_in_place_is_refused() -> None:
    network = made(Unsqueezes)
    chain = ReplayedChain(network, "net")
    value = chain.segment(0, 1)(torch.randn(2, 4, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"unsqueeze_.* changes the shape of an output of 'layers.0' in place"):
        chain.segment(1, 3)(value)


@pytest.mark.parametrize("name", ["use_cache", "output_hidden_states", "output_attentions"])
def test_what_hugging_face_collects_from_all_layers_is_refused(name: str) -> None:
    network = made(gpt2)
    call = language(2, 5)
    segment = ReplayedChain(network, "net", call).segment(0, 2)
    with pytest.raises(ValueError, match=rf"{name}=True asks GPT2LMHeadModel .* set {name}=False"):
        segment(**call[1], **{name: True})


def test_a_config_that_collects_from_all_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="output_hidden_states=True"):
        ReplayedChain(made(lambda: gpt2(output_hidden_states=True)), "net", language(2, 5))
    network = made(gpt2)
    ReplayedChain(network, "net", language(2, 5)).segment(0, 2)(**language(2, 5)[1])
    assert network.config.use_cache is True


# ---- modes, attributes, threads, copies


class Three(nn.Module):
    """Three layers; subclasses say how they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.c(self.b(self.a(x)))


def rows(count: int = 3) -> Call:
    return (torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(count)),), {}


class Watched(Three):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = 1.0
        self.inner = nn.ModuleDict({"drop": Dropping()})

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.a(x), 0.5, training=self.training)
        return self.inner["drop"](self.b(x)) / self.temperature  # type: ignore[no-any-return]


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.layer(x), 0.5, training=self.training)


def test_functional_dropout_and_attributes_follow_what_is_set_later() -> None:
    ours = made(Watched)
    theirs = copy.deepcopy(ours)
    chain = ReplayedChain(ours, "net", rows())
    for inner, outer, temperature in ((True, True, 1.0), (False, True, 2.0), (False, False, 3.5), (True, False, 1.0)):
        for network in (ours, theirs):
            network.train(outer)
            network.inner.train(inner)  # type: ignore[union-attr]
            network.temperature = temperature
        assert_same_step(chain, [1, 2], rows(), ours, theirs)


class Auxiliary(Three):
    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        return (self.c(x), self.b(x)) if self.training else self.c(x)


def test_a_layer_of_only_one_mode() -> None:
    ours = made(Auxiliary)
    theirs = copy.deepcopy(ours)
    chain = ReplayedChain(ours, "", rows())
    for network in (ours.train(), ours.eval()):
        theirs.train(network.training)
        for num_stages in (2, 3):
            for cut in cuts_of(chain, num_stages):
                assert_same_step(chain, cut, rows(), network, theirs)


class Interrupted(Three):
    """Another thread computes while the forward runs, as messages arrive in a thread of their own."""

    other = nn.Linear(4, 4)
    made: list[Tensor] = []

    def arrive(self) -> None:
        with torch.inference_mode():
            self.made.append(self.other(torch.empty(2, 4).copy_(torch.zeros(4))))

    def forward(self, x: Tensor) -> Any:
        with ThreadPoolExecutor(1) as threads:
            threads.submit(self.arrive).result()
        return self.c(self.b(self.a(x)) + torch.ones(4, dtype=x.dtype))


def test_other_threads_find_torch_as_it_is() -> None:
    network = made(Interrupted)
    chain = ReplayedChain(network, "", rows())
    assert_same_step(chain, [1, 2], rows(), network, copy.deepcopy(network))
    assert len(Interrupted.made) >= 4
    assert all(type(tensor) is Tensor for tensor in Interrupted.made)


class Fails(Three):
    def forward(self, x: Tensor) -> Any:
        if x.shape[0] == 1:
            raise ValueError("one row")
        with torch.no_grad():
            x = self.a(x)
        return self.c(self.b(x))


def test_an_error_leaves_gradients_on_and_is_the_users_own() -> None:
    network = made(Fails)
    chain = ReplayedChain(network, "", rows())
    assert_same_step(chain, [1, 2], rows(), network, copy.deepcopy(network))
    with pytest.raises(ValueError, match="one row"):
        run_parts(chain, [1], rows(1))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run_parts(chain, [1], ((torch.randn(3, 5, dtype=torch.float64),), {}))
    assert torch.is_grad_enabled()


def test_a_copied_segment_runs_its_own_weights() -> None:
    network = made(Three)
    segment = ReplayedChain(network, "net", rows()).segment(0, 2)
    copied = copy.deepcopy(segment).to("meta")
    assert {parameter.device.type for parameter in copied.parameters()} == {"meta"}
    assert {parameter.device.type for parameter in network.parameters()} == {"cpu"}
    (value,) = copied(torch.zeros(2, 4, dtype=torch.float64, device="meta")).values.values()
    assert value.device.type == "meta"


class DrawsForAll(nn.Module):
    """Numbers that the code draws are given to a layer as they are, and used again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.table, self.last = nn.Linear(4, 4), nn.Embedding(3, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        chosen = torch.randint(0, 3, (len(x),))
        h = self.first(x) + self.table(chosen)
        return self.last(h) * (chosen + 1).unsqueeze(1) * (scale or 1)  # type: ignore[no-any-return]


def test_what_is_drawn_for_several_stages_is_drawn_once() -> None:
    network, x = DrawsForAll(), torch.randn(5, 4)
    chain = ReplayedChain(network, "net", ((x,), {}))
    assert chain.names == ["net.first", "net.table", "net.last"]
    segments = [chain.segment(position, position + 1) for position in range(3)]
    batch = Batch(0, seed=3)
    value: tuple[Any, ...] = (x,)
    for stage, segment in enumerate(segments, start=1):
        with batch.draws(stage):
            value = (segment(*value),)
    assert torch.equal(value[0], chain.at_once(segments, batch, (x,), {}))
    with pytest.raises(RuntimeError, match="called in another form than in the first batch, and draws random numbers"):
        segments[0](x, 2.0)
