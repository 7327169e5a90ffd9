"""How the LoRA kernels are launched for a shape: block sizes, parts of a sum, warps.

A table measured on this kind of card is asked first (``tuned/*.json`` beside this file, then the user's folder, which
wins; ``peft-dist tune`` writes one), for the nearest shape that it has. Else plans follow from the shape.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "PEFT_DIST_TUNED"
# Six small or two large ones for each of an H100's or H200's 132 processors.
_DECODE_PROGRAMS, _PREFILL_PROGRAMS = 792, 264
# Every block of outputs adds the parts up again: for long tiles more of them would be more to read than the outputs.
_DECODE_PARTS, _PREFILL_PARTS = 16, 4
# Expands of a decode step: one on each multiprocessor of an H100, wide ones rather than more.
_DECODE_EXPANDS = 132
# Of expands that loop: three of their programs fit a multiprocessor, and fewer than so many for each tile are slow.
_LOOP_PROGRAMS, _FEWEST_LOOPS = 396, 12
_LOOP_PART, _PREFILL_LOOP = 128, 1024
# Cards with the shared memory for prefills to have as much in work: an H100 is a fifth faster in the gate with it.
_MUCH_SHARED = re.compile(r"\bG?H[12]00\b")
# With fewer tiles, programs of one block already run all at once.
_LOOP_TILES = 4
# What tiles of more than 16 rows are counted as, whatever their number, and the most that others are.
_LONG_TILES, _MOST_TILES = 16, 256
# Ranks that shrinks and expands have in work at once, unless an adapter is known to have more; and the most that an
# expand has, whose intermediates stay in registers.
RANKS, MOST_RANKS = 16, 128
# Of these an expand that loops has a block less under way.
_MANY_RANKS, _MANY_STAGES = 128, 3
# Of shrinks whose ranks are shared out: parts of a sum, which are as many programs again as _DECODE_PARTS, and blocks
# of inputs of a program, where more would be a long way for an adapter of few ranks.
_RANK_SUMS, _MOST_CHUNKS = 8, 8
# The most programs whose work one of them takes in a tile of fewer ranks.
_MOST_SHARES = 4
# In octaves, summed over tiles, K and N: beyond that a measured shape says nothing.
_FARTHEST = 4.0


class GroupShape(NamedTuple):
    """What a plan is chosen by.

    Attributes:
        tile_rows, max_tiles: Of the ``LoRATiles``; the latter as ``tile_count`` gives it.
        in_features: K of all layers of the group.
        out_features: N of each.
        ranks: What ``rank_room`` says of the highest rank; of tiles of 16 rows alone.
    """

    tile_rows: int
    max_tiles: int
    in_features: int
    out_features: tuple[int, ...]
    ranks: int = RANKS


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """Launch parameters of a shrink and its expand.

    Attributes:
        split: Parts of the inputs, each summed by a program of its own.
        block_k, block_n: Inputs and outputs that a program has in work at once; powers of two from 16.
        part_n: The same of outputs of a tile of more than ``few_rows`` rows, where that should be less; it divides
            ``block_n``.
        few_rows: Rows of the longest tile that is expanded row by row instead of by a product of matrices.
        shrink_r: Likewise ranks, in the shrink. An adapter of a lower rank computes with zeros, but reads none.
        gate_n, gate_part_n, gate_warps: ``block_n``, ``part_n`` and warps of the expand that is fused with a gated
            activation, which has two layers' outputs in work.
        loop_n, gate_loop_n: Outputs of a program that goes through them in blocks whose loads are pipelined
            (``lora_expand_loop``), twice ``loop_part`` or a multiple of that; 0: programs of one block, as above.
        loop_part, loop_stages: Outputs of such a block, half of which a gate takes of its two layers, and how many
            are under way.
        ranks: Ranks that a program which loops has in work at once, in tiles of more than 16. In those of more than
            this it adds the intermediates up again for each block of outputs, which are not pipelined.
        rank_parts: Programs that share the ranks of a tile out in the shrink, ``shrink_r`` at a time.
        loop_shares, gate_loop_shares: Times as many outputs that a program which loops takes, of tiles of so many times
            fewer ranks than ``ranks``: 1, 2 or 4.
        pdl: The expand starts while the shrink still runs, and reads what does not depend on it (programmatic dependent
            launch, from sm_90 on). Both have to be queued one after the other on one stream.
    """

    block_k: int
    split: int
    block_n: int
    part_n: int = 64
    few_rows: int = 8
    shrink_r: int = 16
    shrink_warps: int = 4
    shrink_stages: int = 3
    expand_warps: int = 4
    gate_n: int = 64
    gate_part_n: int = 64
    gate_warps: int = 4
    loop_n: int = 0
    gate_loop_n: int = 0
    loop_part: int = _LOOP_PART
    loop_stages: int = 4
    ranks: int = RANKS
    rank_parts: int = 1
    loop_shares: int = 1
    gate_loop_shares: int = 1
    pdl: bool = False

    def in_float32(self) -> GroupPlan:
        """For products in float32, whose operands do not fit into registers otherwise."""
        return replace(
            self,
            block_k=min(self.block_k, 64),
            block_n=min(self.block_n, 32),
            gate_n=min(self.gate_n, 32),
            shrink_r=16,
            shrink_warps=8,
            expand_warps=8,
            gate_warps=8,
            loop_n=0,
            gate_loop_n=0,
            ranks=RANKS,
            # In a pipeline such products are slower, and as TF32 were miscompiled for sm_90.
            shrink_stages=1,
        )


def tile_count(max_tiles: int, tile_rows: int) -> int:
    """What ``max_tiles`` is in a shape: the least power of four that is not below it, up to 256.

    Long tiles count as 16: only steps that are not captured have them, in any number, and what those launch has to be
    compiled by then (``runner.warm_up``). More parts of a sum than many tiles need are a small share of what they read.
    """
    if tile_rows > 16:
        return _LONG_TILES
    return min(1 << (max(max_tiles - 1, 0).bit_length() + 1) // 2 * 2, _MOST_TILES)


def rank_room(rank: int) -> int:
    """Ranks that launches of decode steps are made for where no adapter has more than ``rank``: 16, 32, 64 or 128.

    Higher ranks are computed as well, by more turns of the same programs.
    """
    return min(max(RANKS, 1 << (rank - 1).bit_length()), MOST_RANKS)


def default_plan(shape: GroupShape, *, much_shared: bool = False) -> GroupPlan:
    """From the shape alone: as many programs as the card runs at once, and loads of 512 bytes a row at decode.

    ``much_shared``: the card has as much shared memory as an H100.

    A decode step has one row in most tiles, or few tiles: then partial sums are few however many parts there are.
    """
    plan = _plan_of_few_ranks(shape, much_shared)
    return _with_ranks(plan, shape) if shape.ranks > RANKS and shape.tile_rows == 16 else plan


def _with_ranks(plan: GroupPlan, shape: GroupShape) -> GroupPlan:
    """What goes by ranks in a decode step: every program's bytes stay about those of a step of low ranks.

    Programs that share the ranks of a shrink out need fewer parts of the inputs, so that an expand has less to add up;
    and each goes through several blocks of inputs, the next of which are on their way. Expands have all ranks in work,
    so that their outputs are one pipeline and their intermediates are added up once.
    """
    max_tiles, rank_parts = max(1, shape.max_tiles // 2), shape.ranks // RANKS
    chunks = -(-shape.in_features // plan.block_k)
    programs = max_tiles * len(shape.out_features) * rank_parts
    fewest = -(-chunks // _RANK_SUMS)
    chunks_each = max(fewest, min(round(chunks * programs / _DECODE_PROGRAMS), _MOST_CHUNKS))
    # Of the same length, where there is such a number.
    chunks_each = next((n for n in range(chunks_each, fewest - 1, -1) if chunks % n == 0), chunks_each)
    plan = replace(
        plan,
        split=-(-chunks // chunks_each),
        rank_parts=rank_parts,
        ranks=shape.ranks,
        loop_stages=_MANY_STAGES if shape.ranks >= _MANY_RANKS else plan.loop_stages,
    )
    outputs = sum(shape.out_features), shape.out_features[0]
    (loop_n, shares), (gate_loop_n, gate_shares) = (_loop_of_ranks(n, max_tiles, shape.ranks) for n in outputs)
    return replace(plan, loop_n=loop_n, loop_shares=shares, gate_loop_n=gate_loop_n, gate_loop_shares=gate_shares)


def _loop_of_ranks(outputs: int, max_tiles: int, ranks: int) -> tuple[int, int]:
    """(outputs of each program that loops, times as many of tiles of few ranks): of 32 ranks as many as of 16."""
    step = 2 * _LOOP_PART
    of_few = _loop_of(outputs, max_tiles)
    each = max(of_few * 2 * RANKS // ranks // step, 1) * step
    return each, min(1 << (of_few // each).bit_length() - 1, _MOST_SHARES)


def _plan_of_few_ranks(shape: GroupShape, much_shared: bool) -> GroupPlan:
    is_decode = shape.tile_rows == 16
    # What a shape counts is up to four times what is there.
    max_tiles = max(1, shape.max_tiles // 2)
    loops = shape.max_tiles >= _LOOP_TILES
    wanted, most = (_DECODE_PROGRAMS, _DECODE_PARTS) if is_decode else (_PREFILL_PROGRAMS, _PREFILL_PARTS)
    block_k = 256 if is_decode else 128 if shape.tile_rows < 128 else 64
    block_k = min(block_k, _power_of_two(shape.in_features))
    chunks = -(-shape.in_features // block_k)
    programs = max_tiles * len(shape.out_features)
    chunks_each = max(1, round(chunks * programs / wanted), -(-chunks // most))
    split = -(-chunks // chunks_each)
    # Wider blocks add up fewer partial sums again, as long as there are enough of them.
    block_n = (
        _widest(shape, max_tiles, 1024, _DECODE_EXPANDS)
        if is_decode
        else _widest(shape, max_tiles, 128, 2 * _PREFILL_PROGRAMS)
    )
    part_n = min(block_n, 256) if is_decode else block_n
    warps = 8 if shape.tile_rows == 128 else 4
    # A long tile's inputs are too many to be read again for every 16 ranks.
    shrink_r = min(64, shape.tile_rows)
    plan = GroupPlan(
        block_k,
        split,
        block_n,
        part_n,
        shrink_r=shrink_r,
        # Two load 16 bytes a thread and row as well, and twice as many programs fit.
        shrink_warps=2 if is_decode and max_tiles >= 8 else warps,
        expand_warps=warps,
        gate_n=max(16, block_n // 2),
        gate_part_n=max(16, part_n // 2),
        gate_warps=warps,
    )
    return replace(plan, **_loops(shape, max_tiles, much_shared)) if loops else plan


def _loops(shape: GroupShape, max_tiles: int, much_shared: bool) -> dict[str, int]:
    """Fields of expands that loop. Long tiles have enough programs; what counts is how much is under way in each."""
    if shape.tile_rows == 16:
        outputs = sum(shape.out_features), shape.out_features[0]
        return {"loop_n": _loop_of(outputs[0], max_tiles), "gate_loop_n": _loop_of(outputs[1], max_tiles)}
    part = _LOOP_PART if much_shared else _LOOP_PART // 2
    return {"loop_n": _PREFILL_LOOP, "gate_loop_n": _PREFILL_LOOP, "loop_stages": 3, "loop_part": part}


def _loop_of(outputs: int, max_tiles: int) -> int:
    """Outputs of each program that loops, so that the programs of full tiles just fit the card."""
    step = 2 * _LOOP_PART
    each = outputs / max(_LOOP_PROGRAMS / max_tiles, _FEWEST_LOOPS)
    return step * max(1, round(each / step))


def _widest(shape: GroupShape, max_tiles: int, most: int, programs: int) -> int:
    """The widest blocks of outputs of which there are still so many."""
    width = 64
    while width < most and sum(shape.out_features) * max_tiles > 2 * width * programs:
        width *= 2
    return min(width, _power_of_two(max(shape.out_features)))


@lru_cache(maxsize=4096)
def plan_for(shape: GroupShape, device_name: str, wide: bool = False) -> GroupPlan:
    """The plan of a shape on this card; ``wide``: its products are in float32. The split does not depend on that."""
    plan = _find_plan(shape, tables_of(device_name), _MUCH_SHARED.search(device_name) is not None)
    return plan.in_float32() if wide else plan


def _find_plan(shape: GroupShape, table: Sequence[tuple[GroupShape, GroupPlan]], much_shared: bool) -> GroupPlan:
    best = min(table, key=lambda entry: _distance(shape, entry[0]), default=None)
    if best is None or _distance(shape, best[0]) > _FARTHEST:
        return default_plan(shape, much_shared=much_shared)
    return fit_plan(best[1], shape)


def fit_plan(plan: GroupPlan, shape: GroupShape) -> GroupPlan:
    """A plan that was made for a similar shape, with no part of the inputs left empty."""
    block_k = min(plan.block_k, _power_of_two(shape.in_features))
    widest = _power_of_two(max(shape.out_features))
    block_n, gate_n = min(plan.block_n, widest), min(plan.gate_n, widest)
    chunks = -(-shape.in_features // block_k)
    chunks_each = -(-chunks // min(plan.split, chunks))
    return replace(plan, block_k=block_k, block_n=block_n, gate_n=gate_n, split=-(-chunks // chunks_each))


def _distance(a: GroupShape, b: GroupShape) -> float:
    if (a.tile_rows, len(a.out_features), a.ranks) != (b.tile_rows, len(b.out_features), b.ranks):
        return math.inf
    pairs = ((a[1], b[1]), (a[2], b[2]), (sum(a[3]), sum(b[3])))
    return sum(abs(math.log2(max(p, 1) / max(q, 1))) for p, q in pairs)


def _power_of_two(size: int) -> int:
    """The least from 16 on that is not below ``size``."""
    return max(16, 1 << (size - 1).bit_length())


# Tables


def table_name(device_name: str) -> str:
    """File name of a card's table: ``NVIDIA H200`` has ``nvidia-h200.json``."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json"


