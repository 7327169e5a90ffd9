"""FlashAttention's three routes, each with a stand-in of its build that has that build's names and signatures."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

import pytest
import torch

from peft_dist.kernels import flash_libraries, reference
from peft_dist.kernels.attention_flash import FlashAttention
from peft_dist.kernels.attention_interface import AttentionNeeds, BackendUnavailableError
from tests.kernels.cases import assert_close, cache_of, fill_context, metadata

IMPORT = "from tests.kernels.flash_stand_in import attend\n"
# vllm/vllm_flash_attn/flash_attn_interface.py: lengths, block_table, all versions behind one function.
VLLM = (
    IMPORT
    + """
try:
    from . import _vllm_fa2_C
    FA2_AVAILABLE, FA2_UNAVAILABLE_REASON = True, None
except ImportError as e:
    FA2_AVAILABLE, FA2_UNAVAILABLE_REASON = False, str(e)
from . import _vllm_fa3_C
FA3_AVAILABLE, FA3_UNAVAILABLE_REASON = True, None
calls = []

def get_scheduler_metadata(batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens,
                           qkv_dtype=None, headdim_v=None, cu_seqlens_q=None, page_size=None, causal=False,
                           window_size=(-1, -1), has_softcap=False, num_splits=0, pack_gqa=None, sm_margin=0):
    calls.append(("metadata", batch_size, max_seqlen_q, max_seqlen_k, window_size, num_splits))
    return calls[-1][1:]

def flash_attn_varlen_func(q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None,
                           q_v=None, dropout_p=0.0, softmax_scale=None, causal=False, window_size=None, softcap=0.0,
                           alibi_slopes=None, block_table=None, return_softmax_lse=False, out=None,
                           scheduler_metadata=None, num_splits=0, fa_version=2, s_aux=None):
    assert causal and cu_seqlens_k is None and fa_version == 3
    assert scheduler_metadata == (len(seqused_k), max_seqlen_q, max_seqlen_k, window_size, num_splits)
    calls.append("attend")
    return attend(q, k, v, starts=cu_seqlens_q, lengths=seqused_k, blocks=block_table, scale=softmax_scale,
                  window=window_size, softcap=softcap, sinks=s_aux)
"""
)
# kernels-community/flash-attn3: only the function with a cache knows page tables, and it takes packed queries.
HUB3 = (
    IMPORT
    + """
def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None):
    raise AssertionError("knows no pages")

def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, qv=None, cache_seqlens=None, page_table=None,
                            cu_seqlens_q=None, max_seqlen_q=None, softmax_scale=None, causal=False,
                            window_size=(-1, -1), softcap=0.0, num_splits=0, return_softmax_lse=False):
    assert causal and k is None and v is None and max_seqlen_q
    return attend(q, k_cache, v_cache, starts=cu_seqlens_q, lengths=cache_seqlens, blocks=page_table,
                  scale=softmax_scale, window=window_size, softcap=softcap), "log sums"
"""
)
# FlashAttention 2 in kernels-community/flash-attn2 and vllm_flash_attn: running sums of the lengths.
VERSION2 = (
    IMPORT
    + """
def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                           block_table=None):
    assert causal and cu_seqlens_k.shape == cu_seqlens_q.shape and max_seqlen_k
    return attend(q, k, v, starts=cu_seqlens_q, lengths=cu_seqlens_k.diff(), blocks=block_table,
                  scale=softmax_scale, window=window_size, softcap=softcap)
"""
)
KERNELS = """
import importlib.util
from pathlib import Path

def get_kernel(repo_id, *, revision=None, version=None):
    assert version == 1
    file = Path(__file__).with_name(repo_id.split("/")[1].replace("-", "_") + ".py")
    if not file.exists():
        raise FileNotFoundError(f"no variant of {repo_id} for this system")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""


