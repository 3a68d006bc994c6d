"""Networks of x-transformers, as its examples train them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from tests.wild.trying import WAYS, Case, Supervised, check, classify_images, draw_classes, fit, needs, one_batch

pytestmark = needs("x_transformers")


class Given(pl.LightningModule):
    """The network computes its own loss."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.net(*batch)
        return loss[0] if isinstance(loss, tuple) else loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def generates(how: dict[str, Any], arguments: dict[str, Any]) -> None:
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    net = TransformerWrapper(
        num_tokens=30, max_seq_len=12, attn_layers=Decoder(dim=16, depth=3, heads=2, attn_dim_head=8, **how)
    )
    fit(arguments, Given(AutoregressiveWrapper(net)), one_batch(draw_classes(4, 12, classes=30)))


def encodes(arguments: dict[str, Any]) -> None:
    from x_transformers import Encoder, TransformerWrapper

    net = TransformerWrapper(
        num_tokens=30, max_seq_len=12, attn_layers=Encoder(dim=16, depth=3, heads=2, attn_dim_head=8)
    )
    fit(arguments, Supervised(net, tokens), one_batch(draw_classes(4, 12, classes=30), draw_classes(4, 12, classes=30)))


def tokens(logits: Tensor, wanted: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.transpose(1, 2), wanted)


def sees(arguments: dict[str, Any]) -> None:
    from x_transformers import Encoder, ViTransformerWrapper

    layers = Encoder(dim=16, depth=3, heads=2, attn_dim_head=8)
    classify_images(arguments, ViTransformerWrapper(image_size=32, patch_size=8, num_classes=3, attn_layers=layers))


def translates(arguments: dict[str, Any]) -> None:
    from x_transformers import XTransformer

    half = {"num_tokens": 30, "depth": 2, "heads": 2, "max_seq_len": 12, "attn_dim_head": 8}
    sizes = {f"{part}_{name}": size for part in ("enc", "dec") for name, size in half.items()}
    net = XTransformer(dim=16, tie_token_emb=False, **sizes)
    fit(arguments, Given(net), one_batch(draw_classes(4, 12, classes=30), draw_classes(4, 12, classes=30)))


def continuous(arguments: dict[str, Any]) -> None:
    from x_transformers import ContinuousTransformerWrapper, Encoder

    layers = Encoder(dim=16, depth=3, heads=2, attn_dim_head=8)
    net = ContinuousTransformerWrapper(dim_in=4, dim_out=2, max_seq_len=12, attn_layers=layers)
    fit(arguments, Supervised(net, nn.functional.mse_loss), one_batch(torch.randn(4, 12, 4), torch.randn(4, 12, 2)))


WITH: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotary": {"rotary_pos_emb": True, "use_rmsnorm": True, "ff_glu": True},
    "memory": {"attn_num_mem_kv": 2, "attn_qk_norm": True},
    "relative": {"rel_pos_bias": True},
    "shifted, sandwich": {"shift_tokens": 1, "sandwich_norm": True},
    "residual attention": {"residual_attn": True},
}
CASES: dict[str, Case] = {f"decoder, {name}": Case(partial(generates, how)) for name, how in WITH.items()}
OTHERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "encoder": encodes, "images": sees, "encoder and decoder": translates, "continuous": continuous
}  # fmt: skip
CASES.update({name: Case(how) for name, how in OTHERS.items()})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_x_transformers(request: pytest.FixtureRequest, name: str, way: str) -> None:
    check(request, name, way)
