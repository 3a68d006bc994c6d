"""The networks of pytorch-forecasting, made from a data set as its tutorials do."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.networks import quiet_trainer
from tests.wild.trying import WAYS, Case, check, needs

pytestmark = needs("pytorch_forecasting")


def series(covariates: bool, lengths: dict[str, int]) -> Any:
    import numpy as np
    import pandas as pd
    from pytorch_forecasting import TimeSeriesDataSet

    count = 40
    frame = pd.DataFrame(
        {
            "time": np.tile(np.arange(count), 2),
            "group": np.repeat(["a", "b"], count),
            "value": np.concatenate([np.sin(np.arange(count) / (3 + index)) + 2 for index in range(2)]),
            "day": np.tile(np.arange(count) % 7, 2).astype(str),
        }
    )
    known: dict[str, Any] = {}
    if covariates:
        known = {
            "static_categoricals": ["group"],
            "time_varying_known_categoricals": ["day"],
            "time_varying_known_reals": ["time"],
        }
    return TimeSeriesDataSet(
        frame,
        time_idx="time",
        target="value",
        group_ids=["group"],
        time_varying_unknown_reals=["value"],
        **lengths,
        **known,
    )


def train(name: str, covariates: bool, sizes: dict[str, Any], arguments: dict[str, Any]) -> None:
    from pytorch_forecasting import models

    lengths = {
        "min_encoder_length": 12,
        "max_encoder_length": 12,
        "min_prediction_length": 4,
        "max_prediction_length": 4,
    }
    data = series(covariates, lengths)
    module = getattr(models, name).from_dataset(data, learning_rate=0.01, log_interval=-1, optimizer="sgd", **sizes)
    loader = data.to_dataloader(train=True, batch_size=8, num_workers=0, shuffle=False)
    trainer = quiet_trainer(**arguments, limit_train_batches=1, limit_val_batches=1, gradient_clip_val=None)
    trainer.fit(module, loader, data.to_dataloader(train=False, batch_size=8, num_workers=0))


NETWORKS: dict[str, tuple[bool, dict[str, Any]]] = {
    "NBeats": (False, {"num_blocks": [1, 1], "num_block_layers": [2, 2], "widths": [8, 8], "dropout": 0.0}),
    "NHiTS": (False, {"hidden_size": 8, "dropout": 0.0}),
    "TemporalFusionTransformer": (
        True,
        {"hidden_size": 8, "attention_head_size": 2, "hidden_continuous_size": 4, "dropout": 0.0},
    ),
    "RecurrentNetwork": (True, {"hidden_size": 8, "rnn_layers": 2, "dropout": 0.0}),
    "DeepAR": (True, {"hidden_size": 8, "rnn_layers": 2, "dropout": 0.0}),
    "DecoderMLP": (True, {"hidden_size": 8, "n_hidden_layers": 2, "dropout": 0.0}),
    "TiDEModel": (True, {"hidden_size": 8, "dropout": 0.0}),
    "TimeXer": (True, {"hidden_size": 8, "n_heads": 2, "e_layers": 2, "d_ff": 16, "patch_length": 4, "dropout": 0.0}),
}
CASES = {
    # DeepAR draws samples in validation.
    name: Case(partial(train, name, *how), draws=name == "DeepAR", precision="32-true")
    for name, how in NETWORKS.items()
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_pytorch_forecasting(request: pytest.FixtureRequest, name: str, way: str) -> None:
    check(request, name, way)
