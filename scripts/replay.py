"""Have recorded engines decide again, and say whether they decided the same (docs/simulator.md).

PEFT_DIST_RECORD=FOLDER peft-dist serve MODEL ...      # records
python scripts/replay.py FOLDER/*.jsonl
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from peft_dist.sim.replay import ReplayError, read, replay


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", type=Path, nargs="+")
    status = 0
    for path in parser.parse_args().recordings:
        try:
            found = replay(read(path))
        except ReplayError as error:
            print(f"{path}: {error}")
            status = 1
            continue
        end = f"; the recording ends there: {found.ended}" if found.ended else ""
        print(f"{path}: {found.steps} steps and {found.switches} switches of {found.engines} engine(s) alike{end}")
    return status


if __name__ == "__main__":
    sys.exit(main())
