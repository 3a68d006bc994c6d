"""Tests of the GPT live here: what it computes, which weights decay, its learning rate, its YAML file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.nn import functional

from lightning_ddg import DDGStrategy
from recipes.gpt import FLOOR, GPT, LanguageModel, warmup_then_cosine
from recipes.text import TextData


def tiny(**changes: float) -> GPT:
    return GPT(**{"vocabulary": 11, "n_layers": 2, "width": 8, "heads": 2, "context": 6, "dropout": 0.0, **changes})


def test_tokens_become_logits_of_the_next_token() -> None:
    network = tiny()
    tokens = torch.randint(11, (3, 6))
    assert network(tokens).shape == (3, 6, 11)
    assert network(tokens[:, :2]).shape == (3, 2, 11)


def test_size_is_that_of_its_layers() -> None:
    width, layers, vocabulary, context = 8, 2, 11, 6
    attention = (width + 1) * 3 * width + (width + 1) * width
    mlp = (width + 1) * 4 * width + (4 * width + 1) * width
    block = attention + mlp + 2 * 2 * width
    expected = 2 * vocabulary * width + context * width + layers * block + 2 * width
    assert sum(parameter.numel() for parameter in tiny().parameters()) == expected


def test_no_position_sees_a_later_one() -> None:
    network = tiny().double()
    tokens = torch.randint(11, (1, 6))
    changed = tokens.clone()
    changed[0, 4] = (tokens[0, 4] + 1) % 11
    difference = (network(tokens) - network(changed)).abs().amax(-1)[0]
    assert (difference[:4] == 0).all()
    assert (difference[4:] > 0).all()


def test_equal_tokens_at_other_positions_differ() -> None:
    logits = tiny()(torch.zeros(1, 6, dtype=torch.int64))[0]
    assert not torch.allclose(logits[0], logits[1])


def test_dropout_follows_train_and_eval() -> None:
    network = tiny(dropout=0.5)
    tokens = torch.randint(11, (2, 6))
    assert not torch.equal(network(tokens), network(tokens))
    network.eval()
    assert torch.equal(network(tokens), network(tokens))


def test_a_text_beyond_the_context_is_refused() -> None:
    with pytest.raises(AssertionError, match="a text of 7 tokens is longer than context=6: give a longer context"):
        tiny()(torch.zeros(1, 7, dtype=torch.int64))


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="width=8 is no multiple of heads=3"):
        tiny(heads=3)


def test_learning_rate_rises_then_falls_to_its_floor() -> None:
    factors = [warmup_then_cosine(step, 10, 110) for step in range(120)]
    assert factors[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert factors[10] == 1
    assert factors[60] == pytest.approx((1 + FLOOR) / 2)
    assert all(later < earlier for earlier, later in zip(factors[10:110], factors[11:111], strict=True))
    assert factors[110:] == pytest.approx([FLOOR] * 10)
    assert warmup_then_cosine(0, 0, 1) == 1


def test_untrained_loss_is_that_of_guessing() -> None:
    module = LanguageModel(tiny())
    tokens = torch.randint(11, (4, 6))
    assert module.loss((tokens, tokens.roll(1, 1))).item() == pytest.approx(math.log(11), rel=0.02)
    logits = module(tokens)
    expected = functional.cross_entropy(logits.view(-1, 11), tokens.view(-1))
    assert torch.equal(module.loss((tokens, tokens)), expected)


def test_yaml_builds_the_whole_project(build: Callable[..., LightningCLI]) -> None:
    cli = build("gpt.yaml")
    assert isinstance(cli.model, LanguageModel)
    network = cli.model.network
    assert isinstance(network, GPT)
    assert len(network.blocks) == 12
    assert isinstance(cli.datamodule, TextData)
    assert cli.datamodule.context == network.context == 256
    assert isinstance(cli.trainer.strategy, DDGStrategy)
    assert cli.trainer.max_steps == 5000
    assert cli.trainer.checkpoint_callback.monitor == "val_loss"


def test_yaml_trains_on_a_text(build: Callable[..., LightningCLI], text_file: Path) -> None:
    run = ["--trainer.strategy", "auto", "--trainer.devices", "1", "--trainer.accelerator", "cpu"]
    run += ["--trainer.max_steps", "112", "--trainer.enable_progress_bar", "false"]
    data = ["--data.path", str(text_file), "--data.context", "16", "--data.batch_size", "8"]
    network = ["--model.network.n_layers", "2", "--model.network.width", "32", "--model.network.heads", "2"]
    network += ["--model.network.context", "16", "--model.warmup_steps", "5", "--model.lr", "0.01"]
    cli = build("gpt.yaml", *run, *data, *network)
    cli.trainer.fit(cli.model, cli.datamodule)

    metrics = cli.trainer.callback_metrics
    assert metrics["val_perplexity"].item() == pytest.approx(math.exp(metrics["val_loss"].item()), rel=1e-5)
    # Every character follows from the one before; a guess among ten letters would have perplexity 10.
    assert metrics["val_perplexity"] < 5
    assert {"train_loss_step", "train_loss_epoch"} <= metrics.keys()

    (optimizer,) = cli.trainer.optimizers
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {parameter: name for name, parameter in cli.model.named_parameters()}
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    linear = {f"{name}.weight" for name, module in cli.model.named_modules() if isinstance(module, nn.Linear)}
    assert {names[parameter] for parameter in decayed["params"]} == linear
    assert {"network.position", "network.token.weight"} <= {names[parameter] for parameter in others["params"]}
    # An epoch has 112 pieces in 14 batches, so eight epochs have gone by; the schedule counts batches.
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * FLOOR)
