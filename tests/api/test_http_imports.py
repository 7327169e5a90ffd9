"""The process that answers HTTP does not carry the model."""

from __future__ import annotations

import subprocess
import sys


def test_the_server_imports_no_torch() -> None:
    code = (
        "import sys, peft_dist.api.server\n"
        "heavy = {'torch', 'transformers', 'peft'} & sys.modules.keys()\n"
        "sys.exit(f'imported: {sorted(heavy)}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
