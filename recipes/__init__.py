"""Whole projects to copy from live here, each a LightningModule, a data module and a YAML file; add new ones freely."""
