"""Audit caption-image datasets for noisy correspondence: pairs whose caption does not describe its image."""

__version__ = "0.1.0"
