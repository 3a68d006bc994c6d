"""The estimators of gluonts, which make their Trainer themselves."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.wild.trying import WAYS, Case, check, needs

pytestmark = needs("gluonts", "torch")


def train(name: str, sizes: dict[str, Any], arguments: dict[str, Any]) -> None:
    import gluonts.torch as estimators
    import numpy as np
    import pandas as pd
    from gluonts.dataset.common import ListDataset
    from gluonts.torch.model import i_transformer

    waves = [np.sin(np.arange(80) / (3 + index)) + 0.1 * index for index in range(4)]
    data = ListDataset([{"start": pd.Period("2024-01-01", "D"), "target": wave} for wave in waves], freq="D")
    make = getattr(estimators, name, None) or i_transformer.ITransformerEstimator
    # It saves a checkpoint itself, and loads the best one in the end.
    kept = {key: value for key, value in arguments.items() if key != "enable_checkpointing"}
    make(prediction_length=6, batch_size=4, num_batches_per_epoch=1, trainer_kwargs=kept, **sizes).train(data, data)


NETWORKS: dict[str, dict[str, Any]] = {
    "SimpleFeedForwardEstimator": {"hidden_dimensions": [8, 8], "context_length": 12},
    "PatchTSTEstimator": {
        "patch_len": 4,
        "context_length": 16,
        "dropout": 0.0,
        "d_model": 8,
        "nhead": 2,
        "dim_feedforward": 16,
    },
    "DLinearEstimator": {"context_length": 16},
    "LagTSTEstimator": {
        "freq": "D",
        "context_length": 16,
        "dropout": 0.0,
        "d_model": 8,
        "nhead": 2,
        "dim_feedforward": 16,
    },
    # It makes 0.3 of a dropout of 0.
    "TiDEEstimator": {"freq": "D", "context_length": 16, "dropout_rate": 1e-12},
    "DeepAREstimator": {"freq": "D", "context_length": 12, "dropout_rate": 0.0, "hidden_size": 8},
    "TemporalFusionTransformerEstimator": {"freq": "D", "context_length": 12, "dropout_rate": 0.0, "hidden_dim": 8},
    "WaveNetEstimator": {"freq": "D", "num_residual_channels": 4, "num_skip_channels": 4},
}
CASES = {name: Case(partial(train, name, sizes), precision="32-true") for name, sizes in NETWORKS.items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_gluonts(request: pytest.FixtureRequest, name: str, way: str) -> None:
    check(request, name, way)
