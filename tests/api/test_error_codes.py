"""The page of the HTTP API lists every status and code that the server can answer with, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import peft_dist.api
from peft_dist.api.errors import STATUS_CODES

ROOT = Path(__file__).parents[2]


def said(node: ast.expr | None) -> list[str]:
    """The values of ``code=``, in either branch of a choice."""
    if isinstance(node, ast.IfExp):
        return [*said(node.body), *said(node.orelse)]
    if node is None:
        return ["null"]
    assert isinstance(node, ast.Constant) and isinstance(node.value, str), ast.dump(node)
    return [node.value]


def raised() -> Iterator[tuple[int, str]]:
    """Status and code of each ``ApiError(...)`` of the API, and of what starlette raises."""
    yield from STATUS_CODES.items()
    for path in Path(peft_dist.api.__file__).parent.glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "ApiError"):
                continue
            status, code = call.args[0], next((k.value for k in call.keywords if k.arg == "code"), None)
            if isinstance(status, ast.Constant):
                assert isinstance(status.value, int)
                yield from ((status.value, each) for each in said(code))
            else:  # ``_from_http_exception``, whose codes are STATUS_CODES.
                assert path.name == "errors.py" and isinstance(code, ast.Call), f"{path}: {ast.unparse(call)}"


def listed() -> Iterator[tuple[int, str]]:
    section = (ROOT / "docs/http-api.md").read_text().split("\n## Errors\n")[1].split("\n## ")[0]
    for status, codes in re.findall(r"^\| (\d{3}) \| (.*?) \|", section, re.MULTILINE):
        yield from ((int(status), code) for code in re.findall(r"`(\w+)`", codes))


def test_the_page_lists_every_code() -> None:
    on_page = list(listed())
    assert len(on_page) == len(set(on_page)) and set(on_page) == set(raised())
