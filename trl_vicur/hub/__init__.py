"""Names, cards and uploads of models and datasets."""
