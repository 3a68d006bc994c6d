"""litgpt's GPT in a LightningModule, as its documentation does; it pins other versions: the extra `wild-2`."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from torch import Tensor, nn

from tests.wild.trying import WAYS, Case, Supervised, check, draw_classes, fit, needs, one_batch

pytestmark = needs("litgpt")


def loss(logits: Any, ids: Tensor) -> Tensor:
    from litgpt.utils import chunked_cross_entropy

    return chunked_cross_entropy(logits[..., :-1, :], ids[..., 1:])


def train(name: str, lora: bool, arguments: dict[str, Any]) -> None:
    from litgpt import GPT
    from litgpt import lora as adapted

    sizes: dict[str, Any] = {
        "n_layer": 3,
        "n_embd": 16,
        "n_head": 2,
        "block_size": 16,
        "padded_vocab_size": 40,
        "intermediate_size": 32,
    }
    if name in ("Llama-3.2-1B", "Qwen2.5-0.5B", "Gemma-2-2b"):
        sizes |= {"n_query_groups": 1, "head_size": 8}
    if lora:
        net: nn.Module = adapted.GPT.from_name(name, **sizes, lora_r=2, lora_query=True, lora_value=True)
        adapted.mark_only_lora_as_trainable(net)
    else:
        net = GPT.from_name(name, **sizes)
    ids = draw_classes(4, 12, classes=40)
    fit(arguments, Supervised(net, loss), one_batch(ids, ids))


NETWORKS = ("pythia-14m", "Llama-3.2-1B", "Qwen2.5-0.5B", "Gemma-2-2b", "phi-2")
CASES = {name: Case(partial(train, name, False)) for name in NETWORKS}
CASES["pythia-14m, LoRA"] = Case(partial(train, "pythia-14m", True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_litgpt(request: pytest.FixtureRequest, name: str, way: str) -> None:
    check(request, name, way)
