"""What a module's code does, told by its source: the same code under another name is the same form."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from peft_dist.patches.registry import Patch, SourceNotFoundError, source_of


@functools.cache
def form_of(name: str) -> str:
    """Source of the function ``module:qualified.name`` without its name, docstring, annotations and comments.

    Defaults and decorators are left out too: whoever compares forms passes every argument, and has ``unwrapped``.

    Raises:
        SourceNotFoundError: there is no such module or function.
    """
    function = ast.parse(source_of(name)).body[0]
    if not isinstance(function, ast.FunctionDef):
        raise SourceNotFoundError(f"{name} is no function")
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    parameters = sorted(argument.arg for argument in named)
    extra = [argument.arg for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
    statements = function.body
    if isinstance(statements[0], ast.Expr) and isinstance(statements[0].value, ast.Constant):
        statements = statements[1:]
    return "\n".join([str(parameters), str(extra), *map(ast.unparse, statements)])


def name_of(function: Callable[..., Any]) -> str:
    """``module:qualified.name`` of a function below its decorators."""
    function = inspect.unwrap(function)
    return f"{getattr(function, '__module__', None)}:{getattr(function, '__qualname__', None)}"


def is_known(patch: Patch) -> bool:
    """Whether the installed code that a patch stands on is one that was reviewed."""
    try:
        return patch.fingerprint() in patch.fingerprints.values()
    except (SourceNotFoundError, ModuleNotFoundError):
        return False


def matches(function: Callable[..., Any] | None, reference: str) -> bool:
    """Whether a function's source is that of ``reference`` but for what ``form_of`` leaves out."""
    if function is None:
        return False
    try:
        return form_of(name_of(function)) == form_of(reference)
    except (SourceNotFoundError, ModuleNotFoundError, ValueError, SyntaxError, OSError):
        # Made at run time, or in a module that cannot be found again: not known.
        return False


def method_matches(module: nn.Module, reference: str, method: str = "forward") -> bool:
    """Whether a module's method has this form, and nothing has been put over it on the instance."""
    return method not in module.__dict__ and matches(getattr(type(module), method, None), reference)


def global_matches(module: nn.Module, name: str, reference: str) -> bool:
    """Whether what ``name`` means in the file of a module's forward has this form."""
    function = inspect.unwrap(type(module).forward)
    return matches(getattr(function, "__globals__", {}).get(name), reference)
