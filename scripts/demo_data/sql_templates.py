"""Phrasings of the SQL questions. The two splits share no phrase.

Fields: ``t`` table, ``a`` shown column, ``n`` numeric column, ``fn`` aggregate phrase, ``k`` row count, ``eq`` an
equality phrase from CONDITIONS, ``cmp`` a comparison phrase from COMPARISONS.
"""

from __future__ import annotations

from .rows import Split

CONDITIONS: dict[Split, list[str]] = {
    "train": [
        "whose {c} is {v}",
        "where {c} is {v}",
        "where the {c} is {v}",
        "with {c} {v}",
        "with {v} as {c}",
        "where {c} equals {v}",
        "with the {c} {v}",
        "with {c} = {v}",
    ],
    "heldout": ["that have {c} {v}", "having {v} as their {c}", "whose {c} equals {v}", "with {c} set to {v}"],
}

COMPARISONS: dict[Split, list[tuple[str, str]]] = {
    "train": [
        (">", "whose {n} is above {x}"),
        (">", "with {n} over {x}"),
        (">", "where {n} is greater than {x}"),
        (">", "with a {n} of more than {x}"),
        ("<", "whose {n} is below {x}"),
        ("<", "with {n} under {x}"),
        ("<", "where {n} is less than {x}"),
        ("<", "with a {n} smaller than {x}"),
        (">=", "whose {n} is at least {x}"),
        (">=", "with {n} of at least {x}"),
        (">=", "where {n} is no less than {x}"),
        ("<=", "whose {n} is at most {x}"),
        ("<=", "with {n} of at most {x}"),
        ("<=", "where {n} is no more than {x}"),
    ],
    "heldout": [
        (">", "with {n} above {x}"),
        (">", "whose {n} is more than {x}"),
        ("<", "with {n} below {x}"),
        ("<", "whose {n} is less than {x}"),
        (">=", "that have {n} of at least {x}"),
        ("<=", "that have {n} of at most {x}"),
    ],
}

AGGREGATES: dict[Split, list[tuple[str, str]]] = {
    "train": [
        ("AVG", "average"),
        ("AVG", "mean"),
        ("MAX", "highest"),
        ("MAX", "maximum"),
        ("MAX", "biggest"),
        ("MIN", "lowest"),
        ("MIN", "minimum"),
        ("MIN", "least"),
        ("SUM", "total"),
        ("SUM", "summed"),
        ("SUM", "overall"),
    ],
    "heldout": [("AVG", "average value of the"), ("MAX", "largest"), ("MIN", "smallest"), ("SUM", "total sum of the")],
}

