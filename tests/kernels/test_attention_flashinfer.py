"""FlashInfer's back end with a stand-in of the package that has its classes and signatures."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import torch

from peft_dist.kernels import reference
from peft_dist.kernels.attention_flashinfer import FlashInferAttention
from peft_dist.kernels.attention_interface import AttentionNeeds, BackendUnavailableError
from tests.kernels.cases import assert_close, cache_of, fill_context, metadata

PACKAGE = """
import torch
from tests.kernels.flash_stand_in import attend
__version__ = "0.7.2"
plans = []

class BatchPrefillWithPagedKVCacheWrapper:
    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False):
        assert kv_layout == "NHD" and float_workspace_buffer.dtype == torch.uint8

    def plan(self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
             head_dim_qk, page_size, head_dim_vo=None, custom_mask=None, causal=False, sm_scale=None, window_left=-1,
             logits_soft_cap=None, q_data_type="float16", kv_data_type=None):
        assert causal and qo_indptr.dtype == paged_kv_indices.dtype == paged_kv_last_page_len.dtype == torch.int32
        pages = paged_kv_indptr.diff()
        self.lengths = (pages - 1) * page_size + paged_kv_last_page_len
        self.blocks = torch.zeros(len(pages), int(pages.max()), dtype=torch.int32)
        for s, n in enumerate(pages.tolist()):
            self.blocks[s, :n] = paged_kv_indices[paged_kv_indptr[s] : paged_kv_indptr[s + 1]]
        self.starts, self.heads = qo_indptr, (num_qo_heads, num_kv_heads, head_dim_qk, q_data_type, kv_data_type)
        self.options = {"scale": sm_scale, "window": (window_left, 0), "softcap": logits_soft_cap}
        plans.append(self)

    def run(self, q, paged_kv_cache):
        k, v = paged_kv_cache
        assert self.heads == (q.shape[1], k.shape[2], k.shape[3], q.dtype, k.dtype)
        return attend(q, k, v, starts=self.starts, lengths=self.lengths.int(), blocks=self.blocks, **self.options)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FlashInferAttention:
    (tmp_path / "flashinfer.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flashinfer", raising=False)
    return FlashInferAttention.load((9, 0))


def test_it_attends_and_plans_once_for_layers_of_one_kind(module: FlashInferAttention) -> None:
    assert module.description == "flashinfer 0.7.2" and not module.graph_capturable
    for seed in (0, 1):
        meta, num_blocks = metadata([(1, 30), (7, 7), (5, 21), (1, 16)], 16, seed)
        cache = cache_of(num_blocks, 16, (2, 64), torch.bfloat16)
        fill_context(cache, meta, torch.Generator().manual_seed(seed))
        query = torch.randn(14, 6, 64).bfloat16()
        for window, softcap in ((None, None), (5, None), (None, None), (1, 2.0), (5, None)):
            options = {"scale": 0.3, "sliding_window": window, "softcap": softcap, "sinks": None}
            got = module.paged_attention(query, cache, meta, **options)
            assert_close(got, reference.paged_attention(query, cache, meta, **options))
    assert len(sys.modules["flashinfer"].plans) == 6
    assert len({id(wrapper) for wrapper in sys.modules["flashinfer"].plans}) == 3


NEEDS = AttentionNeeds(torch.device("cuda", 0), torch.bfloat16, torch.bfloat16, 32, 8, 128, 128, 16)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"window": True, "softcap": True}, None),
        ({"sinks": torch.bfloat16}, "sinks"),
        ({"head_dim": 80, "value_dim": 80}, "head size 80"),
        ({"dtype": torch.float32, "cache_dtype": torch.float32}, "float32"),
        ({"device": torch.device("cpu")}, "CUDA"),
    ],
)
def test_it_says_what_it_does_not_take(change: dict[str, object], why: str | None, module: FlashInferAttention) -> None:
    reason = module.supports(NEEDS._replace(**change))
    assert (reason is None) if why is None else why in str(reason)


def test_what_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendUnavailableError, match="compute capability"):
        FlashInferAttention.load((7, 5))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    with pytest.raises(BackendUnavailableError, match="flashinfer is not installed"):
        FlashInferAttention.load((9, 0))
    (tmp_path / "flashinfer.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flashinfer", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(BackendUnavailableError, match="undefined symbol"):
        FlashInferAttention.load((9, 0))
