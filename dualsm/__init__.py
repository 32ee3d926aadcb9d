"""dualsm: one language model, one set of weights, several objectives at once."""

__version__ = "0.2.0"
