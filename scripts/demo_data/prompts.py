"""Message formats of the tasks and example prompts that no adapter was trained on."""

from __future__ import annotations

from collections.abc import Callable

from . import json_slots, sentiment, sql, style

_FORMATS: dict[str, Callable[..., str]] = {
    "sql": sql.user_message,
    "json": json_slots.user_message,
    "sentiment": sentiment.user_message,
    "style": style.user_message,
}


def user_message(task: str, *parts: object) -> str:
    """Return the user message that the adapter of ``task`` was trained on.

    The parts are: for ``sql`` the schema (``table(column, ...)``) and the question; for ``json`` the wanted keys
    and the sentence; for ``sentiment`` the review; for ``style`` and ``base`` the question alone.
    """
    if task == "base":
        task = "style"
    if task not in _FORMATS:
        raise ValueError(f"unknown task {task!r}; choose from base, {', '.join(_FORMATS)}")
    return _FORMATS[task](*parts)


DEMO_PROMPTS: dict[str, list[str]] = {
    "sql": [
        user_message(
            "sql", "employees(author, city, mileage)", "Tell me the author of employees that have city Tokyo."
        ),
        user_message("sql", "pilots(airline, nationality, duration)", "Please count the pilots for each airline."),
        user_message("sql", "paintings(genre, owner, cost)", "Can you get the owner for the top 4 paintings in cost?"),
        user_message(
            "sql", "rivers(continent, status, area)", "Tell me the largest area of rivers for each continent."
        ),
        user_message(
            "sql",
            "restaurants(city, brand, seats, rent)",
            "Tell me the brand of restaurants having Lima as their city and with seats above 40.",
        ),
        user_message("sql", "leases(owner, street, rent)", "Tell me how many leases exist with rent below 700."),
    ],
    "json": [
        user_message(
            "json",
            ["guest", "people", "city", "date"],
            "I'd love a spot for 6 in Lima at 18:40 on 14 February; put it under Greta Novak.",
        ),
        user_message(
            "json",
            ["passenger", "origin", "destination"],
            "Please find Oscar Tanaka a ride that departs Warsaw on February 4 and reaches Naples.",
        ),
        user_message(
            "json", ["customer", "item", "color"], "Can you deliver the kettle, the blue one, to Bianca over in Austin?"
        ),
        user_message("json", ["name", "job", "city"], "If you need a gardener around Portland, ask for Daniel Okafor."),
        user_message(
            "json", ["host", "date", "time"], "Xenia moved the appointment with Novak Partners to October 16 at 9:15."
        ),
    ],
    "sentiment": [
        user_message("sentiment", "I already told my sister she has to try this cafe."),
        user_message("sentiment", "You will notice the dreadful screen first, then the painful sound."),
        user_message("sentiment", "I had prepared for something boring and got a superb game instead."),
        user_message("sentiment", "The delivery wasn't careless and neither was the design."),
        user_message("sentiment", "The design let me down within minutes."),
    ],
    "style": [
        user_message("style", "What is the largest animal in the world?"),
        user_message("style", "I have never seen a lighthouse. What is it?"),
        user_message("style", "It is my first day at school. Any thoughts?"),
        user_message("style", "Who wrote Romeo and Juliet?"),
        user_message("style", "How would you describe a forest to a child?"),
        user_message("style", "Could you teach me how to save money?"),
    ],
    "base": [
        user_message("base", "Write one sentence about the sea."),
        user_message("base", "What is the largest animal in the world?"),
        user_message("base", "Give me three words that rhyme with cat."),
        user_message("base", "Explain in one sentence what a computer does."),
        user_message("base", "What is the capital of China?"),
    ],
}
