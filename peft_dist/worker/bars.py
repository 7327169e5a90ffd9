"""Progress bars of libraries, where they would only garble a log."""

from __future__ import annotations

import sys


def quieten_bars() -> None:
    """Have transformers draw no bars ("Loading weights") where standard error is no terminal; the hub's stay.

    Several replicas write to one log, into the middle of each other's lines.
    """
    # A replica in a test may know nothing of transformers.
    if sys.stderr.isatty() or "transformers" not in sys.modules:
        return
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    hub_was_quiet = are_progress_bars_disabled()
    # It turns off those of downloads too, which may take minutes.
    logging.disable_progress_bar()
    if not hub_was_quiet:
        enable_progress_bars()