PACKAGES = ("vllm", "kernels", "vllm_flash_attn")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with all there is of these packages, whatever is installed."""
    find_spec = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> ModuleSpec | None:
        importlib.invalidate_caches()
        return PathFinder.find_spec(name, [str(tmp_path)]) if name in PACKAGES else find_spec(name, package)

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", find)
    for name in [*sys.modules]:
        if name.split(".")[0] in (*PACKAGES, "peft_dist_vllm_flash_attn"):
            monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in (*PACKAGES, "peft_dist_vllm_flash_attn"):
        sys.modules.pop(name, None)
    sys.modules.pop("peft_dist_vllm_flash_attn.flash_attn_interface", None)


def install(site: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


VLLM_FILES = {
    "vllm/__init__.py": "raise RuntimeError('takes seconds to import, and must not be')",
    "vllm/vllm_flash_attn/__init__.py": "from vllm.vllm_flash_attn.flash_attn_interface import *",
    "vllm/vllm_flash_attn/flash_attn_interface.py": VLLM,
    "vllm/vllm_flash_attn/_vllm_fa3_C.py": "",
}
ROUTES = {
    "vllm": (VLLM_FILES, (9, 0), 3),
    "hub, FlashAttention 3": ({"kernels/__init__.py": KERNELS, "kernels/flash_attn3.py": HUB3}, (9, 0), 3),
    "hub, FlashAttention 2": ({"kernels/__init__.py": KERNELS, "kernels/flash_attn2.py": VERSION2}, (8, 0), 2),
    "vllm_flash_attn": ({"vllm_flash_attn/__init__.py": VERSION2}, (8, 6), 2),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (None, 3.0), (1, 2.0)])
def test_each_route_attends(route: str, window: int | None, softcap: float | None, site: Path) -> None:
    files, capability, version = ROUTES[route]
    install(site, files)
    backend = FlashAttention.load(capability)
    assert f"FlashAttention {version}" in backend.description
    meta, num_blocks = metadata([(1, 30), (7, 7), (5, 21), (1, 1)], 16)
    cache = cache_of(num_blocks, 16, (2, 16), torch.bfloat16)
    fill_context(cache, meta, torch.Generator().manual_seed(0))
    query = torch.randn(14, 6, 16).bfloat16()
    options = {"scale": 0.3, "sliding_window": window, "softcap": softcap, "sinks": None}
    got = backend.paged_attention(query, cache, meta, **options)
    assert_close(got, reference.paged_attention(query, cache, meta, **options))


def test_the_schedule_is_computed_once_for_layers_of_one_shape(site: Path) -> None:
    install(site, VLLM_FILES)
    backend = FlashAttention(flash_libraries.find_library((9, 0)))
    meta, num_blocks = metadata([(1, 30), (1, 9)], 16)
    cache = cache_of(num_blocks, 16, (2, 16), torch.bfloat16)
    fill_context(cache, meta, torch.Generator().manual_seed(0))
    query, sinks = torch.randn(2, 6, 16).bfloat16(), torch.randn(6).bfloat16()
    for window in (None, 4, None, 4):
        options = {"scale": 0.3, "sliding_window": window, "softcap": None, "sinks": sinks}
        got = backend.paged_attention(query, cache, meta, **options)
        assert_close(got, reference.paged_attention(query, cache, meta, **options))
    calls = sys.modules["peft_dist_vllm_flash_attn.flash_attn_interface"].calls
    assert [call[0] for call in calls] == ["metadata", "a", "metadata", "a", "a", "a"]
    assert "vllm" not in sys.modules


@pytest.mark.parametrize(("capability", "own"), [((9, 0), False), ((8, 6), True)])
def test_decodes_alone_run_in_triton_beside_version_3(capability: tuple[int, int], own: bool, site: Path) -> None:
    pytest.importorskip("triton")
    install(site, VLLM_FILES if capability == (9, 0) else {"vllm_flash_attn/__init__.py": VERSION2})
    backend = FlashAttention.load(capability)
    assert ("decodes by triton" in backend.description) is not own
    calls: list[int] = []
    backend._num_splits = lambda query, cache, meta: calls.append(len(query)) or 0  # type: ignore[method-assign, func-returns-value]
    for lengths in ([(1, 30), (1, 9)], [(1, 30), (2, 9)]):
        meta, num_blocks = metadata(lengths, 16)
        cache = cache_of(num_blocks, 16, (2, 16), torch.bfloat16)
        fill_context(cache, meta, torch.Generator().manual_seed(0))
        query = torch.randn(sum(n for n, _ in lengths), 6, 16).bfloat16()
        options = {"scale": 0.3, "sliding_window": None, "softcap": None, "sinks": None}
        got = backend.paged_attention(query, cache, meta, **options)
        assert_close(got, reference.paged_attention(query, cache, meta, **options))
    assert calls == ([2, 3] if own else [3])


def test_earlier_routes_win_and_what_fails_is_told(site: Path) -> None:
    with pytest.raises(
        BackendUnavailableError, match=r"vllm is not installed.*kernels package.*vllm_flash_attn is not"
    ):
        flash_libraries.find_library((9, 0))
    install(site, {"vllm_flash_attn/__init__.py": VERSION2})
    assert "vllm_flash_attn" in flash_libraries.find_library((9, 0)).source
    install(site, {"kernels/__init__.py": KERNELS, "kernels/vllm_flash_attn3.py": HUB3})
    assert flash_libraries.find_library((9, 0)).source == "kernels-community/vllm-flash-attn3"
    install(site, VLLM_FILES)
    assert flash_libraries.find_library((9, 0)).source.startswith("vllm ")
    # FlashAttention 3 is for Hopper alone, and this vllm has no other.
    with pytest.raises(BackendUnavailableError, match=r"FlashAttention 2: .*_vllm_fa2_C"):
        flash_libraries.from_vllm((8, 0))
    for capability in (None, (7, 5)):
        with pytest.raises(BackendUnavailableError, match="compute capability"):
            flash_libraries.find_library(capability)


def test_a_library_that_does_not_load_is_told(site: Path) -> None:
    broken = VLLM_FILES | {"vllm/vllm_flash_attn/_vllm_fa3_C.py": "raise ImportError('undefined symbol: torch_empty')"}
    install(site, broken)
    with pytest.raises(BackendUnavailableError, match="undefined symbol"):
        flash_libraries.from_vllm((9, 0))


NEEDS = AttentionNeeds(torch.device("cuda", 0), torch.bfloat16, torch.bfloat16, 32, 8, 128, 128, 16)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, None),
        ({"head_dim": 80, "value_dim": 80, "window": True, "softcap": True}, None),
        ({"sinks": torch.bfloat16}, None),
        ({"sinks": torch.float32}, "sinks"),
        ({"sinks": torch.bfloat16, "num_heads": 128}, "up to 64"),
        ({"head_dim": 320, "value_dim": 320}, "head size 320"),
        ({"head_dim": 100, "value_dim": 100}, "multiples of 8"),
        ({"value_dim": 64}, "values 64"),
        ({"dtype": torch.float32, "cache_dtype": torch.float32}, "float32"),
        ({"cache_dtype": torch.float16}, "float16 cache"),
        ({"device": torch.device("cpu")}, "CUDA"),
        ({"block_size": 8}, None),
    ],
)
def test_it_says_what_it_does_not_take(change: dict[str, object], why: str | None, site: Path) -> None:
    install(site, VLLM_FILES)
    reason = FlashAttention.load((9, 0)).supports(NEEDS._replace(**change))
    assert (reason is None) if why is None else why in str(reason)


def test_version_2_needs_large_blocks_and_has_no_sinks(site: Path) -> None:
    install(site, {"kernels/__init__.py": KERNELS, "kernels/flash_attn2.py": VERSION2})
    backend = FlashAttention.load((8, 0))
    assert "multiples of 256" in str(backend.supports(NEEDS))
    assert backend.supports(NEEDS._replace(block_size=256)) is None
    assert "sinks" in str(backend.supports(NEEDS._replace(block_size=256, sinks=torch.bfloat16)))
