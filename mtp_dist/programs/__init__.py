"""Programs that a model wrote: problems with tests (HumanEval's format), a sandbox to run them in, and pass@k."""
