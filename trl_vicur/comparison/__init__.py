"""Compare several models' answers to the same questions, side by side."""

from .compare import compare_models
from .report import write_html_comparison


__all__ = ["compare_models", "write_html_comparison"]
