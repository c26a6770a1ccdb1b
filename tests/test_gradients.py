"Clipping by norm and by value: parity with torch, trajectories, edge cases, errors. The temporal-order task."
import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from rnnbook.bptt import rnn_backward
from rnnbook.gradients import clip_grad_norm, clip_grad_norm_, clip_grad_value, clip_grad_value_, temporal_order
from rnnbook.rnn import rnn_forward

THEIRS = torch.nn.utils
LIMITS = [1e-4, 0.5, 1.0, 100.0]
SCALES = [1e-8, 1e-3, 1.0, 1e6]


def some_grads(seed, scale=1.0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    shapes = {"weight": (3, 4), "bias": (3,), "scalar": (), "empty": (0, 2)}
    return {name: np.asarray(scale * rng.standard_normal(shape), dtype=dtype) for name, shape in shapes.items()}


def parameters(grads, device="cpu"):
    tensors = [torch.nn.Parameter(torch.zeros(g.shape, dtype=torch.from_numpy(g).dtype, device=device)) for g in grads.values()]
    for tensor, g in zip(tensors, grads.values()):
        tensor.grad = torch.from_numpy(g.copy()).to(device)
    return tensors


def same(tensors, before):
    return all(torch.equal(p.grad.isnan(), b.isnan()) and torch.equal(p.grad.nan_to_num(), b.nan_to_num()) for p, b in zip(tensors, before))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("max_norm", LIMITS)
@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.0, math.inf, "inf"])
def test_torch_parity(scale, max_norm, norm_type):
    grads = some_grads(0, scale)
    if norm_type in (math.inf, "inf"):
        del grads["empty"]  # torch refuses the largest entry of nothing
    ours, theirs = parameters(grads), parameters(grads)
    norm = clip_grad_norm_(ours, max_norm, norm_type)
    expected = THEIRS.clip_grad_norm_(theirs, max_norm, norm_type)
    torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=0)
    if norm_type == 2:
        clipped, numpy_norm = clip_grad_norm(grads, max_norm)
        assert math.isclose(numpy_norm, expected.item(), rel_tol=1e-12)
        for g, b in zip(clipped.values(), theirs):
            np.testing.assert_allclose(g, b.grad.numpy(), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("clip_value", LIMITS)
def test_torch_parity_by_value(scale, clip_value, dtype):
    grads = some_grads(1, scale, dtype)
    ours, theirs = parameters(grads), parameters(grads)
    assert clip_grad_value_(ours, clip_value) is None
    THEIRS.clip_grad_value_(theirs, clip_value)
    for a, b, g in zip(ours, theirs, clip_grad_value(grads, clip_value).values()):
        assert torch.equal(a.grad, b.grad) and g.dtype == dtype
        np.testing.assert_array_equal(g, b.grad.numpy())


def test_signatures_are_torchs():
    for ours, theirs in ((clip_grad_norm_, THEIRS.clip_grad_norm_), (clip_grad_value_, THEIRS.clip_grad_value_)):
        ours, theirs = (inspect.signature(function).parameters for function in (ours, theirs))
        assert list(ours) == list(theirs)
        for name in ours:
            expected = True if name == "error_if_nonfinite" else theirs[name].default  # the one default that differs
            assert ours[name].default == expected and ours[name].kind == theirs[name].kind


# ---- Trajectories: twenty steps of training, in float64, must stay together

CLIPS = {
    **{f"norm {p}": (lambda tensors, p=p: clip_grad_norm_(tensors, 0.3, p), lambda tensors, p=p: THEIRS.clip_grad_norm_(tensors, 0.3, p)) for p in (1.0, 2.0, 3.0, math.inf)},
    "value": (lambda tensors: clip_grad_value_(tensors, 0.05), lambda tensors: THEIRS.clip_grad_value_(tensors, 0.05)),
}
NUMPY_CLIPS = {"norm 2.0": lambda grads: clip_grad_norm(grads, 0.3)[0], "value": lambda grads: clip_grad_value(grads, 0.05)}


def layer_and_data():
    torch.manual_seed(5)
    layer = torch.nn.RNN(3, 6, dtype=torch.float64)
    with torch.no_grad(): layer.weight_hh_l0.mul_(3)  # so that gradients are long
    return layer, torch.randn(20, 12, 4, 3, dtype=torch.float64), torch.randn(20, 4, 6, dtype=torch.float64)


def train_torch(clip):
    "Twenty steps of momentum descent; the parameters in the end and how many steps were shortened."
    layer, inputs, targets = layer_and_data()
    optimizer, shortened = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9), 0
    for x, y in zip(inputs, targets):
        optimizer.zero_grad()
        (layer(x)[1][0] - y).square().sum().backward()
        before = layer.weight_hh_l0.grad.clone()
        clip(list(layer.parameters()))
        shortened += not torch.equal(before, layer.weight_hh_l0.grad)
        optimizer.step()
    return {name: p.detach() for name, p in layer.named_parameters()}, shortened


