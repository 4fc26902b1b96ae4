"""Experiments on small models: each file a task and what is measured on it. They train with the project's own model, loss and
step."""
