"""Heat maps of the sink token's attention over images (ViCuR, arXiv 2606.05718, Fig. 11)."""

from .plot import plot_sink_attention


__all__ = ["plot_sink_attention"]
