"""A table of a whole test run, from pytest's JUnit report: ``full_result.py REPORT.xml RESULT.md``.

It holds no dates and no durations, so that two runs with the same outcome write the same file.
"""

import platform
import sys
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

OUTCOMES = ("passed", "failed", "error", "skipped")


def outcome(case: ElementTree.Element) -> str:
    for name in ("error", "failure", "skipped"):
        if case.find(name) is not None:
            return "failed" if name == "failure" else name
    return "passed"


def page(report: ElementTree.Element) -> str:
    """The Markdown text of a JUnit report."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: Counter[str] = Counter()
    broken = []
    for case in report.iter("testcase"):
        module = case.get("classname", "").replace(".", "/")
        result = outcome(case)
        counts[module][result] += 1
        if result == "skipped":
            reasons[" ".join((case.find("skipped").get("message") or "").split())] += 1  # type: ignore[union-attr]
        elif result != "passed":
            broken.append(f"{module}: {case.get('name')}")
    total = sum(counts.values(), Counter())
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "webdataset", "hydra-core"))
    lines = ["# Result of `bash launch/test.sh --full`", "", f"Python {platform.python_version()}, {packages}.", ""]
    lines += [f"| Tests | {' | '.join(OUTCOMES)} |", f"|---|{'---:|' * len(OUTCOMES)}"]
    for module, count in [*sorted(counts.items()), ("**all**", total)]:
        lines.append(f"| {module} | {' | '.join(str(count[name]) for name in OUTCOMES)} |")
    if broken:
        lines += ["", "Not passed:", "", *(f"- {name}" for name in sorted(broken))]
    if reasons:
        lines += ["", "Skipped:", "", *(f"- {number} x {reason}" for reason, number in sorted(reasons.items()))]
    return "\n".join(lines) + "\n"


def main() -> None:
    source, target = sys.argv[1:]
    Path(target).write_text(page(ElementTree.parse(source).getroot()), encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()
