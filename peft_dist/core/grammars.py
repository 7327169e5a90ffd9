"""Which tokens may come next in a structured answer. The only module that knows the library that tells, llguidance.

The library is optional (``peft-dist[structured]``) and imported on first use. Where it holds the interpreter and for
how long was measured: making the table of a big vocabulary does, for half a second and more; reading a grammar and
computing the tokens that may come do not.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec

from peft_dist.core.errors import PeftDistError
from peft_dist.core.structured_output import StructuredOutput

T = TypeVar("T")

REMEDY = "pip install 'peft-dist[structured]'"
_LIBRARY = "llguidance"
_SILENT = 0
# The library follows references by recursion: with the usual eight megabytes three thousand of them, one into the
# other, end the process. This is address space; what is not used takes no memory.
_STACK_BYTES = 256 << 20
_stack_lock = threading.Lock()
_MOST_READ = 64
# Of a ``oneOf`` whose branches the library cannot tell apart any may be followed, as of an ``anyOf``.
_SCHEMA_DEFAULTS = {"coerce_one_of": True}
_MOST_WORDS = 400


class GrammarError(PeftDistError):
    """A structured output that cannot be followed: it is wrong, or too much; or there is nothing to follow it with."""


class GrammarLibraryError(GrammarError):
    """The library is not installed."""


class BigStackThread(ThreadPoolExecutor):
    """Threads whose stacks are large enough for whatever a ``StructuredOutput`` may hold."""

    def submit(self, work: Callable[..., T], /, *args: Any, **named: Any) -> Future[T]:
        # Threads are started in here. Those that others start at this moment have much address space, no more.
        with _stack_lock:
            before = threading.stack_size(_STACK_BYTES)
            try:
                return super().submit(work, *args, **named)
            finally:
                threading.stack_size(before)


def library() -> Any:
    """The library. Raises GrammarLibraryError when it is not installed."""
    try:
        return importlib.import_module(_LIBRARY)
    except ImportError as error:
        raise GrammarLibraryError(
            f"structured outputs need the library {_LIBRARY}, which is not installed: {REMEDY}"
        ) from error


def is_available() -> bool:
    """Whether the library is installed."""
    try:
        library()
    except GrammarLibraryError:
        return False
    return True


class _Bytes:
    """A vocabulary of the 256 bytes and some special tokens, in the form in which the library takes one."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, specials: Iterable[str], end: str) -> None:
        names = [*dict.fromkeys(specials), end]
        self.tokens = [bytes([byte]) for byte in range(256)] + [name.encode() for name in names]
        self.special_token_ids = list(range(256, len(self.tokens)))
        self.eos_token_id = len(self.tokens) - 1

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def bytes_table(specials: Iterable[str] = ()) -> Any:
    """A table by which grammars can be checked: of single bytes, made at once. ``specials``: Tokens to be named."""
    # The last name is a token that no tokenizer has.
    return library().LLTokenizer(_Bytes(specials, "<|end of the grammar|>"))


def table_of(tokenizer: Any, vocab_size: int, end_ids: Sequence[int]) -> Any:
    """The table of a model's tokens. It takes half a second for fifty thousand, for all of which the interpreter stops.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        vocab_size: Columns of the logits.
        end_ids: What ends a sequence.

    Raises:
        GrammarError: it is no fast one, or nothing ends a sequence.
    """
    made = library()
    if not is_fast(tokenizer):
        raise GrammarError(f"structured outputs need a fast tokenizer (tokenizer.json), not {type(tokenizer).__name__}")
    if not end_ids:
        raise GrammarError("structured outputs need an end-of-sequence token, which this model's configuration lacks")
    settings = msgspec.json.decode(tokenizer.backend_tokenizer.to_str())
    # The library looks at bytes of tokens, not at prompts.
    settings["padding"] = settings["truncation"] = None
    # Some have a token for padding that the model never had.
    settings["added_tokens"] = [token for token in settings["added_tokens"] if token["id"] < vocab_size]
    try:
        return made.LLTokenizer(msgspec.json.encode(settings).decode(), n_vocab=vocab_size, eos_token=list(end_ids))
    except ValueError as error:
        raise GrammarError(f"structured outputs cannot be had with this tokenizer: {_in_short(str(error))}") from error


def is_fast(tokenizer: Any) -> bool:
    """Whether a tokenizer is one that ``table_of`` takes."""
    return hasattr(getattr(tokenizer, "backend_tokenizer", None), "to_str")


def read(spec: StructuredOutput, table: Any) -> Any:
    """A matcher at the beginning of ``spec``. May take long, and should run on a ``BigStackThread``.

    Raises:
        GrammarError: ``spec`` is wrong, too much, or matches nothing.
    """
    made = library()
    limits = made.LLParserLimits(verbose_errors=False)
    try:
        matcher = made.LLMatcher(table, _grammar(made, spec), log_level=_SILENT, limits=limits)
    except ValueError as error:
        raise GrammarError(_in_short(str(error))) from error
    if not matcher.is_error():
        # Some that nothing matches are found out here.
        matcher.compute_bitmask()
    if (problem := problem_of(matcher)) is not None:
        raise problem
    return matcher


def check(spec: StructuredOutput, table: Any, most_seconds: float) -> None:
    """``read`` for nothing but its errors; takes no more of a processor than so many seconds, or raises for that."""
    began = time.thread_time()
    read(spec, table)
    seconds = time.thread_time() - began
    if seconds > most_seconds:
        raise GrammarError(f"reading it took {seconds:.1f} seconds, more than {most_seconds:g}: make it simpler")


