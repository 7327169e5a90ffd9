"""Print each patch's fingerprint, to be added to the catalog after a library's change was reviewed.

python -m peft_dist.patches.fingerprints            of the installed libraries
python -m peft_dist.patches.fingerprints FOLDER     of wheels unpacked in FOLDER
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

from peft_dist.patches.catalog import PATCHES


def main(root: Path | None = None) -> None:
    """Print one line per patch."""
    for patch in PATCHES:
        version = "unpacked" if root else importlib.metadata.version(patch.library)
        known = patch.fingerprint(root) in patch.fingerprints.values()
        print(f"{patch.library} {version} {patch.target}: {patch.fingerprint(root)} {'known' if known else 'NEW'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
