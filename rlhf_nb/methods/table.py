"""The README's table of methods, from their classes.

`python -m rlhf_nb.methods.table` writes it into README.md; `--check` fails where it differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rlhf_nb import registry
from rlhf_nb.methods.base import Method

TARGET = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- methods: `python -m rlhf_nb.methods.table` -->", "<!-- /methods -->"
HEADER = ("method", "rows", "models in memory", "live while it runs", "paper")


def table() -> str:
    """Markdown; one line a method that trains, in the registry's order. Methods of plugins are theirs to describe."""
    classes = [registry.methods.get(name) for name in registry.methods.names()]
    own = [method for method in classes if method.trains and method.__module__.startswith("rlhf_nb.")]
    rows = [HEADER, ("---",) * len(HEADER), *map(_row, own)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(method: type[Method]) -> tuple[str, ...]:
    live = [coefficient.name for coefficient in method.live]
    if method.needs_reward:
        live.append("the reward and its weights")
    kinds = " or ".join((method.rows, *method.also))
    rows = f"{kinds} and a reward" if method.needs_reward else kinds
    number = method.paper.removeprefix("arXiv:")
    paper = f"[{method.paper}](https://arxiv.org/abs/{number})" if number else ""
    return f"`{method.name}`", rows, method.models, ", ".join(live), paper


def written(text: str) -> str:
    """The README with the table of now between its marks.

    Raises:
        ValueError: The marks are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"{TARGET.name}: the table stands between one {BEGIN} and one {END}; put them back")
    return f"{before}{BEGIN}\n\n{table()}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where the README differs; write nothing")
    check = parser.parse_args(arguments).check
    text = TARGET.read_text(encoding="utf-8")
    wanted = written(text)
    if not check:
        TARGET.write_text(wanted, encoding="utf-8")
        return 0
    if wanted == text:
        return 0
    print(f"{TARGET.name}'s methods are stale; run: python -m rlhf_nb.methods.table", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
