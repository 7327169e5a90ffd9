"""Short reviews labelled positive or negative."""

from __future__ import annotations

import random
from typing import Literal

from .rows import Row, Split, keep
from .sentiment_words import FRAMES, NEGATIVE, OPENERS, POSITIVE, SUBJECTS, THINGS

Label = Literal["positive", "negative"]
LABELS: tuple[Label, Label] = ("positive", "negative")


def user_message(review: str) -> str:
    """Return the message a user sends for this task."""
    return f"Review: {review}\nIs the review positive or negative? Answer with one word."


def make_row(rng: random.Random, split: Split) -> Row:
    """Build one row for ``split``."""
    label = rng.choice(LABELS)
    good, bad = keep(POSITIVE, split), keep(NEGATIVE, split)
    same, other = (good, bad) if label == "positive" else (bad, good)
    kind = rng.choices(("plain", "turn", "negated", label), (5, 3, 2, 4))[0]
    frame = rng.choice(FRAMES[kind][split])
    adjective, second = rng.sample(same, 2)
    opposite = rng.choice(other)
    subject = rng.choice(keep(SUBJECTS, split))
    thing, thing_two = rng.sample(keep(THINGS, split), 2)
    text = frame.format(s=subject, t=thing, u=thing_two, x=adjective, y=second, z=opposite)
    fields = {"s": subject, "t": thing, "u": thing_two, "x": adjective, "y": second, "z": opposite}
    text = text[0].upper() + text[1:]
    templates = [frame]
    if rng.random() < 0.35:
        opener = rng.choice(OPENERS[split])
        templates.append(opener)
        text = f"{opener} {text}"
    words = tuple(word for field, word in fields.items() if "{" + field + "}" in frame)
    return Row(user_message(text), label, tuple(templates), words)
