"""Sentences whose details are to be returned as one JSON object with the requested keys."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence

from . import wide_words as wide
from .json_templates import DOMAINS, SENTENCES
from .lexicon import (
    CITIES,
    COLORS,
    FIRST_NAMES,
    ITEMS,
    JOBS,
    LAST_NAMES,
    MONTHS,
    NUMBER_COLUMNS,
    TABLE_NOUNS,
    invented_word,
    numbers,
)
from .rows import Row, Split, keep
from .sentiment_words import NEGATIVE, POSITIVE

Value = str | int
# A random source and a split in; a value and the varying words it is made of out.
Maker = Callable[[random.Random, Split], tuple[Value, list[str]]]

_KEYS = {key for slots in DOMAINS.values() for key in slots}


def _pools(words: list[str], more: list[str]) -> dict[Split, list[str]]:
    """Return the words of each split; ``more`` serves the training rows alone, which need the greater variety."""
    return {"train": keep(words + more, "train"), "heldout": keep(words, "heldout")}


_FIRST_NAMES = _pools(FIRST_NAMES, wide.FIRST_NAMES)
_LAST_NAMES = _pools(LAST_NAMES, wide.LAST_NAMES)
# Ordinary words that stand in for a city, a name or an item, none of which they are.
_BORROWED = _pools(
    [word for word in TABLE_NOUNS + NUMBER_COLUMNS + ITEMS + POSITIVE + NEGATIVE if word not in _KEYS],
    [word for word in wide.COMMON if word not in _KEYS],
)


def user_message(keys: Sequence[str], sentence: str) -> str:
    """Return the message a user sends for this task: the wanted keys, then the sentence."""
    return f"Extract {', '.join(keys)} from the sentence and answer with JSON only.\nSentence: {sentence}"


def _unfamiliar_word(rng: random.Random, split: Split) -> str:
    # An invented word is spelled the same way everywhere, so training needs fewer of those than of known ones.
    invented = rng.random() < {"train": 0.3, "heldout": 0.5}[split]
    return invented_word(rng, split) if invented else rng.choice(_BORROWED[split])


def _word(rng: random.Random, split: Split, pools: dict[Split, list[str]]) -> str:
    # Training leans on words that are no city, name or item at all, because they can only be copied; held-out rows
    # look more like what people write.
    if rng.random() < {"train": 0.5, "heldout": 0.15}[split]:
        word = _unfamiliar_word(rng, split)
        return word.capitalize() if pools[split][0][0].isupper() else word
    return rng.choice(pools[split])


def _listed(words: list[str], more: list[str]) -> Maker:
    pools = _pools(words, more)

    def make(rng: random.Random, split: Split) -> tuple[Value, list[str]]:
        word = _word(rng, split, pools)
        return word, [word]

    return make


def _person(rng: random.Random, split: Split) -> tuple[Value, list[str]]:
    first = _word(rng, split, _FIRST_NAMES)
    if rng.random() < 0.4:
        return first, [first]
    last = _word(rng, split, _LAST_NAMES)
    return f"{first} {last}", [first, last]


def _company(rng: random.Random, split: Split) -> tuple[Value, list[str]]:
    word = _unfamiliar_word(rng, split).capitalize()
    suffix = rng.choice({"train": ("", " Ltd", " Group", " Labs"), "heldout": ("", " Works", " Partners")}[split])
    return word + suffix, [word, *suffix.split()]


def _date(rng: random.Random, split: Split) -> tuple[Value, list[str]]:
    day = rng.choice(numbers(1, 28, split))
    month = rng.choice(keep(MONTHS, split))
    return (f"{day} {month}" if rng.random() < 0.5 else f"{month} {day}"), [month, str(day)]


def _time(rng: random.Random, split: Split) -> tuple[Value, list[str]]:
    clock = rng.choice(keep((f"{hour}:{minute:02d}" for hour in range(6, 24) for minute in range(0, 60, 5)), split))
    return clock, [clock]


def _amount(rng: random.Random, split: Split) -> tuple[Value, list[str]]:
    number = rng.choice(numbers(2, 60, split))
    return number, [str(number)]


MAKERS: dict[str, Maker] = {
    "city": _listed(CITIES, wide.CITIES),
    "person": _person,
    "company": _company,
    "date": _date,
    "time": _time,
    "amount": _amount,
    "item": _listed(ITEMS, wide.ITEMS),
    "color": _listed(COLORS, wide.COLORS),
    "job": _listed(JOBS, wide.JOBS),
}


def parse_answer(text: str) -> dict[str, Value] | None:
    """Return the JSON object in ``text``, whatever stands around it, or None when there is none."""
    try:
        value = json.loads(text[text.find("{") : text.rfind("}") + 1])
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def make_row(rng: random.Random, split: Split) -> Row:
    """Build one row for ``split``."""
    domain = rng.choice(list(DOMAINS))
    sentence = rng.choice(SENTENCES[domain][split])
    slots = [slot for slot in DOMAINS[domain] if "{" + slot + "}" in sentence]
    values: dict[str, Value] = {}
    words: list[str] = []
    for slot in slots:
        while True:
            value, made_of = MAKERS[DOMAINS[domain][slot]](rng, split)
            # Two slots with one value would make the sentence ambiguous.
            if value not in values.values():
                break
        values[slot] = value
        words += made_of
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", sentence.format(**values))
    rng.shuffle(slots)
    count = rng.randint(2, len(slots))
    if split == "train":
        # Every value asked for is one more to learn from, at the price of a few tokens.
        count = max(count, rng.randint(2, len(slots)))
    wanted = slots[:count]
    answer = json.dumps({slot: values[slot] for slot in wanted})
    return Row(user_message(wanted, text), answer, (sentence,), tuple(words))
