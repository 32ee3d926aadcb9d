"""Pretraining of language models on a mixture of causal, prefix and masked-diffusion objectives."""

__version__ = "0.2.0"
