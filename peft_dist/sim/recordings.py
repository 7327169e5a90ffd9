"""Files of recordings, line by line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from peft_dist.core.errors import ConfigError

CUT = "the file is cut off"


def read_lines(path: Path, kind: Any, ended: Callable[[str], Any]) -> Iterator[Any]:
    """Entries of one of the types of a union; behind a last line that is not whole, what ``ended`` makes of that.

    Raises ConfigError for a file that cannot be read, or holds something else.
    """
    decoder = msgspec.json.Decoder(kind)
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"the recording {path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        try:
            yield decoder.decode(line)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}:{number}: this is no line of a recording: {error}") from error
    if rest:
        yield ended(f"{CUT} in line {len(lines) + 1}")
