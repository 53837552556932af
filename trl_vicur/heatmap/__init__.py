"""Pictures of what the sink token looks at (ViCuR, arXiv 2606.05718, Fig. 11)."""

from .plot import plot_sink_attention


__all__ = ["plot_sink_attention"]
