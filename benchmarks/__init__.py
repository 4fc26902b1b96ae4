"""Performance claims as commands: each measures this project and a named rival in one run and ends with a line `ratio: ...`.

Results that were obtained, with command and machine, are in docs/results.md.
"""
