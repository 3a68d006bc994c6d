"""Fine-tuning by peft: adapters in a network of transformers, whose own weights are frozen."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from tests.wild.trying import WAYS, Case, check, draw_classes, fit, needs, one_batch

pytestmark = needs("peft", "transformers")


class FineTuned(pl.LightningModule):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([weight for weight in self.parameters() if weight.requires_grad], lr=0.1)


def train(kind: str, how: dict[str, Any], network: str, arguments: dict[str, Any]) -> None:
    import peft
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    if network == "llama":
        net: Any = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=False))
        task = "CAUSAL_LM"
    else:
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        net = BertForSequenceClassification(BertConfig(**sizes, **still))
        task = "SEQ_CLS"
    model = peft.get_peft_model(net, getattr(peft, kind)(task_type=task, **how))
    ids = draw_classes(4, 9, classes=40)
    labels = ids if network == "llama" else ids[:, 0] % 2
    fit(arguments, FineTuned(model), one_batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels))


LORA = {"r": 2, "lora_dropout": 0.0, "init_lora_weights": "gaussian"}
CASES = {
    "LoRA, Llama": Case(partial(train, "LoraConfig", {**LORA, "target_modules": ["q_proj", "v_proj"]}, "llama")),
    "LoRA, Llama, all linear": Case(partial(train, "LoraConfig", {**LORA, "target_modules": "all-linear"}, "llama")),
    "LoRA, BERT": Case(partial(train, "LoraConfig", LORA, "bert")),
    "DoRA, Llama": Case(
        partial(train, "LoraConfig", {**LORA, "use_dora": True, "target_modules": ["q_proj", "v_proj"]}, "llama")
    ),
    "IA3, Llama": Case(partial(train, "IA3Config", {}, "llama")),
    "prefix tuning, Llama": Case(partial(train, "PrefixTuningConfig", {"num_virtual_tokens": 4}, "llama")),
    "prompt tuning, Llama": Case(partial(train, "PromptTuningConfig", {"num_virtual_tokens": 4}, "llama")),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_peft(request: pytest.FixtureRequest, name: str, way: str) -> None:
    check(request, name, way)
