"""Norms, gates and rotary embedding against their plain twins: in Triton's interpreter here, for real on a GPU."""

from __future__ import annotations

import pytest
import torch

from peft_dist.kernels import reference_glue as reference
from peft_dist.kernels.glue import Norm, implementation
from peft_dist.kernels.types import KVCache
from tests.kernels.device_cases import DEVICES
from tests.thorough import some_of

pytest.importorskip("triton")
glue = implementation("triton")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STYLES = {"llama": (False, True), "gemma": (True, False), "gpt_oss": (False, False)}
# The interpreter runs one program after another.
ROWS = (1, 2, 3, 7, 33, 133) if torch.cuda.is_available() else (1, 3, 17)
ROTARY_ROWS = ROWS if torch.cuda.is_available() else (1, 2, 5)
ROTARY_SHAPES = [(4, 2, 16, 16, 16), (6, 3, 20, 12, 8), (9, 1, 24, 24, 24)]
pytestmark = pytest.mark.parametrize("device", DEVICES)


def random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def columns_of(rows: int, sizes: list[int], dtype: torch.dtype, device: str, seed: int = 0) -> list[torch.Tensor]:
    """Parts of one wider tensor, as a joint projection gives them."""
    return list(random(rows, sum(sizes), dtype=dtype, device=device, seed=seed).split(sizes, dim=-1))


def assert_rounded_once(actual: torch.Tensor, exact: torch.Tensor) -> None:
    """Each element is the exact one rounded to its dtype, or a neighbour where float32 itself was rounded."""
    assert actual.shape == exact.shape and actual.isfinite().all()
    unit = torch.finfo(actual.dtype).eps * (8 if actual.dtype == torch.float32 else roundings(actual) * 0.51)
    error = (actual.double() - exact.double()).abs()
    assert (error <= unit * exact.double().abs() + 1e-5 * exact.double().abs().max()).all(), float(error.max())


def roundings(tensor: torch.Tensor) -> int:
    """How many half units one rounding takes: Triton's interpreter cuts bfloat16 off where a GPU rounds."""
    return 2 if tensor.dtype == torch.bfloat16 and not tensor.is_cuda else 1


def exact(norm: Norm) -> Norm:
    return norm._replace(weight=norm.weight.double())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_norm(device: str, rows: int, dtype: torch.dtype, style: str) -> None:
    for columns in (48, 100):
        x, _ = columns_of(rows, [columns, 8], dtype, device, rows)
        norm = Norm(random(columns, dtype=dtype, device=device, seed=1), 1e-5, *STYLES[style])
        actual, expected = glue.rms_norm(x, norm), reference.rms_norm(x, norm)
        assert actual.is_contiguous() and actual.dtype == dtype
        if norm.rounds and dtype != torch.float32:
            # Where float32 is rounded otherwise a row may be rounded the other way, and then its product.
            unit = 2.1 * torch.finfo(dtype).eps * roundings(x)
            torch.testing.assert_close(actual, expected, rtol=unit, atol=1e-6)
        else:
            assert_rounded_once(actual, reference._normed(x.double(), exact(norm)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", (1, 7, 33))
def test_sum_and_norm(device: str, rows: int, dtype: torch.dtype) -> None:
    x, residual, _ = columns_of(rows, [72, 72, 3], dtype, device, rows)
    before = x.clone(), residual.clone()
    norm = Norm(random(72, dtype=dtype, device=device, seed=1), 1e-6)
    normed, total = glue.add_rms_norm(x, residual, norm)
    if roundings(x) == 1:
        assert torch.equal(total, residual + x), "the sum is Hugging Face's, bit for bit"
    else:
        assert_rounded_once(total, residual.double() + x.double())
    unit = 2.1 * torch.finfo(dtype).eps * roundings(x)
    torch.testing.assert_close(normed, reference.rms_norm(total, norm), rtol=unit, atol=1e-6)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])
    part, _ = columns_of(rows, [72, 5], dtype, device, rows + 1)
    normed, total = glue.add_rms_norm(x, residual, norm, part)
    assert_rounded_once(total, residual.double() + x.double() + part.double())
    torch.testing.assert_close(normed, reference.rms_norm(total, norm), rtol=unit, atol=1e-6)
    exact_sum = residual.double() + x.double() + part.double()
    assert_rounded_once(reference.add_rms_norm(x, residual, norm, part)[1], exact_sum)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_gate(device: str, rows: int, dtype: torch.dtype, activation: str) -> None:
    for columns in (33, 1100):
        gate, up = columns_of(rows, [columns, columns], dtype, device, rows)
        gate *= 6
        gate[0, :2] = torch.tensor([80.0, -80.0])
        actual = glue.gated(gate, up, activation)
        assert actual.is_contiguous()
        assert_rounded_once(actual, reference.gated(gate.double(), up.double(), activation))
        parts = columns_of(rows, [columns, columns], dtype, device, rows + 1)
        actual = glue.gated(gate, up, activation, parts)
        whole = [y.double() + part.double() for y, part in zip((gate, up), parts, strict=True)]
        assert_rounded_once(actual, reference.gated(*whole, activation))
        assert_rounded_once(reference.gated(gate, up, activation, parts), reference.gated(*whole, activation))


