"""Have recorded engines and orchestrators decide again, and say whether they decided the same (docs/simulator.md).

PEFT_DIST_RECORD=FOLDER peft-dist serve MODEL ...      # records
python scripts/replay.py FOLDER/*.jsonl

Ends with status 1 if one decided otherwise, or its recording is broken or cut off.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from peft_dist.core.errors import PeftDistError
from peft_dist.sim import orchestrator_replay, replay
from peft_dist.sim.recordings import CUT


def told(path: Path) -> tuple[str, bool]:
    """Of one recording: what came of it, and whether it is whole. Raises PeftDistError where it is of no use."""
    if path.name.startswith(orchestrator_replay.PREFIX):
        decided = orchestrator_replay.replay(orchestrator_replay.read(path))
        words, ended = decided.words, decided.ended
    else:
        found = replay.replay(replay.read(path))
        moves = f", and {found.moves} moves of KV" if found.moves else ""
        words = f"{found.steps} steps and {found.switches} switches of {found.engines} engine(s) alike{moves}"
        ended = found.ended
    return f"{words}; the recording ends there: {ended}" if ended else words, not (ended or "").startswith(CUT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", type=Path, nargs="+")
    status = 0
    for path in parser.parse_args().recordings:
        try:
            words, is_whole = told(path)
        except PeftDistError as error:
            words, is_whole = str(error), False
        print(f"{path}: {words}")
        status |= not is_whole
    return status


if __name__ == "__main__":
    sys.exit(main())
