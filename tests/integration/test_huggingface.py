"""Hugging Face networks as they are: dictionaries as batches, the loss computed inside, both executions alike."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ddg import DDGStrategy
from tests.harness import run_ranks
from tests.networks import largest_difference, quiet_trainer, state_of

pytest.importorskip("transformers", reason="the extra `dev` brings transformers")


def network(kind: str) -> Any:
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    if kind == "gpt2":
        sizes: dict[str, Any] = {"n_layer": 3, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 16}
        tokens = {"bos_token_id": 0, "eos_token_id": 0}
        return GPT2LMHeadModel(GPT2Config(tie_word_embeddings=False, **sizes, **tokens)).double()
    sizes = {"num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=50, **sizes)).double()


class FineTuned(pl.LightningModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.model = network(kind)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        outputs = self.model(**batch)
        assert outputs.logits.shape[0] == len(batch["labels"])
        self.log("val_loss", outputs.loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def batches(kind: str) -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(1)
    found = []
    for size, length in ((4, 9), (4, 9), (4, 7), (3, 9)):
        ids = torch.randint(1, 50, (size, length), generator=draw)
        mask = torch.ones_like(ids)
        mask[1:, -2:] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids if kind == "gpt2" else ids[:, 0] % 2})
    return DataLoader(found, batch_size=None)  # type: ignore[arg-type]


def fit(kind: str, num_stages: int, devices: int) -> tuple[dict[str, Tensor], float]:
    warnings.simplefilter("ignore")
    pl.seed_everything(2)
    module = FineTuned(kind)
    strategy = DDGStrategy(num_stages=num_stages, balance="parameters")
    trainer = quiet_trainer(devices=devices, strategy=strategy, max_epochs=2)
    trainer.fit(module, batches(kind), batches(kind))
    assert all(strategy.stage_parameter_names)
    return state_of(module), float(trainer.callback_metrics["val_loss"])


def fit_all(num_stages: int, devices: int) -> list[tuple[dict[str, Tensor], float]]:
    return [fit(kind, num_stages, devices) for kind in ("gpt2", "bert")]


@pytest.mark.parametrize("num_stages", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_both_executions_train_the_same_weights(num_stages: int) -> None:
    alone = fit_all(num_stages, 1)
    for ranks in run_ranks(fit_all, num_stages, num_stages, num_stages, timeout=240):
        for (state, loss), (wanted, wanted_loss) in zip(ranks, alone, strict=True):
            assert largest_difference(state, wanted) <= 1e-12
            assert loss == pytest.approx(wanted_loss, rel=1e-12)


def test_its_blocks_are_compiled() -> None:
    compiled, plain = FineTuned("gpt2"), FineTuned("gpt2")
    for module, compile in ((compiled, {"backend": "aot_eager"}), (plain, False)):
        strategy = DDGStrategy(2, balance="parameters", compile=compile)
        # Batches of one shape: each new one compiles all blocks again.
        trainer = quiet_trainer(devices=1, max_epochs=2, strategy=strategy, limit_train_batches=2)
        trainer.fit(module, batches("gpt2"))
    assert largest_difference(state_of(compiled), state_of(plain)) <= 1e-9
    assert all(module._compiled_call_impl is None for module in compiled.modules())
