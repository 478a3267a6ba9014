"""The table of what was measured, from ``benchmarks/results``.

python -m benchmarks.table            # print it
python -m benchmarks.table --write    # put it into docs/performance.md
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.ratios import RESULTS

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- begin: python -m benchmarks.table --write -->", "<!-- end -->"
# in the order of the table
NAMES = (
    *("rollout_libero", "reset_libero", "encode_sample", "update", "push", "payload"),
    *("iteration", "idle", "startup_run"),
)
HEAD = "| benchmark | what is compared | ours | theirs | ratio | target | |\n|---|---|---|---|---|---|---|"


def row(name: str, ratio: dict[str, Any]) -> str:
    """Return a ratio's line of the table."""
    target, unit = ratio["target"], ratio["unit"]
    is_met = ratio["ratio"] >= target if ratio["at_least"] else ratio["ratio"] <= target
    ours, theirs = (statistics.median(ratio[side]) for side in ("ours", "theirs"))
    sign = ">=" if ratio["at_least"] else "<="
    return (
        f"| `{name}` | {ratio['name']} | {ours:.4g} {unit} | {theirs:.4g} {unit} | {ratio['ratio']:.3g} "
        f"| {sign} {target:.3g} | {'met' if is_met else 'missed'} |"
    )


def table(results: Path = RESULTS) -> str:
    """Return the table of all results that are there, and which machine each was measured on."""
    rows, machines = [], []
    for name in NAMES:
        path = results / f"{name}.json"
        if not path.exists():
            rows.append(f"| `{name}` | not measured | | | | | |")
            continue
        content = json.loads(path.read_text())
        rows += [row(name, ratio) for ratio in content["ratios"]]
        machine = content["machine"]
        machines.append(
            f"{machine['system']}, {machine['cpus']} cores, Python {machine['python']}: `{name}` (load {machine['load']:.1f})"
        )
    return "\n".join([HEAD, *rows, "", "Measured on " + "; ".join(machines) + "." if machines else ""])


def replaced(page: str, text: str) -> str:
    """Return the page with another table; raises ValueError when it has no place for one."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no lines {BEGIN!r} and {END!r} for the table to stand between")
    return f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}"


def main() -> None:
    """Print the table or write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put it into docs/performance.md")
    text = table()
    if parser.parse_args().write:
        PAGE.write_text(replaced(PAGE.read_text(), text))
    print(text)


if __name__ == "__main__":
    main()
