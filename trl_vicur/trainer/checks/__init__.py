"""Refuse, before any training time is spent, what cannot be trained."""
