"""What is said over TCP about KV that is read by NIXL: beside requests for chunks, from which sizes tell it."""

from __future__ import annotations

import struct

PIECE_BYTES = 2 << 20
# That each side has memory for.
NUM_PIECES = 8
# Answered by the address of the memory and the agent's metadata.
HELLO = b"nixl"
ADDRESS = struct.Struct("<Q")
# For a piece, by first byte and length. Answered by the number of the loan and where the piece lies in the memory.
WANTED = struct.Struct("<cQQ")
WANT = b"w"
LENT = struct.Struct("<QQ")
# By number. Answered by whether it was on loan until now: what was read is what was lent then.
RETURNED = struct.Struct("<cQ")
RETURN = b"r"
VALID, OVER = b"y", b"n"
# The answers to a request for what is not there (any more), and where there is no NIXL.
GONE, NONE = b"g", b""
