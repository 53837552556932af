"""Checks of options, datasets and sharding, which raise before any training time is spent."""
