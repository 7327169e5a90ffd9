"""All figures in one result, and as the tables of docs/experiments.md.

    python scripts/experiments/report.py [--figures figures] [--output docs/results] [--docs docs/experiments.md]
    python scripts/experiments/report.py --figures paper --name experiments_paper --docs docs/experiments_paper.md

Reads the CSV and JSON files of the experiments that are in the folder, writes experiments.json, and puts each table
between its marks in the document (``<!-- fig9 -->`` to ``<!-- end -->``). Without ``--docs`` the tables are printed.
What the result had of experiments that are not in the folder (a measurement of a quiet machine) stays there.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from experiments import report_tables
from experiments.tables import Row, read_csv, read_json, write_json

ROOT = Path(__file__).parents[2]
_MARKS = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def collect(folder: Path) -> dict[str, dict[str, Any]]:
    """By name of the CSV: its rows, and what its JSON tells."""
    found = {}
    for path in sorted(folder.glob("fig*.csv")):
        found[path.stem] = {
            "about": read_json(path.with_suffix(".json")),
            "rows": [_short(row) for row in read_csv(path)],
        }
    return found


def _short(row: Row) -> Row:
    """Four digits are more than any of these figures is good for."""
    kept = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}
    kept.pop("units", None)
    return kept


def insert(document: str, tables: dict[str, str]) -> str:
    """The document with each table between its marks; marks without a table stay as they are."""
    return _MARKS.sub(
        lambda match: f"{match[1]}{tables[match[2]]}\n{match[3]}" if match[2] in tables else match[0], document
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, default=Path("figures"), metavar="DIR", help="what to read")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results", metavar="DIR")
    parser.add_argument("--name", default="experiments", help="of the result, a .json there")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="put the tables there")
    options = parser.parse_args()
    found = collect(options.figures)
    if not found:
        raise SystemExit(f"{options.figures} has no fig*.csv: run the experiments first, for example make figures")
    result = options.output / f"{options.name}.json"
    write_json(result, dict(sorted({**read_json(result), **found}.items())))
    tables = report_tables.tables(found)
    if options.docs is not None:
        text = options.docs.read_text(encoding="utf-8")
        options.docs.write_text(insert(text, tables), encoding="utf-8")
    else:
        print("\n\n".join(tables.values()))


if __name__ == "__main__":
    main()