def train_numpy(clip):
    layer, inputs, targets = layer_and_data()
    params = {name: p.detach().numpy().copy() for name, p in layer.named_parameters()}
    velocity = {name: 0.0 for name in params}
    for x, y in zip(inputs.numpy(), targets.numpy()):
        _, state, tape = rnn_forward(x, params)
        grads = rnn_backward(None, 2 * (state - y), tape)
        grads = clip({name: grads[name] for name in params})
        velocity = {name: 0.9 * velocity[name] + grads[name] for name in params}
        params = {name: params[name] - 0.1 * velocity[name] for name in params}
    return params


@pytest.mark.parametrize("name", CLIPS)
def test_twenty_steps_of_training(name):
    ours, shortened = train_torch(CLIPS[name][0])
    theirs, _ = train_torch(CLIPS[name][1])
    assert shortened >= 15  # else this would prove nothing
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-9)
    if name in NUMPY_CLIPS:
        for key, array in train_numpy(NUMPY_CLIPS[name]).items():
            np.testing.assert_allclose(array, theirs[key].numpy(), rtol=0, atol=1e-9)


# ---- Properties


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


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-6, 1e6), clip_value=st.floats(1e-3, 1e3))
def test_properties_by_value(seed, scale, clip_value):
    grads = some_grads(seed, scale)
    before = {name: g.copy() for name, g in grads.items()}
    clipped = clip_grad_value(grads, clip_value)
    again = clip_grad_value(clipped, clip_value)
    for name, g in clipped.items():
        np.testing.assert_array_equal(grads[name], before[name])
        assert (abs(g) <= clip_value).all() and (g * grads[name] >= 0).all()  # signs are kept
        inside = abs(grads[name]) <= clip_value
        assert (g[inside] == grads[name][inside]).all() and (abs(g[~inside]) == clip_value).all()
        np.testing.assert_array_equal(again[name], g)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtype_is_kept(dtype):
    clipped, norm = clip_grad_norm(some_grads(1, 10, dtype), np.float64(1.0))
    assert all(g.dtype == dtype for g in clipped.values()) and isinstance(norm, float)
    assert all(g.dtype == dtype for g in clip_grad_value(some_grads(1, 10, dtype), np.float64(1.0)).values())


@pytest.mark.parametrize("dtype, entry", [(np.float16, 200.0), (np.float32, 1e20)])
def test_the_norm_of_a_narrow_type_does_not_overflow(dtype, entry):
    clipped, norm = clip_grad_norm({"weight": np.full(4, entry, dtype)}, 1.0)
    assert math.isclose(norm, 2 * entry, rel_tol=1e-3) and clipped["weight"].dtype == dtype
    np.testing.assert_allclose(clipped["weight"], 0.5, rtol=1e-3)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, -math.inf])
