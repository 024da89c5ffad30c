"""Figures of the README that show mathematics, not measurements; made by `python -m bench.figures.variants`."""
