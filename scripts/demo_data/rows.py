"""The row type that every task generates, and the rule that splits words between training and held-out rows."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, Split] = ("train", "heldout")


@dataclass(frozen=True)
class Row:
    """One question with its answer, and what it was made of.

    ``templates`` and ``words`` list every template and every varying word in the row, so that a test can
    prove that no held-out row shares one with a training row.
    """

    user: str
    answer: str
    templates: tuple[str, ...]
    words: tuple[str, ...]


class LeakError(ValueError):
    """A held-out row shares a template, a word or a whole question with the training rows."""


def listed(text: str) -> list[str]:
    """Return the words of a text block, which is how long word lists are written here."""
    return text.split()


def split_of(word: str) -> Split:
    """Return the one split that ``word`` may appear in.

    The word's checksum decides, so a word lands on the same side in every list, whatever the list's order.
    """
    return "heldout" if zlib.crc32(word.lower().encode()) % 4 == 0 else "train"


def keep(words: Iterable[str], split: Split) -> list[str]:
    """Return the words of one split, in their given order and without repeats."""
    kept = [word for word in dict.fromkeys(words) if split_of(word) == split]
    if not kept:
        raise ValueError(f"no word is left for the {split} split; give a longer list")
    return kept


def assert_disjoint(train: Sequence[Row], heldout: Sequence[Row]) -> None:
    """Raise LeakError unless the two sets of rows share no question, template or varying word."""
    for what, left, right in (
        ("question", {row.user for row in train}, {row.user for row in heldout}),
        ("template", {t for row in train for t in row.templates}, {t for row in heldout for t in row.templates}),
        ("word", {w.lower() for row in train for w in row.words}, {w.lower() for row in heldout for w in row.words}),
    ):
        shared = sorted(left & right)
        if shared:
            raise LeakError(f"{len(shared)} {what}(s) occur in training and held-out rows, first: {shared[0]!r}")
