"""The training loop and what it needs: objective, learning rate, step, validation, signals."""
