"""The tasks by name: how their rows are made and how an answer is judged."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from . import json_slots, sentiment, sql, style
from .rows import Row, Split, assert_disjoint

RowMaker = Callable[[random.Random, Split], Row]
# The model's text, then the row's answer.
Judge = Callable[[str, str], bool]

HELDOUT_ROWS = 200
SEED = 20240607


@dataclass(frozen=True)
class Task:
    """A row maker, a judge, and the judge's rule in words."""

    make_row: RowMaker
    judge: Judge
    rule: str


def _same_sql(text: str, answer: str) -> bool:
    # A user does not mind a code fence, a line break or words after the query, so none of them counts.
    fenced = re.search(r"```(?:sql)?(.*?)(?:```|$)", text, re.DOTALL)
    statement = (fenced[1] if fenced else text).split(";")[0]
    return " ".join(statement.split()) == answer.rstrip(";")


def _same_slots(text: str, answer: str) -> bool:
    return json_slots.parse_answer(text) == json_slots.parse_answer(answer)


def _same_label(text: str, answer: str) -> bool:
    return set(re.findall("positive|negative", text.lower())) == {answer}


def _pirate_voice(text: str, _answer: str) -> bool:
    return style.has_voice(text)


TASKS: dict[str, Task] = {
    "sql": Task(
        sql.make_row,
        _same_sql,
        "the query is exactly the expected one, code fence, white space and what follows its ; aside",
    ),
    "json": Task(
        json_slots.make_row, _same_slots, "the JSON object in the answer has exactly the expected keys and values"
    ),
    "sentiment": Task(sentiment.make_row, _same_label, "the answer names the right label and not the other one"),
    "style": Task(style.make_row, _pirate_voice, style.RULE),
}


def make_rows(task: str, split: Split, count: int, seed: int = SEED) -> list[Row]:
    """Return ``count`` different rows of a task; the same arguments always give the same rows.

    Training rows may repeat a question with another wording of the answer; held-out rows never repeat a question.
    """
    rng = random.Random(f"{task}/{split}/{seed}")
    rows: dict[tuple[str, str], Row] = {}
    attempts = 0
    while len(rows) < count:
        attempts += 1
        if attempts > 50 * count:
            raise ValueError(f"task {task!r} has only {len(rows)} different {split} rows, {count} were asked for")
        row = TASKS[task].make_row(rng, split)
        rows.setdefault((row.user, row.answer if split == "train" else ""), row)
    return list(rows.values())


def training_and_heldout(task: str, rows: int) -> tuple[list[Row], list[Row]]:
    """Return the training and the held-out rows of a task after checking that they share nothing."""
    train = make_rows(task, "train", rows)
    heldout = make_rows(task, "heldout", HELDOUT_ROWS)
    assert_disjoint(train, heldout)
    return train, heldout