@pytest.mark.parametrize("dtype", some_of(DTYPES))
@pytest.mark.parametrize("rows", ROTARY_ROWS)
@pytest.mark.parametrize("style", [None, *STYLES])
@pytest.mark.parametrize("adds", [False, True])
def test_rotary_and_write(
    device: str, adds: bool, style: str | None, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows take a head to a program, many several."""
    if device == "cpu":
        monkeypatch.setattr(glue, "_FEW_ROWS", 3)
    for heads, kv_heads, head_dim, value_dim, width in ROTARY_SHAPES:
        sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * value_dim]
        parts = columns_of(rows, sizes, dtype, device, rows)
        q, k, v = (
            part.view(rows, -1, width) for part, width in zip(parts, (head_dim, head_dim, value_dim), strict=True)
        )
        cos, sin = random(2, rows, width, dtype=dtype, device=device, seed=2)
        norms = [
            Norm(random(head_dim, dtype=dtype, device=device, seed=s), 1e-5, *STYLES[style]) if style else None
            for s in (3, 4)
        ]
        slots = torch.randperm(3 * rows, generator=torch.Generator().manual_seed(rows))[:rows].to(device)
        slots[::3] = -1
        # Blocks of one layer out of a pool of two, half of each block's rows another layer's: odd strides.
        pool = torch.full((2, 2, -(-3 * rows // 4), 4, kv_heads, head_dim), float("nan"), dtype=dtype, device=device)
        ours = KVCache(pool[0, 0], pool[0, 1, ..., :value_dim])
        theirs = KVCache(ours.key.clone(), ours.value.clone())
        more = [
            part.view(rows, -1, width)
            for part, width in zip(
                columns_of(rows, sizes, dtype, device, rows + 1), (head_dim, head_dim, value_dim), strict=True
            )
        ]
        parts = more if adds else None
        actual = glue.rotary_and_write(q, k, v, cos, sin, ours, slots, *norms, parts=parts)
        expected = reference.rotary_and_write(q, k, v, cos, sin, theirs, slots, *norms, parts=parts)
        assert actual.is_contiguous()
        tolerance = {"rtol": 1.01 * torch.finfo(dtype).eps * roundings(q), "atol": 2e-6, "equal_nan": True}
        torch.testing.assert_close(actual, expected, **tolerance)
        torch.testing.assert_close(ours.key, theirs.key, **tolerance)
        torch.testing.assert_close(
            ours.value, theirs.value, **tolerance if adds else {"rtol": 0, "atol": 0, "equal_nan": True}
        )
        assert pool[1].isnan().all() and pool[0, 1, ..., value_dim:].isnan().all()
        wide = [t.double() if t is not None else None for t in (q, cos, sin)]
        wide[0] = q.double() + more[0].double() if adds else q.double()
        assert_rounded_once(actual, reference._rotated(*wide, exact(norms[0]) if norms[0] else None))


def test_nothing_is_written_for_padded_rows(device: str) -> None:
    q, k, v = (random(5, heads, 8, dtype=torch.float32, device=device) for heads in (4, 2, 2))
    cos, sin = random(2, 5, 8, dtype=torch.float32, device=device)
    cache = KVCache(*torch.zeros(2, 3, 4, 2, 8, device=device))
    glue.rotary_and_write(q, k, v, cos, sin, cache, torch.full((5,), -1, device=device))
    assert not cache.key.any() and not cache.value.any()


def test_no_rows(device: str) -> None:
    """What a pass that keeps no logits gives its last norm."""
    x = torch.empty(0, 16, device=device)
    norm = Norm(torch.ones(16, device=device), 1e-5)
    outputs = glue.rms_norm(x, norm), *glue.add_rms_norm(x, x, norm), glue.gated(x, x, "silu")
    assert all(output.shape == (0, 16) for output in outputs)


def test_rows_far_apart(device: str) -> None:
    """Offsets beyond 31 bits, which a wide joint projection of a long prefill reaches."""
    if device == "cpu":
        pytest.skip("4 GiB of memory")
    x = torch.zeros(2, 2**31 + 64, dtype=torch.bfloat16, device=device)[:, :64]
    x[1] = 1.0
    norm = Norm(torch.ones(64, dtype=torch.bfloat16, device=device), 0.0)
    assert torch.equal(glue.rms_norm(x, norm)[1], norm.weight)
    assert (glue.gated(x, x, "silu")[1].float() - 0.7311).abs().max() < 0.01
