"""Packed linears give the answers of the plain ones and leave no trace."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peft_dist.forward_context import ForwardContext
from peft_dist.patches.packed_linear import PackedLinear, pack_linear, pack_linears, repack, unpack_linear

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}


def pair(dtype: torch.dtype, sizes: tuple[int, int] = (48, 40), bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    """(packed, plain) with equal weights; skips where this torch build packs nothing of this type."""
    plain = nn.Linear(*sizes, bias=bias).to(dtype)
    packed = copy.deepcopy(plain)
    if not pack_linear(packed):
        pytest.skip(f"torch does not pack {dtype} here")
    assert type(packed) is PackedLinear
    return packed, plain


def assert_same(packed: nn.Module, plain: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        got, expected = packed(x), plain(x)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    scale = expected.float().abs().max().item() if expected.numel() else 1.0
    assert torch.allclose(got.float(), expected.float(), rtol=0, atol=TOLERANCE[x.dtype] * max(scale, 1.0))


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(deadline=None, max_examples=40)
@given(
    sizes=st.sampled_from([(1, 1), (7, 3), (64, 64), (576, 192), (100, 257)]),
    shape=st.sampled_from([(), (0,), (1,), (2,), (3, 5), (1, 16), (1, 255), (256,), (257,), (2, 3, 4), (1000,)]),
    bias=st.booleans(),
)
def test_answers_are_the_same(dtype: torch.dtype, sizes: tuple[int, int], shape: tuple[int, ...], bias: bool) -> None:
    packed, plain = pair(dtype, sizes, bias)
    assert_same(packed, plain, torch.randn(*shape, sizes[0]).to(dtype))
    assert_same(packed, plain, torch.randn(sizes[0], 6).to(dtype).T)
    with torch.inference_mode():
        x = torch.randn(4, sizes[0]).to(dtype)
        assert packed(x).is_inference() and packed(x).shape == (4, sizes[1])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("at_pack", "at_use"), [(1, 2), (2, 1), (2, 4), (4, 1)])
def test_the_number_of_threads_may_change(dtype: torch.dtype, at_pack: int, at_use: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(at_pack)
        packed, plain = pair(dtype, (300, 500))
        torch.set_num_threads(at_use)
        for rows in (1, 5, 16, 100):
            assert_same(packed, plain, torch.randn(rows, 300).to(dtype))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_changed_weight_is_seen(dtype: torch.dtype) -> None:
    packed, plain = pair(dtype)
    x = torch.randn(5, 48).to(dtype)
    for layer in (packed, plain):
        with torch.no_grad():
            layer.weight.mul_(3)
    assert_same(packed, plain, x)
    state = {name: value + 1 for name, value in plain.state_dict().items()}
    for layer in (packed, plain):
        layer.load_state_dict(state)
    assert_same(packed, plain, x)
    new = nn.Parameter(torch.randn(40, 48).to(dtype))
    packed.weight = plain.weight = new
    assert_same(packed, plain, x)
    new.data.mul_(-1)
    repack(packed)
    assert_same(packed, plain, x)


def test_a_converted_or_moved_module_goes_on() -> None:
    packed, plain = pair(torch.float32)
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        packed.to(dtype)
        plain.to(dtype)
        TOLERANCE.setdefault(torch.float64, 1e-12)
        assert_same(packed, plain, torch.randn(5, 48).to(dtype))
    packed.to("meta")
    assert packed(torch.empty(3, 48, device="meta")).shape == (3, 40)


def test_wrong_inputs_raise_as_in_a_plain_linear() -> None:
    packed, plain = pair(torch.float32)
    for bad in (torch.randn(3, 47), torch.randn(3, 48).double()):
        with torch.no_grad(), pytest.raises(RuntimeError) as expected:
            plain(bad)
        with torch.no_grad(), pytest.raises(RuntimeError) as got:
            packed(bad)
        assert str(got.value) == str(expected.value)


def test_training_is_that_of_a_plain_linear() -> None:
    packed, plain = pair(torch.float32)
    x = torch.randn(5, 48)
    losses = []
    for layer in (packed, plain):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = layer(x).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    assert_same(packed, plain, x)


def test_unpacking_restores_the_identical_state() -> None:
    layer = nn.Linear(8, 8)
    before = dict(vars(layer))
    parameters = [id(p) for p in layer.parameters()]
    if not pack_linear(layer):
        pytest.skip("torch packs nothing here")
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert pack_linear(layer), "packing twice is packing"
    unpack_linear(layer)
    unpack_linear(layer)
    assert type(layer) is nn.Linear and vars(layer).keys() == before.keys()
    assert all(vars(layer)[name] is value for name, value in before.items())
    assert [id(p) for p in layer.parameters()] == parameters


def test_copies_and_pickles_work() -> None:
    packed, plain = pair(torch.float32)
    x = torch.randn(5, 48)
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert type(twin) is PackedLinear and twin.weight is not packed.weight
        assert_same(twin, plain, x)
        with torch.no_grad():
            twin.weight.zero_()
        assert_same(packed, plain, x)


def test_a_tied_weight_stays_tied() -> None:
    embedding = nn.Embedding(40, 48)
    head = nn.Linear(48, 40, bias=False)
    head.weight = embedding.weight
    if not pack_linear(head):
        pytest.skip("torch packs nothing here")
    assert head.weight is embedding.weight
    with torch.no_grad():
        embedding.weight.add_(1)
        x = torch.randn(3, 48)
        assert torch.allclose(head(x), x @ embedding.weight.T, atol=1e-4)


class OtherLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    "module", [OtherLinear(4, 4), nn.Conv1d(4, 4, 1), nn.Linear(4, 4).double(), nn.Linear(4, 4, device="meta")]
)
def test_other_modules_are_left_alone(module: nn.Module) -> None:
    kind = type(module)
    assert not pack_linear(module)
    assert type(module) is kind


def test_a_build_without_the_library_leaves_modules_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not pack_linear(nn.Linear(4, 4))
    assert not pack_linear(nn.Linear(4, 4).bfloat16())


def group(dtype: torch.dtype, biases: tuple[bool, ...]) -> tuple[list[nn.Linear], list[nn.Linear]]:
    """(packed as one, plain) layers that read 48 features."""
    plain = [nn.Linear(48, 16 + 24 * i, bias=bias).to(dtype) for i, bias in enumerate(biases)]
    packed = copy.deepcopy(plain)
    if not pack_linears(packed):
        pytest.skip(f"torch does not pack {dtype} here")
    return packed, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biases", [(False, False, False), (True, True, True), (True, False)])
@pytest.mark.parametrize("rows", [1, 16, 300])
def test_layers_packed_as_one_are_multiplied_once(dtype: torch.dtype, biases: tuple[bool, ...], rows: int) -> None:
    packed, plain = group(dtype, biases)
    x = torch.randn(1, rows, 48).to(dtype)
    with torch.inference_mode(), ForwardContext() as context:
        for layer, twin in zip(packed, plain, strict=True):
            assert_same(layer, twin, x)
        assert not context.shared, "outputs that nobody will take are kept"
        first = packed[0](x)
        assert len(context.shared) == 1
        rest = [layer(x) for layer in packed[1:]]
        assert all(y.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for y in rest)


def test_layers_packed_as_one_may_be_called_otherwise() -> None:
    packed, plain = group(torch.float32, (True, False, True))
    a, b = torch.randn(3, 48), torch.randn(5, 48)
    with torch.no_grad(), ForwardContext():
        for index, x in ((0, a), (1, b), (1, b), (0, a), (2, a), (2, a), (1, a)):
            assert_same(packed[index], plain[index], x)
    for layer, twin in zip(packed, plain, strict=True):
        assert_same(layer, twin, a)
    assert_same(copy.deepcopy(packed[1]), plain[1], a)
    packed[2].weight.data.mul_(2)
    plain[2].weight.data.mul_(2)
    repack(packed[2])
    with ForwardContext():
        assert_same(packed[2], plain[2], b)
    unpack_linear(packed[0])
    with ForwardContext():
        assert_same(packed[0], plain[0], a)
        assert_same(packed[1], plain[1], a)


def test_layers_that_do_not_match_are_not_packed_as_one() -> None:
    for other in (nn.Linear(8, 4), nn.Linear(4, 4).bfloat16(), nn.Embedding(4, 4)):
        one = nn.Linear(4, 4)
        assert not pack_linears([one, other])
        assert type(one) is nn.Linear
