"""Models of scvi-tools, trained by their own `train`, which makes the Trainer."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.wild.trying import WAYS, Case, check, needs

pytestmark = needs("scvi")


def train(name: str, sizes: dict[str, Any], how: dict[str, Any], arguments: dict[str, Any]) -> None:
    import scvi

    # Otherwise the splitter orders the cells by numbers that nothing seeds, in plain Lightning too.
    scvi.settings.seed = 1
    data = scvi.data.synthetic_iid(batch_size=24, n_genes=12, n_proteins=4, n_regions=12)
    model = getattr(scvi.model, name, None) or getattr(scvi.external, name)
    prepare: dict[str, Any] = {"batch_key": "batch"}
    if name in ("SCANVI", "CondSCVI"):
        prepare = (
            {"labels_key": "labels"}
            if name == "CondSCVI"
            else {**prepare, "labels_key": "labels", "unlabeled_category": "label_0"}
        )
    elif name == "TOTALVI":
        prepare["protein_expression_obsm_key"] = "protein_expression"
    model.setup_anndata(data, **prepare)
    # All cells are one batch; the logger keeps what `train` looks at afterwards.
    kept = {key: value for key, value in arguments.items() if key != "logger"}
    model(data, **sizes).train(**{"batch_size": 48, "train_size": 1.0, "early_stopping": False, **kept, **how})


NETWORKS: dict[str, dict[str, Any]] = {
    "SCVI": {"n_hidden": 8, "n_latent": 4, "n_layers": 2, "dropout_rate": 0.0},
    "LinearSCVI": {"n_hidden": 8, "n_latent": 4, "n_layers": 2, "dropout_rate": 0.0},
    "AUTOZI": {"n_hidden": 8, "n_latent": 4, "dropout_rate": 0.0},
    "PEAKVI": {"n_hidden": 8, "n_latent": 4, "dropout_rate": 0.0},
    "CondSCVI": {"n_hidden": 8, "n_latent": 4, "dropout_rate": 0.0},
    "SCANVI": {"n_hidden": 8, "n_latent": 4, "dropout_rate": 0.0},
    "TOTALVI": {"n_latent": 4, "n_layers_encoder": 1, "dropout_rate_encoder": 0.0, "dropout_rate_decoder": 0.0},
}
# Its rate follows the loss of a validation.
TOTALVI: dict[str, Any] = {"batch_size": 36, "train_size": 0.75}
HOW: dict[str, dict[str, Any]] = {"TOTALVI": {**TOTALVI, "adversarial_classifier": False}}
REFUSED = {
    "SCANVI": dict.fromkeys(WAYS, "the network has 1 layer"),
    # Its plan optimizes by hand.
    "TOTALVI": {"two processes": "In manual optimization a rank without the loss needs the shape"},
}
CASES = {
    name: Case(partial(train, name, sizes, HOW.get(name, {})), REFUSED.get(name), draws=True, precision="32-true")
    for name, sizes in NETWORKS.items()
}
CASES["TOTALVI, adversarial"] = Case(
    partial(train, "TOTALVI", NETWORKS["TOTALVI"], {**TOTALVI, "adversarial_classifier": True}),
    dict.fromkeys(WAYS, "`configure_optimizers` returned 2 optimizers"),
    precision="32-true",
)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_scvi(request: pytest.FixtureRequest, name: str, way: str) -> None:
    check(request, name, way)
