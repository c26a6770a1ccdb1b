"Clipping by norm: parity with torch, edge cases, errors."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from rnnbook.gradients import clip_grad_norm, clip_grad_norm_


def some_grads(seed, scale=1.0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    shapes = {"weight": (3, 4), "bias": (3,), "scalar": (), "empty": (0, 2)}
    return {name: np.asarray(scale * rng.standard_normal(shape), dtype=dtype) for name, shape in shapes.items()}


def parameters(grads, device="cpu"):
    tensors = [torch.nn.Parameter(torch.zeros(g.shape, dtype=torch.from_numpy(g).dtype, device=device)) for g in grads.values()]
    for tensor, g in zip(tensors, grads.values()):
        tensor.grad = torch.from_numpy(g.copy()).to(device)
    return tensors


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("max_norm", [1e-4, 0.5, 1.0, 100.0])
@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.0, math.inf])
def test_torch_parity(scale, max_norm, norm_type):
    grads = some_grads(0, scale)
    if norm_type == math.inf:
        del grads["empty"]  # torch refuses the largest entry of nothing
    ours, theirs = parameters(grads), parameters(grads)
    norm = clip_grad_norm_(ours, max_norm, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
    torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=0)
    if norm_type == 2:
        clipped, numpy_norm = clip_grad_norm(grads, max_norm)
        assert math.isclose(numpy_norm, expected.item(), rel_tol=1e-12)
        for g, b in zip(clipped.values(), theirs):
            np.testing.assert_allclose(g, b.grad.numpy(), rtol=1e-12)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-6, 1e6), max_norm=st.floats(1e-3, 1e3))
def test_properties(seed, scale, max_norm):
    grads = some_grads(seed, scale)
    before = {name: g.copy() for name, g in grads.items()}
    clipped, norm = clip_grad_norm(grads, max_norm)
    after = math.sqrt(sum((g**2).sum() for g in clipped.values()))
    assert after <= max_norm * (1 + 1e-9) and after <= norm * (1 + 1e-9)
    for name in grads:
        np.testing.assert_array_equal(grads[name], before[name])  # the argument is left alone
        np.testing.assert_allclose(clipped[name] * norm, grads[name] * after, rtol=1e-9, atol=1e-300)  # one direction
    again, _ = clip_grad_norm(clipped, max_norm)
    np.testing.assert_allclose(again["weight"], clipped["weight"], rtol=2e-6 / max_norm)  # the 1e-6 in the divisor


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_is_kept(dtype):
    clipped, norm = clip_grad_norm(some_grads(1, 10, dtype), np.float64(1.0))
    assert all(g.dtype == dtype for g in clipped.values()) and isinstance(norm, float)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, -math.inf])
def test_limits_that_make_no_sense(bad):
    with pytest.raises(ValueError, match="max_norm"):
        clip_grad_norm(some_grads(0), bad)
    tensors = parameters(some_grads(0))
    before = [p.grad.clone() for p in tensors]
    with pytest.raises(ValueError, match="max_norm"):
        clip_grad_norm_(tensors, bad)
    assert all(torch.equal(p.grad, b) for p, b in zip(tensors, before))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite(value):
    grads = some_grads(0)
    grads["bias"][1] = value
    tensors = parameters(grads)
    before = [p.grad.clone() for p in tensors]
    with pytest.raises(RuntimeError, match="gradient norm"):
        clip_grad_norm(grads, 1.0)
    with pytest.raises(RuntimeError, match="gradient norm"):
        clip_grad_norm_(tensors, 1.0)
    assert all(torch.equal(p.grad.isnan(), b.isnan()) and torch.equal(p.grad.nan_to_num(), b.nan_to_num()) for p, b in zip(tensors, before))
    theirs = parameters(grads)
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    clip_grad_norm_(tensors, 1.0, error_if_nonfinite=False)
    clipped, _ = clip_grad_norm(grads, 1.0, error_if_nonfinite=False)
    for ours, expected, g in zip(tensors, theirs, clipped.values()):
        torch.testing.assert_close(ours.grad, expected.grad, equal_nan=True)
        np.testing.assert_allclose(g, expected.grad.numpy(), equal_nan=True)


def test_an_infinite_limit_only_measures():
    grads = some_grads(0, 1e3)
    same, norm = clip_grad_norm(grads, math.inf)
    assert all(same[name] is grads[name] for name in grads) and same is not grads
    tensors = parameters(grads)
    assert math.isclose(clip_grad_norm_(tensors, math.inf).item(), norm)
    assert all(torch.equal(p.grad, torch.from_numpy(g)) for p, g in zip(tensors, grads.values()))


def test_what_parameters_may_be():
    tensor = parameters({"weight": np.array([3.0, 4.0])})[0]
    assert clip_grad_norm_(tensor, 10.0) == 5.0                                    # one tensor
    assert clip_grad_norm_((p for p in [tensor, torch.nn.Parameter(torch.ones(2))]), 10.0) == 5.0  # a generator, one without grad
    assert clip_grad_norm_([], 1.0) == 0.0 and clip_grad_norm({}, 1.0) == ({}, 0.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_parity():
    grads = some_grads(3, 10.0)
    tensors = parameters(grads, "cuda")
    norm = clip_grad_norm_(tensors, 1.0)
    clipped, expected = clip_grad_norm(grads, 1.0)
    assert math.isclose(norm.item(), expected, rel_tol=1e-10)
    for p, g in zip(tensors, clipped.values()):
        np.testing.assert_allclose(p.grad.cpu().numpy(), g, rtol=1e-10)
