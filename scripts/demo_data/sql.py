"""Questions about one table, answered by one SQL statement in a fixed canonical form."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from .lexicon import (
    CITIES,
    COLORS,
    FIRST_NAMES,
    JOBS,
    NUMBER_COLUMNS,
    TABLE_NOUNS,
    TEXT_COLUMNS,
    invented_word,
    numbers,
)
from .rows import Row, Split, keep
from .sql_templates import AGGREGATES, COMPARISONS, CONDITIONS, QUESTIONS

SQL_OF_INTENT: dict[str, str] = {
    "pick": "SELECT {a} FROM {t} WHERE {eq};",
    "pick_all": "SELECT * FROM {t} WHERE {eq};",
    "compare": "SELECT {a} FROM {t} WHERE {cmp};",
    "both": "SELECT {a} FROM {t} WHERE {eq} AND {cmp};",
    "count": "SELECT COUNT(*) FROM {t} WHERE {eq};",
    "count_compare": "SELECT COUNT(*) FROM {t} WHERE {cmp};",
    "aggregate": "SELECT {fn}({n}) FROM {t};",
    "aggregate_where": "SELECT {fn}({n}) FROM {t} WHERE {eq};",
    "top": "SELECT {a} FROM {t} ORDER BY {n} DESC LIMIT {k};",
    "bottom": "SELECT {a} FROM {t} ORDER BY {n} ASC LIMIT {k};",
    "group_count": "SELECT {a}, COUNT(*) FROM {t} GROUP BY {a};",
    "group_aggregate": "SELECT {a}, {fn}({n}) FROM {t} GROUP BY {a};",
    "distinct": "SELECT DISTINCT {a} FROM {t};",
}

_NAME = r"[A-Za-z_]+"
_EQ = rf"{_NAME} = '[A-Za-z]+'"
_CMP = rf"{_NAME} (?:>|<|>=|<=) \d+"
_CANONICAL = re.compile(
    rf"SELECT (?:\*|COUNT\(\*\)|(?:AVG|MAX|MIN|SUM)\({_NAME}\)|DISTINCT {_NAME}|{_NAME}"
    rf"(?:, (?:COUNT\(\*\)|(?:AVG|MAX|MIN|SUM)\({_NAME}\)))?) FROM {_NAME}"
    rf"(?: WHERE (?:{_EQ}(?: AND {_CMP})?|{_CMP}))?(?: GROUP BY {_NAME})?"
    rf"(?: ORDER BY {_NAME} (?:ASC|DESC) LIMIT \d+)?;"
)


@dataclass(frozen=True)
class Identifier:
    """A table or column: how the schema spells it, how a question says it, and the words in it."""

    spelled: str
    spoken: str
    words: tuple[str, ...]


def user_message(schema: str, question: str) -> str:
    """Return the message a user sends for this task: a table line, then the question."""
    return f"Table: {schema}\nQuestion: {question}\nAnswer with one SQL query."


def is_canonical(sql: str) -> bool:
    """Tell whether ``sql`` is written in the one form that the answers use."""
    return _CANONICAL.fullmatch(sql) is not None


def _identifier(rng: random.Random, split: Split, pool: list[str], casing: str) -> Identifier:
    base = rng.choice(pool) if rng.random() < 0.75 else invented_word(rng, split)
    words: tuple[str, ...] = (base,)
    if rng.random() < 0.3:
        prefix = rng.choice(pool) if rng.random() < 0.7 else invented_word(rng, split)
        words = (prefix, base) if prefix != base else (base,)
    if casing == "pascal":
        spelled = "".join(word.capitalize() for word in words)
    else:
        spelled = "_".join(words)
        spelled = spelled.upper() if casing == "upper" else spelled
    # A user quotes the column as the schema spells it about as often as in plain words.
    spoken = spelled if rng.random() < 0.4 else " ".join(words)
    return Identifier(spelled, spoken, words)


def _value(rng: random.Random, split: Split) -> str:
    if rng.random() < 0.55:
        word = invented_word(rng, split)
        return word.capitalize() if rng.random() < 0.7 else word
    return rng.choice(keep(rng.choice((CITIES, FIRST_NAMES, COLORS, JOBS)), split))


def _distinct_columns(rng: random.Random, split: Split, casing: str) -> tuple[list[Identifier], list[Identifier]]:
    texts = keep(TEXT_COLUMNS, split)
    counts = keep(NUMBER_COLUMNS, split)
    while True:
        text = [_identifier(rng, split, texts, casing) for _ in range(rng.choice((2, 2, 3)))]
        number = [_identifier(rng, split, counts, casing) for _ in range(rng.choice((1, 2)))]
        everything = [word for column in text + number for word in column.words]
        if len(set(everything)) == len(everything):
            return text, number


def make_row(rng: random.Random, split: Split) -> Row:
    """Build one row for ``split``."""
    casing = rng.choices(("snake", "upper", "pascal"), (7, 1, 2))[0]
    table = _identifier(rng, split, keep(TABLE_NOUNS, split), casing)
    text, number = _distinct_columns(rng, split, casing)
    columns = text + number
    rng.shuffle(columns)
    shown, filtered = rng.sample(text, 2)
    measured = rng.choice(number)
    value = _value(rng, split)
    threshold = rng.choice(numbers(2, 999, split))
    few = rng.choice(numbers(2, 20, split))
    intent = rng.choice(list(QUESTIONS))
    function, function_phrase = rng.choice(AGGREGATES[split])
    operator, comparison = rng.choice(COMPARISONS[split])
    condition = rng.choice(CONDITIONS[split])
    question = rng.choice(QUESTIONS[intent][split])
    filled = question.format(
        t=table.spoken,
        a=shown.spoken,
        n=measured.spoken,
        fn=function_phrase,
        k=few,
        eq=condition.format(c=filtered.spoken, v=value),
        cmp=comparison.format(n=measured.spoken, x=threshold),
    )
    answer = SQL_OF_INTENT[intent].format(
        t=table.spelled,
        a=shown.spelled,
        n=measured.spelled,
        fn=function,
        k=few,
        eq=f"{filtered.spelled} = '{value}'",
        cmp=f"{measured.spelled} {operator} {threshold}",
    )
    schema = f"{table.spelled}({', '.join(column.spelled for column in columns)})"
    used_templates = [question]
    used_words = [value, *table.words, *(word for column in columns for word in column.words)]
    if "{eq}" in question:
        used_templates.append(condition)
    if "{cmp}" in question:
        used_templates.append(comparison)
        used_words.append(str(threshold))
    if "{fn}" in question:
        used_templates.append(f"{function}: {function_phrase}")
    if "{k}" in question:
        used_words.append(str(few))
    return Row(user_message(schema, filled[0].upper() + filled[1:]), answer, tuple(used_templates), tuple(used_words))
