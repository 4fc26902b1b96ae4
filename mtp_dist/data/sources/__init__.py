"""Where documents come from: each source is an iterable of (name, text), the same each time, in the same order."""
