"""The version of attncc: pyproject.toml reads it from here, and cache keys contain it."""

__version__ = "0.1.0"
