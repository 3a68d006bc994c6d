"""Tests of ``network/replay``: a network cut without tracing is the uncut network, for every family tried.

A network that must be cut is one more entry of ``FAMILIES`` and one more row of ``docs/networks.md``.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn

from lightning_ddg.core.stage import Stage
from lightning_ddg.network.replay.chain import ReplayedChain
from lightning_ddg.plugin.redirection import Redirection
from tests.network.uncut import (
    Call,
    assert_same,
    assert_same_step,
    cuts_of,
    doubled,
    grads_of,
    loss_of,
    made,
    run_parts,
    segments_of,
    sent,
    without_fast_path,
)

BEFORE_5_23 = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)

transformers.logging.set_verbosity_error()


class Family(NamedTuple):
    """How to make a network, and a call of it for a batch size and a length."""

    make: Callable[[], nn.Module]
    call: Callable[[int, int], Call]
    cuts: int


# ---- networks written by hand


class Block(nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(dim, 2, dropout=0.1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim), nn.Dropout(0.1))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor | None, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        attended, _ = self.attend(x, x, x, key_padding_mask=mask, need_weights=False)
        return self.norm(x + attended + self.mlp(x) * state["gate"]), {"gate": state["gate"] + x.mean()}


class Handmade(nn.Module):
    """Branches on shapes and values, loops over lists, passes a dict on, and owns parameters outside its layers."""

    def __init__(self, tie: bool = False) -> None:
        super().__init__()
        self.max = 12
        self.embed = nn.Embedding(20, 8)
        self.position = nn.Parameter(torch.randn(12, 8))
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.drops = nn.ModuleList(nn.Dropout(0.1) for _ in range(4))
        self.register_buffer("scales", torch.tensor([1.0, 0.5, 2.0, 1.5]))
        self.gain = nn.Parameter(torch.randn(8))
        self.head = nn.Linear(8, 20)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, *, pad: int | None = None, labels: Tensor | None = None) -> dict[str, Tensor]:
        if ids.shape[1] > self.max:
            raise ValueError(f"{ids.shape[1]} tokens are more than {self.max}")
        mask = ids == pad if pad is not None and bool((ids == pad).any()) else None
        x = self.embed(ids) + self.position[: ids.shape[1]]
        state = {"gate": torch.ones_like(x[..., :1])}
        for block, drop, scale in zip(self.blocks, self.drops, self.scales, strict=True):
            x, state = block(drop(x) * scale, mask, state)
        logits = self.head(x * self.gain)
        output = {"logits": logits}
        if labels is not None:
            output["loss"] = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return output


class Translator(nn.Module):
    """``nn.Transformer`` with masks, which decides by itself whether it needs them."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(20, 8), nn.Embedding(20, 8)
        self.transformer = nn.Transformer(8, 2, 2, 3, 16, batch_first=True)
        self.head = nn.Linear(8, 20)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        pad = source == 0
        causal = self.transformer.generate_square_subsequent_mask(target.shape[1], dtype=self.head.weight.dtype)
        x = self.transformer(
            self.source(source),
            self.target(target),
            tgt_mask=causal,
            src_key_padding_mask=pad if bool(pad.any()) else None,
            memory_key_padding_mask=pad if bool(pad.any()) else None,
        )
        return self.head(x)  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """``nn.TransformerEncoder``, with a fast path for padded batches in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 4)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        pad = ids == 0
        x = self.encoder(self.embed(ids), src_key_padding_mask=pad if bool(pad.any()) else None)
        return self.head(x.masked_fill(pad[..., None], 0).mean(1))  # type: ignore[no-any-return]


def batch_of_ids(batch: int, length: int, pad: int = 0) -> Tensor:
    ids = torch.randint(1, 20, (batch, length), generator=torch.Generator().manual_seed(batch * length))
    ids[0, -2:] = pad
    return ids


def with_mask(batch: int, length: int) -> dict[str, Tensor]:
    ids = batch_of_ids(batch, length)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def language(batch: int, length: int) -> Call:
    inputs = with_mask(batch, length)
    return (), {**inputs, "labels": inputs["input_ids"]}


def labelled(batch: int, length: int) -> Call:
    return (), {**with_mask(batch, length), "labels": torch.arange(batch) % 2}


def images(batch: int, length: int) -> Call:
    pixels = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch + length))
    return (), {"pixel_values": pixels, "labels": torch.arange(batch) % 2}


SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
}


def gpt2(**more: Any) -> nn.Module:
    sizes = {"n_layer": 4, "n_embd": 16, "n_head": 2, "vocab_size": 20, "n_positions": 32}
    config = transformers.GPT2Config(
        **{**sizes, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False} | more
    )
    return transformers.GPT2LMHeadModel(config)


def hugging_face(name: str, kind: str, **more: Any) -> Callable[[], nn.Module]:
    config = getattr(transformers, f"{name}Config")
    model = getattr(transformers, f"{name}{kind}")
    return lambda: model(config(**more))


BART = {
    "dropout": 0.0,
    "d_model": 16,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
SMALL = {name: SIZES[name] for name in ("vocab_size", "pad_token_id", "tie_word_embeddings")}
SPECIAL = {name: SIZES[name] for name in ("bos_token_id", "eos_token_id")}
FAMILIES: dict[str, Family] = {
    "handmade": Family(Handmade, lambda n, t: ((batch_of_ids(n, t),), {"pad": 0, "labels": batch_of_ids(n, t)}), 17),
    "nn.Transformer": Family(Translator, lambda n, t: ((batch_of_ids(n, t), batch_of_ids(n, t - 1)), {}), 35),
    "nn.TransformerEncoder": Family(Encoder, lambda n, t: ((batch_of_ids(n, t),), {}), 21),
    "GPT-2": Family(gpt2, language, 27),
    "BERT classifier": Family(hugging_face("Bert", "ForSequenceClassification", **SIZES), labelled, 37),
    "BERT": Family(hugging_face("Bert", "Model", **SIZES), lambda n, t: ((), with_mask(n, t)), 36),
    "RoBERTa classifier": Family(hugging_face("Roberta", "ForSequenceClassification", **SIZES), labelled, 37),
    "DistilBERT classifier": Family(
        hugging_face(
            "DistilBert", "ForSequenceClassification", dim=16, n_layers=4, n_heads=2, hidden_dim=32, vocab_size=20
        ),
        labelled,
        36,
    ),
    "Llama": Family(hugging_face("Llama", "ForCausalLM", **SIZES, num_key_value_heads=1), language, 38),
    "Qwen3": Family(hugging_face("Qwen3", "ForCausalLM", **SIZES, num_key_value_heads=1, head_dim=8), language, 46),
    "GPT-NeoX": Family(hugging_face("GPTNeoX", "ForCausalLM", **SIZES), language, 26),
    "OPT": Family(
        hugging_face("OPT", "ForCausalLM", **{**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.1}),
        language,
        35,
    ),
    "T5 encoder": Family(
        hugging_face("T5", "EncoderModel", vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=4, num_heads=2),
        lambda n, t: ((), with_mask(n, t)),
        34,
    ),
    "BART": Family(
        hugging_face("Bart", "ForConditionalGeneration", **BART, **SMALL, **SPECIAL, max_position_embeddings=32),
        language,
        69,
    ),
    "ViT": Family(hugging_face("ViT", "ForImageClassification", **VISION, image_size=32, patch_size=8), images, 34),
    "Swin": Family(
        hugging_face(
            "Swin",
            "ForImageClassification",
            image_size=32,
            patch_size=4,
            embed_dim=8,
            depths=[2, 2],
            num_heads=[2, 2],
            window_size=4,
        ),
        images,
        41,
    ),
    "ConvNeXt": Family(
        hugging_face("ConvNext", "ForImageClassification", hidden_sizes=[8, 16], depths=[2, 2], num_stages=2),
        images,
        21,
    ),
    "ResNet": Family(
        hugging_face(
            "ResNet",
            "ForImageClassification",
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[2, 2],
            layer_type="basic",
        ),
        images,
        20,
    ),
}


# ---- equal to the uncut network


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cut_network_is_the_uncut_network(name: str) -> None:
    if name == "OPT" and BEFORE_5_23:
        pytest.skip("this version draws a random number for each layer, even where none is dropped")
    family = FAMILIES[name]
    ours = made(family.make)
    theirs = copy.deepcopy(ours)
    if hasattr(theirs, "config"):
        # Caches of keys and values are not filled.
        theirs.config.use_cache = False
    names = list(ours.state_dict())
    call = doubled(family.call(3, 6))
    chain = ReplayedChain(ours, "net", call)
    assert len(cuts_of(chain, 2)) == family.cuts
    for num_stages in (2, 3, 4):
        some = cuts_of(chain, num_stages)
        for cut in some[:: max(1, len(some) // 6)]:
            assert_same_step(chain, cut, call, ours, theirs)
    everywhere = [position for (position,) in cuts_of(chain, 2)]
    for batch, length in ((3, 6), (2, 9)):
        assert_same_step(chain, everywhere, doubled(family.call(batch, length)), ours, theirs)
    ours.eval()
    theirs.eval()
    with torch.no_grad():
        args, kwargs = doubled(family.call(2, 7))
        with without_fast_path():
            expected = theirs(*args, **kwargs)
        assert_same(run_parts(chain, everywhere, (args, kwargs)), expected)
    held = [key for segment in segments_of(chain, everywhere) for key in segment.state_dict()]
    parts = segments_of(chain, everywhere)
    assert {id(p) for part in parts for p in part.parameters()} == {id(p) for p in ours.parameters()}
    assert len(held) == len(set(held))
    assert set(held) <= {f"net.{key}" for key in names}
    assert list(ours.state_dict()) == names


@pytest.mark.parametrize("name", ["handmade", "nn.Transformer", "GPT-2", "BERT classifier", "BART"])
def test_delayed_stages_give_the_gradients_of_their_forward(name: str) -> None:
    family = FAMILIES[name]
    network = made(family.make)
    # Random draws are seeded for each stage, so that there is nothing to compare them with.
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    calls = [doubled(family.call(2, length)) for length in (6, 5, 7, 6, 8)]
    chain = ReplayedChain(network, "net", calls[0])
    cut = cuts_of(chain, 3)[len(cuts_of(chain, 3)) // 2]
    stages = [Stage(segment, 2 - index) for index, segment in enumerate(segments_of(chain, cut))]
    snapshots: list[nn.Module] = []
    losses: list[Tensor] = []
    inboxes: list[deque[Any]] = [deque(), deque(), deque()]
    compared = 0
    for step in range(len(calls) + 2):
        if step < len(calls):
            snapshots.append(copy.deepcopy(network))
            value = stages[0].forward(*calls[step][0], received=False, **calls[step][1])
            for stage in stages[1:]:
                value = stage.forward(sent(value), received=True)
            losses.append(loss_of(value))
        for index, stage in enumerate(stages):
            batch = step - stage.delay
            if not 0 <= batch < len(calls):
                continue
            network.zero_grad()
            if stage.delay == 0:
                losses[batch].backward()
                inboxes[index - 1].append(stage.backward_done())
            elif index:
                inboxes[index - 1].append(stage.backward(inboxes[index].popleft()))
            else:
                stage.backward(inboxes[index].popleft())
            reference = snapshots[batch]
            reference.zero_grad()
            loss_of(reference(*calls[batch][0], **calls[batch][1])).backward()
            expected = {f"net.{name}": grad for name, grad in grads_of(reference).items()}
            for name, grad in grads_of(stage.module).items():
                assert (grad is None) == (expected[name] is None)
                if grad is not None:
                    assert_same(grad, expected[name])
                    compared += 1
        for stage in stages:
            stage.before_step()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
    assert compared == len(calls) * sum(grad is not None for grad in grads_of(snapshots[0]).values())


def test_it_runs_inside_a_redirection_and_in_mixed_precision() -> None:
    network = made(Handmade).float()
    call = FAMILIES["handmade"].call(2, 6)
    chain = ReplayedChain(network, "net", call)
    redirection = Redirection(network)
    network.eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        with redirection.handled_by(lambda args, kwargs: run_parts(chain, [2, 4], (args, kwargs))):
            ours = network(*call[0], **call[1])
        with without_fast_path():
            assert_same(ours, network(*call[0], **call[1]))
    redirection.remove()


@pytest.mark.parametrize("name", ["handmade", "GPT-2", "ViT", "nn.TransformerEncoder"])
def test_evaluation_in_inference_mode(name: str) -> None:
    network = made(FAMILIES[name].make).eval()
    call = doubled(FAMILIES[name].call(2, 6))
    chain = ReplayedChain(network, "net", call)
    if hasattr(network, "config"):
        network.config.use_cache = False
    with torch.inference_mode(), without_fast_path():
        assert_same(run_parts(chain, range(1, len(chain)), call), network(*call[0], **call[1]))
