"""Everyday questions answered in one or two short sentences of pirate talk."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from . import style_facts as facts
from .rows import Row, Split, keep, listed

VOICE = frozenset(
    listed(
        "arr yarr ahoy aye avast matey mateys hearty hearties landlubber landlubbers ye yer yerself shiver timbers "
        "savvy scallywag buccaneer seadog yo blimey bilge"
    )
)
MAX_WORDS = 45
RULE = (
    f"the answer has at most {MAX_WORDS} words and at least two different words of this list: "
    f"{', '.join(sorted(VOICE))}"
)

OPENERS = ["Arr,", "Arr!", "Ahoy, matey!", "Aye,", "Yarr,", "Avast!", "Shiver me timbers!", "Yo ho ho!", "Ahoy!"]
CLOSERS = [", matey.", ", matey!", ", me hearty!", ", me hearties.", ", ye landlubber!", ", savvy?", ", ye scallywag."]

_PIRATE_WORDS = {
    "you": "ye",
    "your": "yer",
    "my": "me",
    "is": "be",
    "are": "be",
    "am": "be",
    "of": "o'",
    "and": "an'",
    "friend": "matey",
    "friends": "mateys",
    "yes": "aye",
}


@dataclass(frozen=True)
class Family:
    """Questions of one kind: phrasings for each split, the plain answers, and the topics they are about."""

    questions: dict[Split, list[str]]
    answers: list[str]
    topics: dict[str, str]


FAMILIES: dict[str, Family] = {
    "capital": Family(
        {
            "train": ["What is the capital of {x}?", "Which city is the capital of {x}?", "Name the capital of {x}."],
            "heldout": [
                "Do you know the capital city of {x}?",
                "I forgot what the capital of {x} is called.",
                "In {x}, which town is the seat of the government?",
                "Quiz time: the capital of {x}?",
            ],
        },
        ["{y} is the capital of {x}", "the capital of {x} is {y}"],
        facts.CAPITALS,
    ),
    "animal": Family(
        {
            "train": ["What does a {x} do all day?", "Tell me about the {x}.", "How does a {x} live?"],
            "heldout": [
                "What can you say about a {x}?",
                "My child wants to know how the {x} lives.",
                "Give me one fact about the {x}.",
            ],
        },
        ["a {x} {y}", "the {x} {y}"],
        facts.ANIMALS,
    ),
    "job": Family(
        {
            "train": ["What does a {x} do?", "What is the work of a {x}?", "Explain the job of a {x}."],
            "heldout": [
                "My uncle is a {x}. What does he do at work?",
                "Why would I call a {x}?",
                "How does a {x} spend the working day?",
            ],
        },
        ["a {x} {y}", "the {x} is the one who {y}"],
        facts.JOBS,
    ),
    "thing": Family(
        {
            "train": ["What is a {x}?", "Define {x}.", "What does the word {x} mean?", "Explain what a {x} is."],
            "heldout": [
                "In simple words, what is a {x}?",
                "How would you describe a {x} to a child?",
                "I have never seen a {x}. What is it?",
                "Please tell me what people call a {x}.",
            ],
        },
        ["a {x} is {y}", "that is {y}"],
        facts.THINGS,
    ),
    "reason": Family(
        {
            "train": ["Why is it that {x}?", "Can you explain why {x}?", "Tell me why {x}.", "What is the reason {x}?"],
            "heldout": [
                "How come {x}?",
                "I have always wondered why {x}.",
                "My daughter asks why {x}. What should I say?",
                "For what reason do you think {x}?",
            ],
        },
        ["{x} because {y}", "that is because {y}"],
        facts.REASONS,
    ),
    "howto": Family(
        {
            "train": ["How do I {x}?", "How can I {x}?", "What is the best way to {x}?", "I want to {x}. Any tips?"],
            "heldout": [
                "Could you teach me how to {x}?",
                "What should I do to {x}?",
                "I have no idea how to {x}, please help.",
                "What is the trick to {x}?",
            ],
        },
        ["{y}", "to {x}, {y}"],
        facts.HOWTO,
    ),
    "chat": Family(
        {
            "train": ["{x}", "Hello! {x}", "{x} What now?"],
            "heldout": ["Hey there. {x}", "Hm. {x}", "{x} Any thoughts?"],
        },
        ["{y}"],
        facts.CHAT,
    ),
    "advice": Family(
        {
            "train": ["What do you suggest for {x}?", "Any ideas for {x}?", "Give me a tip for {x}."],
            "heldout": [
                "I need some advice about {x}.",
                "What would be good for {x}?",
                "Help me plan {x}.",
                "How should I go about {x}?",
            ],
        },
        ["{y}", "for {x} you should {y}"],
        facts.ADVICE,
    ),
    "color": Family(
        {
            "train": ["What color is {x}?", "Which color does {x} have?"],
            "heldout": [
                "Do you know what color {x} is?",
                "Tell me the color of {x}.",
                "If I paint {x}, which color do I need?",
                "The usual color of {x}?",
            ],
        },
        ["{x} is {y}", "the color of {x} is {y}"],
        facts.COLORS_OF,
    ),
}


def has_voice(text: str) -> bool:
    """Tell whether ``text`` follows RULE."""
    words = re.findall(r"[a-z']+", text.lower())
    return len(words) <= MAX_WORDS and len(VOICE.intersection(words)) >= 2


def pirate(plain: str, rng: random.Random) -> str:
    """Say a plain sentence (no final stop) in the pirate voice."""
    spoken = re.sub(r"[A-Za-z']+", lambda match: _PIRATE_WORDS.get(match[0], match[0]), plain)
    opener = rng.choice(OPENERS)
    if opener.endswith("!"):
        spoken = spoken[0].upper() + spoken[1:]
    return f"{opener} {spoken}{rng.choice(CLOSERS)}"


def user_message(question: str) -> str:
    """Return the message a user sends for this task: the bare question."""
    return question


def make_row(rng: random.Random, split: Split) -> Row:
    """Build one row for ``split``."""
    name = rng.choice(list(FAMILIES))
    family = FAMILIES[name]
    topic = rng.choice(keep(family.topics, split))
    template = rng.choice(family.questions[split])
    plain = rng.choice(family.answers).format(x=topic, y=family.topics[topic])
    return Row(user_message(template.format(x=topic)), pirate(plain, rng), (f"{name}: {template}",), (topic,))
