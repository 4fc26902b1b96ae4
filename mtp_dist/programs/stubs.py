"""What a problem's prompt defines by itself, before a model has continued it: helpers and classes that its tests may use, and a
function that lacks its body. Standard library only: it runs in a bare interpreter."""

import ast

LINES = 400
"""How many lines are given up at most, in search of an end where the prompt is Python."""


def stub(prompt: str) -> str:
    """The prompt, cut or completed so that it compiles. The empty text where nothing of it does."""
    lines = prompt.splitlines(keepends=True)
    for end in range(len(lines), max(-1, len(lines) - LINES), -1):
        head = "".join(lines[:end])
        last = next((line for line in reversed(lines[:end]) if line.strip()), "")
        indent = last[: len(last) - len(last.lstrip())]
        # A docstring is a body; a head without one needs another.
        for text in (head, f"{head}\n{indent}    pass\n", f"{head}\n{indent}\tpass\n"):
            if _compiles(text):
                return text
    return ""


def stub_classes(text: str, entry_point: str) -> list[str]:
    """Names of classes that a stub defines, other than the one that is asked for."""
    return [node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name != entry_point]


def _compiles(text: str) -> bool:
    try:
        compile(text, "problem", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