QUESTIONS: dict[str, dict[Split, list[str]]] = {
    "pick": {
        "train": [
            "what is the {a} of the {t} {eq}?",
            "show the {a} of {t} {eq}.",
            "list the {a} for all {t} {eq}.",
            "give me the {a} of every row in {t} {eq}.",
            "find {a} from {t} {eq}",
            "I need the {a} of {t} {eq}.",
            "which {a} do the {t} {eq} have?",
            "please return the {a} for {t} {eq}.",
        ],
        "heldout": ["tell me the {a} of {t} {eq}.", "can you get the {a} for the {t} {eq}?"],
    },
    "pick_all": {
        "train": [
            "show all columns of {t} {eq}.",
            "list every column for {t} {eq}.",
            "give me everything about the {t} {eq}.",
            "show the full rows of {t} {eq}",
            "return all data for {t} {eq}.",
            "show all {t} {eq}.",
            "find all {t} {eq}.",
            "which {t} are there {eq}? Show everything.",
        ],
        "heldout": ["I want all columns for the {t} {eq}.", "get the full rows for {t} {eq}."],
    },
    "compare": {
        "train": [
            "what is the {a} of the {t} {cmp}?",
            "show the {a} of {t} {cmp}.",
            "list the {a} for all {t} {cmp}.",
            "give me the {a} of every row in {t} {cmp}.",
            "find {a} from {t} {cmp}",
            "I need the {a} of {t} {cmp}.",
            "please return the {a} for {t} {cmp}.",
        ],
        "heldout": ["tell me the {a} of {t} {cmp}.", "can you get the {a} for the {t} {cmp}?"],
    },
    "both": {
        "train": [
            "what is the {a} of the {t} {eq} and {cmp}?",
            "show the {a} of {t} {eq} and {cmp}.",
            "list the {a} for all {t} {eq}, but only those {cmp}.",
            "find {a} from {t} {eq} and also {cmp}",
            "I need the {a} of {t} {eq} and {cmp}.",
            "please return the {a} for {t} {eq} and {cmp}.",
        ],
        "heldout": ["tell me the {a} of {t} {eq} and {cmp}.", "can you get the {a} for the {t} {eq} and {cmp}?"],
    },
    "count": {
        "train": [
            "how many {t} are there {eq}?",
            "count the {t} {eq}.",
            "what is the number of {t} {eq}?",
            "give me the count of {t} {eq}",
            "how many rows of {t} are there {eq}?",
            "number of {t} {eq}?",
        ],
        "heldout": ["tell me how many {t} exist {eq}.", "please count all the {t} {eq}."],
    },
    "count_compare": {
        "train": [
            "how many {t} are there {cmp}?",
            "count the {t} {cmp}.",
            "what is the number of {t} {cmp}?",
            "give me the count of {t} {cmp}",
            "how many rows of {t} are there {cmp}?",
            "number of {t} {cmp}?",
        ],
        "heldout": ["tell me how many {t} exist {cmp}.", "please count all the {t} {cmp}."],
    },
    "aggregate": {
        "train": [
            "what is the {fn} {n} of all {t}?",
            "show the {fn} {n} in {t}.",
            "give me the {fn} {n} of the {t}",
            "calculate the {fn} {n} over all {t}.",
            "compute the {fn} {n} for {t}.",
            "I need the {fn} {n} across {t}.",
        ],
        "heldout": ["tell me the {fn} {n} of {t}.", "can you work out the {fn} {n} for all the {t}?"],
    },
    "aggregate_where": {
        "train": [
            "what is the {fn} {n} of {t} {eq}?",
            "show the {fn} {n} of the {t} {eq}.",
            "give me the {fn} {n} for {t} {eq}",
            "calculate the {fn} {n} over all {t} {eq}.",
            "compute the {fn} {n} of {t} {eq}.",
            "I need the {fn} {n} across {t} {eq}.",
        ],
        "heldout": ["tell me the {fn} {n} of {t} {eq}.", "can you work out the {fn} {n} for the {t} {eq}?"],
    },
    "top": {
        "train": [
            "show the {a} of the {k} {t} with the highest {n}.",
            "list the {a} of the top {k} {t} by {n}.",
            "what is the {a} of the {k} {t} with the most {n}?",
            "give me the top {k} {t} by {n}, only the {a}",
            "find the {a} for the {k} {t} that rank highest in {n}.",
        ],
        "heldout": ["tell me the {a} of the {k} {t} with the largest {n}.", "get the {a} for the top {k} {t} in {n}."],
    },
    "bottom": {
        "train": [
            "show the {a} of the {k} {t} with the lowest {n}.",
            "list the {a} of the bottom {k} {t} by {n}.",
            "what is the {a} of the {k} {t} with the least {n}?",
            "give me the bottom {k} {t} by {n}, only the {a}",
            "find the {a} for the {k} {t} that rank lowest in {n}.",
        ],
        "heldout": [
            "tell me the {a} of the {k} {t} with the smallest {n}.",
            "get the {a} for the bottom {k} {t} in {n}.",
        ],
    },
    "group_count": {
        "train": [
            "how many {t} are there for each {a}?",
            "count the {t} per {a}.",
            "show the number of {t} by {a}.",
            "give me the count of {t} grouped by {a}",
            "what is the number of {t} for every {a}?",
        ],
        "heldout": ["tell me how many {t} exist per {a}.", "please count the {t} for each {a}."],
    },
    "group_aggregate": {
        "train": [
            "what is the {fn} {n} of {t} for each {a}?",
            "show the {fn} {n} of {t} per {a}.",
            "give me the {fn} {n} in {t} by {a}",
            "compute the {fn} {n} of {t} grouped by {a}.",
            "I need the {fn} {n} of the {t} for every {a}.",
        ],
        "heldout": ["tell me the {fn} {n} of {t} for each {a}.", "can you work out the {fn} {n} per {a} in {t}?"],
    },
    "distinct": {
        "train": [
            "list the distinct {a} in {t}.",
            "show the different {a} values of {t}.",
            "what are the unique {a} values in {t}?",
            "give me every distinct {a} of the {t}",
            "which different {a} occur in {t}?",
        ],
        "heldout": ["tell me the distinct {a} found in {t}.", "get the unique {a} values for {t}."],
    },
}