def user_folder() -> Path:
    """Where ``peft-dist tune`` writes: $PEFT_DIST_TUNED, else ``tuned`` in the cache folder."""
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named)
    cache = os.environ.get("PEFT_DIST_CACHE")
    base = Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_dist"
    return base / "tuned"


@lru_cache(maxsize=8)
def tables_of(device_name: str) -> tuple[tuple[GroupShape, GroupPlan], ...]:
    """Measured plans of a card, by shape; of two for one shape the user's. Files that cannot be read are left out."""
    found: dict[GroupShape, GroupPlan] = {}
    for folder in (Path(__file__).parent / "tuned", user_folder()):
        path = folder / table_name(device_name)
        if not path.is_file():
            continue
        try:
            found.update(read_table(path))
        except (ValueError, TypeError, LookupError, OSError) as error:
            logger.warning("the table of LoRA plans %s is left out: %s", path, error)
        else:
            logger.info("LoRA kernels on %s: plans from %s", device_name, path)
    return tuple(found.items())


def read_table(path: Path) -> dict[GroupShape, GroupPlan]:
    """Inverse of ``write_table``."""
    entries: Iterable[Mapping[str, Any]] = json.loads(path.read_text())["lora"]
    return {_shape_of(*entry["shape"]): GroupPlan(**entry["plan"]) for entry in entries}


def _shape_of(tile_rows: int, max_tiles: int, in_features: int, out_features: Sequence[int], *ranks: int) -> GroupShape:
    """Tables from before plans went by ranks say none."""
    return GroupShape(tile_rows, max_tiles, in_features, tuple(out_features), *ranks)


def write_table(path: Path, plans: Sequence[tuple[GroupShape, GroupPlan]], about: Mapping[str, Any]) -> None:
    """Write measured plans as JSON, with what they were measured on."""
    entries = [{"shape": [*shape[:3], list(shape[3]), shape.ranks], "plan": asdict(plan)} for shape, plan in plans]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(entry) for entry in entries)
    path.write_text(f'{{"about": {json.dumps(dict(about))},\n "lora": [\n  {lines}\n]}}\n')