def problem_of(matcher: Any) -> GrammarError | None:
    """Why the matcher can go on no more; None: it can."""
    if not matcher.is_error():
        return None
    problem = _in_short(matcher.get_error())
    return GrammarError("nothing matches it" if problem.startswith("NoExtension") else problem)


def _grammar(made: Any, spec: StructuredOutput) -> str:
    if spec.kind == "json_schema":
        # ``true`` is a schema too, and takes none.
        defaults = _SCHEMA_DEFAULTS if spec.text.lstrip().startswith("{") else None
        found: str = made.LLMatcher.grammar_from_json_schema(spec.text, defaults=defaults)
    elif spec.kind == "grammar":
        found = made.LLMatcher.grammar_from_lark(spec.text)
    else:
        found = made.LLMatcher.grammar_from_regex(spec.regex if spec.choice is None else _any_of(spec.choice))
    return found


def _any_of(choices: Sequence[str]) -> str:
    # As one expression they are one automaton; as rules of a grammar there may be no more than 2000.
    return "(?:" + "|".join("".join(map(_escaped, choice)) for choice in choices) + ")"


def _escaped(character: str) -> str:
    return character if character.isalnum() and character.isascii() else f"\\x{{{ord(character):x}}}"


def _in_short(problem: str) -> str:
    words = " ".join(problem.replace("<non-verbose/>", "").split())
    return words if len(words) <= _MOST_WORDS else words[:_MOST_WORDS] + "..."


class Grammars:
    """What is read for the tokens of one model, on a thread of its own.

    Args:
        load_tokenizer: Gives the Hugging Face tokenizer; None where the model has none. Called once, there.
        vocab_size, end_ids: As in ``table_of``.
    """

    def __init__(self, load_tokenizer: Callable[[], Any], vocab_size: int, end_ids: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self.end_ids = frozenset(end for end in end_ids if end < vocab_size)
        self._load = load_tokenizer
        self._thread = BigStackThread(1, "grammars")
        self._table: Future[Any] | None = None
        self._read: OrderedDict[StructuredOutput, Future[Any]] = OrderedDict()
        self._executor: Any = None

    def begin(self) -> Future[Any]:
        """Have the table made, if it is not."""
        if self._table is None:
            self._table = self._thread.submit(self._make_table)
        return self._table

    def state(self, spec: StructuredOutput, token_ids: Sequence[int]) -> GrammarState:
        """Where a sequence is that has drawn these tokens. Does not wait for the grammar."""
        reading = self._read.get(spec)
        if reading is None:
            table = self.begin()
            reading = self._read[spec] = self._thread.submit(lambda: read(spec, table.result()))
            if len(self._read) > _MOST_READ:
                self._read.popitem(last=False)
        self._read.move_to_end(spec)
        return GrammarState(reading, self.end_ids, token_ids)

    def fill(self, matchers: Sequence[Any], address: int) -> None:
        """Write what each matcher allows: bit ``t % 32`` of word ``t // 32`` is set where token ``t`` may come.

        ``address``: Of int32 ``[len(matchers), ceil(vocab_size / 32)]`` in host memory, contiguous.
        """
        num_bytes = (self.vocab_size + 31) // 32 * 4
        if len(matchers) == 1:
            matchers[0].unsafe_compute_mask_ptr(address, num_bytes)
            return
        if self._executor is None:
            self._executor = library().LLExecutor()
        rows = [(matcher, row) for row, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(rows, address, num_bytes, len(rows))

    def _make_table(self) -> Any:
        library()
        tokenizer = self._load()
        if tokenizer is None:
            raise GrammarError("structured outputs need a tokenizer, which this model lacks")
        return table_of(tokenizer, self.vocab_size, sorted(self.end_ids))


class GrammarState:
    """Where one sequence is in its grammar: a function of the grammar and the tokens that were drawn.

    Attributes:
        ended: An end of sequence was drawn; what follows, with ``ignore_eos``, is free.
    """

    def __init__(self, reading: Future[Any], end_ids: frozenset[int], token_ids: Sequence[int]) -> None:
        self.ended = False
        self._reading = reading
        self._end_ids = end_ids
        self._matcher: Any = None
        self._to_take: list[int] = []
        self.append(token_ids)

    def append(self, token_ids: Sequence[int]) -> None:
        """Note newly drawn tokens."""
        if not self.ended:
            self._to_take += token_ids
            self.ended = not self._end_ids.isdisjoint(token_ids)

    def matcher(self) -> Any:
        """The library's matcher, behind all tokens so far; for ``Grammars.fill``. Waits until the grammar is read.

        Raises:
            GrammarError: the grammar could not be read, or the matcher has failed at these tokens.
        """
        if self._matcher is None:
            problem = self._reading.exception()
            if problem is not None:
                # Whatever it was that stands in the way of its grammar, it is this sequence's alone.
                raise GrammarError(f"its structured output cannot be followed: {problem}") from problem
            self._matcher = self._reading.result().deep_copy()
        tokens, self._to_take = self._to_take, []
        if tokens:
            self._matcher.consume_tokens(tokens)
        if (problem := self.problem()) is not None:
            raise problem
        return self._matcher

    def problem(self) -> GrammarError | None:
        """Why the matcher that was asked for last can go on no more; None: it can."""
        problem = problem_of(self._matcher)
        return None if problem is None else GrammarError(f"its structured output cannot be followed further: {problem}")
