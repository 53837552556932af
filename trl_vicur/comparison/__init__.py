"""Answers of several models to the same questions, side by side: who is right where they disagree."""

from .compare import compare_models
from .report import write_html_comparison


__all__ = ["compare_models", "write_html_comparison"]
