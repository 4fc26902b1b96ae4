"""Distributed training of Multi-Token Prediction language models, and decoding with the same heads."""

__version__ = "0.1.0"
