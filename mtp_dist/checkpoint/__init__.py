"""Checkpoints: safetensors fragments of each parameter and one JSON manifest; docs/checkpoint-format.md describes the format."""