def test_limits_that_make_no_sense(bad):
    for name, ours, ours_ in (("max_norm", clip_grad_norm, clip_grad_norm_), ("clip_value", clip_grad_value, clip_grad_value_)):
        with pytest.raises(ValueError, match=f"{name}: expected a positive number, got {bad}"):
            ours(some_grads(0), bad)
        tensors = parameters(some_grads(0))
        before = [p.grad.clone() for p in tensors]
        with pytest.raises(ValueError, match=f"{name}: expected a positive number, got {bad}"):
            ours_(tensors, bad)
        assert same(tensors, before)


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
    assert same(tensors, before)
    theirs = parameters(grads)
    THEIRS.clip_grad_norm_(theirs, 1.0)
    clip_grad_norm_(tensors, 1.0, error_if_nonfinite=False)
    clipped, _ = clip_grad_norm(grads, 1.0, error_if_nonfinite=False)
    for ours, expected, g in zip(tensors, theirs, clipped.values()):
        torch.testing.assert_close(ours.grad, expected.grad, equal_nan=True)
        np.testing.assert_allclose(g, expected.grad.numpy(), equal_nan=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_by_value(value):
    grads = some_grads(0)
    grads["bias"][1] = value
    ours, theirs = parameters(grads), parameters(grads)
    clip_grad_value_(ours, 0.5)
    THEIRS.clip_grad_value_(theirs, 0.5)
    assert same(ours, [p.grad for p in theirs])
    np.testing.assert_array_equal(clip_grad_value(grads, 0.5)["bias"], theirs[1].grad.numpy())


def test_an_infinite_limit_only_measures():
    grads = some_grads(0, 1e3)
    unchanged, norm = clip_grad_norm(grads, math.inf)
    assert all(unchanged[name] is grads[name] for name in grads) and unchanged is not grads
    tensors = parameters(grads)
    assert math.isclose(clip_grad_norm_(tensors, math.inf).item(), norm)
    clip_grad_value_(tensors, math.inf)
    assert all(torch.equal(p.grad, torch.from_numpy(g)) for p, g in zip(tensors, grads.values()))


def test_what_parameters_may_be():
    tensor = parameters({"weight": np.array([3.0, 4.0])})[0]
    assert clip_grad_norm_(tensor, 10.0) == 5.0                                    # one tensor
    assert clip_grad_norm_((p for p in [tensor, torch.nn.Parameter(torch.ones(2))]), 10.0) == 5.0  # a generator, one without grad
    assert clip_grad_norm_([], 1.0) == 0.0 and clip_grad_norm({}, 1.0) == ({}, 0.0)
    clip_grad_value_((p for p in [tensor, torch.nn.Parameter(torch.ones(2))]), 3.5)
    assert tensor.grad.tolist() == [3.0, 3.5]
    clip_grad_value_(tensor, 1.0)
    assert tensor.grad.tolist() == [1.0, 1.0]
    assert clip_grad_value_([], 1.0) is None and clip_grad_value({}, 1.0) == {}


def test_foreach():
    for clip_ in (clip_grad_norm_, clip_grad_value_):
        tensors = parameters(some_grads(0))
        before = [p.grad.clone() for p in tensors]
        with pytest.raises(ValueError, match="foreach: expected None or False, got True"):
            clip_(tensors, 0.1, foreach=True)
        assert same(tensors, before)
        clip_(tensors, 0.1, foreach=False)
        assert not same(tensors, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_parity():
    grads = some_grads(3, 10.0)
    tensors = parameters(grads, "cuda")
    norm = clip_grad_norm_(tensors, 1.0)
    clipped, expected = clip_grad_norm(grads, 1.0)
    assert math.isclose(norm.item(), expected, rel_tol=1e-10)
    for p, g in zip(tensors, clipped.values()):
        np.testing.assert_allclose(p.grad.cpu().numpy(), g, rtol=1e-10)
    tensors = parameters(grads, "cuda")
    clip_grad_value_(tensors, 1.0)
    for p, g in zip(tensors, clip_grad_value(grads, 1.0).values()):
        np.testing.assert_array_equal(p.grad.cpu().numpy(), g)


# ---- The temporal-order task


@pytest.mark.parametrize("steps", [10, 25, 50, 100])
def test_temporal_order(steps):
    x, y = temporal_order(steps, 400, np.random.default_rng(1))
    assert x.shape == (steps, 400, 6) and x.dtype == np.float64 and (x.sum(-1) == 1).all()
    assert y.shape == (400,) and np.issubdtype(y.dtype, np.integer)
    symbols, tenth = x.argmax(-1), steps // 10
    places = [np.flatnonzero(symbols[:, b] < 2) for b in range(400)]
    assert all(len(place) == 2 for place in places)
    first, second = np.transpose(places)
    assert first.min() == tenth and first.max() == 2 * tenth - 1 and second.min() == 5 * tenth and second.max() == 6 * tenth - 1
    row = np.arange(400)
    np.testing.assert_array_equal(y, 2 * symbols[first, row] + symbols[second, row])
    assert set(y.tolist()) == {0, 1, 2, 3} and set(symbols.ravel().tolist()) == set(range(6))
    assert abs(np.bincount(y) / 400 - 0.25).max() < 0.1


def test_temporal_order_draws_from_its_generator_alone():
    before = np.random.get_state()[1].copy()
    one, two, other = (temporal_order(20, 3, np.random.default_rng(seed)) for seed in (7, 7, 8))
    assert (one[0] == two[0]).all() and (one[1] == two[1]).all() and (one[0] != other[0]).any()
    assert (np.random.get_state()[1] == before).all()
    assert temporal_order(10, 0, np.random.default_rng(0))[0].shape == (10, 0, 6)
    with pytest.raises(ValueError, match="steps: expected at least 10, got 9"):
        temporal_order(9, 1, np.random.default_rng(0))
    with pytest.raises(TypeError, match="rng: expected a numpy.random.Generator, got int"):
        temporal_order(20, 1, 0)
