"""The linear layer, softmax cross-entropy and the window network: gradients, parity with torch, masks and faults."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn import functional as F

from rnnbook.feedforward import (WindowNetwork, bits_per_character, linear_backward, linear_forward, softmax_cross_entropy,
                                 softmax_cross_entropy_backward, window_backward, window_forward, window_init)
from rnnbook.testing import assert_parity, gradient_check, parity_tolerance

SHAPES = [(), (1,), (6,), (4, 3), (2, 3, 4), (0,), (3, 0)]


def layer(shape, bias=True, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_normal((*shape, 3)).astype(dtype), rng.standard_normal((5, 3)).astype(dtype)
    return x, weight, rng.standard_normal(5).astype(dtype) if bias else None, rng.standard_normal((*shape, 5)).astype(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_linear_equals_torch(shape, bias, dtype):
    x, weight, b, d_y = layer(shape, bias, dtype)
    y, tape = linear_forward(x, weight, b)
    grads = linear_backward(d_y, tape)
    tensors = {name: torch.tensor(a, requires_grad=True) for name, a in {"x": x, "weight": weight, "bias": b}.items() if a is not None}
    expected = F.linear(tensors["x"], tensors["weight"], tensors.get("bias"))
    expected.backward(torch.tensor(d_y))
    tol = parity_tolerance(dtype, 100)
    assert_parity(y, expected, tol=tol)
    assert_parity(grads, {name: tensor.grad for name, tensor in tensors.items()}, tol=tol)
    assert y.dtype == dtype and all(g.dtype == dtype for g in grads.values())


@pytest.mark.parametrize("shape", [(6,), (4, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_gradients(shape, bias):
    x, weight, b, mix = layer(shape, bias)
    params = {name: a for name, a in {"x": x, "weight": weight, "bias": b}.items() if a is not None}
    def loss(p): return (mix * np.sin(linear_forward(p["x"], p["weight"], p.get("bias"))[0])).sum()
    y, tape = linear_forward(x, weight, b)
    grads = linear_backward(mix * np.cos(y), tape)
    assert set(gradient_check(loss, params, grads)) == set(grads)
    with pytest.raises(AssertionError, match="gradient of weight"):
        gradient_check(loss, params, {**grads, "weight": grads["weight"][::-1]})


@pytest.mark.parametrize("change, error, message", [
    (dict(x=np.zeros((4, 2))), ValueError, r"x: expected \(..., 3\), got \(4, 2\)"),
    (dict(x=np.zeros(())), ValueError, r"x: expected \(..., 3\), got \(\)"),
    (dict(x=np.zeros((4, 3), int)), TypeError, "x: expected a float array, got int64"),
    (dict(x=np.zeros((4, 3), np.float32)), TypeError, "weight: expected float32 like x, got float64"),
    (dict(weight=np.zeros(3)), ValueError, r"weight: expected \(O, I\), got \(3,\)"),
    (dict(bias=np.zeros((1, 5))), ValueError, r"bias: expected \(5,\), got \(1, 5\)"),
    (dict(bias=np.zeros(5, np.float32)), TypeError, "bias: expected float64 like x, got float32"),
])
def test_linear_faults(change, error, message):
    x, weight, bias, _ = layer((4,))
    with pytest.raises(error, match=message): linear_forward(**{**dict(x=x, weight=weight, bias=bias), **change})


def test_linear_backward_refuses_a_wrong_gradient():
    x, weight, bias, d_y = layer((4, 2))
    _, tape = linear_forward(x, weight, bias)
    with pytest.raises(ValueError, match=r"d_y: expected \(4, 2, 5\), got \(8, 5\)"): linear_backward(d_y.reshape(8, 5), tape)


@pytest.mark.parametrize("shape", [(1,), (6,), (4, 3)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_cross_entropy_equals_torch(shape, dtype, masked):
    rng = np.random.default_rng(1)
    logits, targets = (3 * rng.standard_normal((*shape, 7))).astype(dtype), rng.integers(0, 7, shape)
    mask = rng.random(shape) < 0.8 if masked else None
    loss, tape = softmax_cross_entropy(logits, targets, mask=mask)
    d_logits = softmax_cross_entropy_backward(tape, 2.5)
    tensor = torch.tensor(logits, requires_grad=True)
    labels = targets if mask is None else np.where(mask, targets, -100)
    expected = F.cross_entropy(tensor.reshape(-1, 7), torch.from_numpy(labels.ravel()))
    (2.5 * expected).backward()
    tol = parity_tolerance(dtype, 100)
    assert_parity(loss, expected, tol=tol)
    assert_parity(d_logits, tensor.grad, tol=tol)
    assert type(loss) is float and d_logits.dtype == dtype


@pytest.mark.parametrize("masked", [False, True])
def test_cross_entropy_gradients(masked):
    rng = np.random.default_rng(2)
    z, targets = rng.standard_normal((5, 3, 4)), rng.integers(0, 4, (5, 3))
    mask = rng.random((5, 3)) < 0.6 if masked else None
    _, tape = softmax_cross_entropy(z, targets, mask=mask)
    gradient_check(lambda p: 3 * softmax_cross_entropy(p["z"], targets, mask=mask)[0], {"z": z}, {"z": softmax_cross_entropy_backward(tape, 3)})


@given(st.lists(st.floats(-1e300, 1e300), min_size=2, max_size=6), st.data())
def test_cross_entropy_of_any_scores(scores, data):
    target = data.draw(st.integers(0, len(scores) - 1))
    loss, tape = softmax_cross_entropy(np.array(scores), target)
    gradient = softmax_cross_entropy_backward(tape)
    assert loss >= 0 and np.isfinite(loss) and np.isfinite(gradient).all()
    assert abs(gradient.sum()) < 1e-12 and -1 <= gradient[target] <= 0


@given(st.lists(st.floats(-20, 20), min_size=3, max_size=3), st.floats(-1e3, 1e3))
def test_a_shift_of_all_scores_changes_nothing(scores, shift):
    z = np.array([scores])
    assert abs(softmax_cross_entropy(z, [1])[0] - softmax_cross_entropy(z + shift, [1])[0]) < 1e-9


def test_what_is_masked_changes_nothing():
    rng = np.random.default_rng(3)
    logits, targets, mask = rng.standard_normal((6, 4, 5)), rng.integers(0, 5, (6, 4)), rng.random((6, 4)) < 0.5
    loss, tape = softmax_cross_entropy(logits, targets, mask=mask)
    for rubbish in (np.nan, np.inf, -1e308):
        other, other_tape = softmax_cross_entropy(np.where(mask[..., None], logits, rubbish), np.where(mask, targets, 99), mask=mask)
        assert other == loss and (softmax_cross_entropy_backward(other_tape) == softmax_cross_entropy_backward(tape)).all()
    assert (softmax_cross_entropy_backward(tape)[~mask] == 0).all()


def test_a_nan_row_leaves_the_others_alone():
    rng = np.random.default_rng(4)
    logits, targets = rng.standard_normal((4, 5)), rng.integers(0, 5, 4)
    clean = softmax_cross_entropy_backward(softmax_cross_entropy(logits, targets)[1])
    logits[2] = np.nan
    loss, tape = softmax_cross_entropy(logits, targets)
    assert np.isnan(loss) and (softmax_cross_entropy_backward(tape)[[0, 1, 3]] == clean[[0, 1, 3]]).all()


def test_nothing_counts():
    loss, tape = softmax_cross_entropy(np.ones((3, 4)), np.zeros(3, int), mask=np.zeros(3, bool))
    assert loss == 0 and (softmax_cross_entropy_backward(tape) == 0).all()
    loss, tape = softmax_cross_entropy(np.ones((0, 4)), np.zeros(0, int))
    assert loss == 0 and softmax_cross_entropy_backward(tape).shape == (0, 4)


@pytest.mark.parametrize("change, error, message", [
    (dict(targets=np.array([0, 1, 4])), ValueError, "targets: expected values from 0 to V - 1 = 3, got 4"),
    (dict(targets=np.array([0, 1, -1])), ValueError, "got -1"),
    (dict(targets=np.zeros(3)), TypeError, "targets: expected integer, got float64"),
    (dict(targets=np.zeros((3, 1), int)), ValueError, r"targets: expected \(3,\), got \(3, 1\)"),
    (dict(logits=np.zeros((3, 4), int)), TypeError, "logits: expected floating, got int64"),
    (dict(mask=np.ones(3)), TypeError, "mask: expected bool, got float64"),
    (dict(mask=np.ones((3, 1), bool)), ValueError, r"mask: expected \(3,\), got \(3, 1\)"),
])
def test_cross_entropy_faults(change, error, message):
    arguments = {**dict(logits=np.zeros((3, 4)), targets=np.zeros(3, int), mask=None), **change}
    with pytest.raises(error, match=message): softmax_cross_entropy(arguments.pop("logits"), arguments.pop("targets"), **arguments)


def test_bits():
    loss, _ = softmax_cross_entropy(np.zeros((1, 64)), [3])
    assert_parity(bits_per_character(loss), 6.0)
    assert_parity(bits_per_character(np.array([0.0, math.log(2)])), np.array([0.0, 1.0]))


def window_problem(dtype=np.float64, B=6):
    rng = np.random.default_rng(5)
    params = window_init(4, 3, 5, 7, rng=rng, dtype=dtype)
    return params, rng.standard_normal((B, 4, 3)).astype(dtype), rng.integers(0, 7, B)


def test_window_init():
    params, _, _ = window_problem()
    assert {name: p.shape for name, p in params.items()} == {"weight_ih": (5, 12), "bias_ih": (5,), "weight_ho": (7, 5), "bias_ho": (7,)}
    big = window_init(5, 20, 100, 300, rng=np.random.default_rng(0), dtype=np.float32)
    for name, bound in (("weight_ih", 0.1), ("bias_ih", 0.1), ("weight_ho", 0.1), ("bias_ho", 0.1)):
        assert big[name].dtype == np.float32 and 0.9 * bound < abs(big[name]).max() <= bound * (1 + 1e-6)
    again = window_init(4, 3, 5, 7, rng=np.random.default_rng(5))
    assert all((again[name] == params[name]).all() for name in params)


def test_window_gradients():
    params, x, targets = window_problem()
    def loss(p): return softmax_cross_entropy(window_forward(p["x"], p)[0], targets)[0]
    logits, tape = window_forward(x, params)
    grads = window_backward(softmax_cross_entropy_backward(softmax_cross_entropy(logits, targets)[1]), tape)
    assert set(gradient_check(loss, {**params, "x": x}, grads)) == {*params, "x"}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("B", [0, 1, 6])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))])
def test_window_network_equals_numpy(dtype, B, device):
    params, x, targets = window_problem(dtype, B)
    network = WindowNetwork(4, 3, 5, 7, device=device, dtype=getattr(torch, np.dtype(dtype).name))
    network.load_state_dict({name: torch.from_numpy(p) for name, p in params.items()})
    tensor = torch.tensor(x, device=device, requires_grad=True)
    expected = network(tensor)
    (expected.sin()).sum().backward()
    logits, tape = window_forward(x, params)
    grads = window_backward(np.cos(logits), tape)
    tol = 1e-10 if device == "cuda" and dtype == np.float64 else parity_tolerance(dtype, 200)
    assert_parity(logits, expected, tol=tol)
    assert_parity(grads, {name: p.grad for name, p in network.named_parameters()} | {"x": tensor.grad}, tol=tol)


def test_window_network_draws_as_torch_does():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours = WindowNetwork(4, 3, 5, 7)
        torch.manual_seed(0)
        theirs = torch.nn.Sequential(torch.nn.Linear(12, 5), torch.nn.Linear(5, 7))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True): assert (p == q).all()
    assert sorted(ours.state_dict()) == ["bias_ho", "bias_ih", "weight_ho", "weight_ih"]


def test_window_faults():
    params, x, _ = window_problem()
    with pytest.raises(ValueError, match=r"x: expected \(B, W, I\) with W \* I = 12, got \(6, 3, 3\)"): window_forward(x[:, :3], params)
    with pytest.raises(ValueError, match=r"got \(6, 12\)"): window_forward(x.reshape(6, 12), params)
    with pytest.raises(TypeError, match="expected float32 like x"): window_forward(x.astype(np.float32), params)
    with pytest.raises(ValueError, match=r"W \* I = 12, got \(6, 3, 3\)"): WindowNetwork(4, 3, 5, 7)(torch.zeros(6, 3, 3))


def test_what_lies_before_the_window_is_lost():
    params, x, _ = window_problem()
    before = np.concatenate([np.random.default_rng(6).standard_normal((6, 1, 3)), x], 1)  # (B, W+1, I)
    assert (window_forward(before[:, 1:], params)[0] == window_forward(x, params)[0]).all()
    for place in range(4):  # but each place inside it counts, and counts for itself
        other = x.copy()
        other[:, place] += 1
        assert (abs(window_forward(other, params)[0] - window_forward(x, params)[0]).max(1) > 1e-4).all()


def test_nothing_is_modified():
    params, x, targets = window_problem()
    for array in [*params.values(), x, targets]: array.flags.writeable = False
    logits, tape = window_forward(x, params)
    logits.flags.writeable = False
    _, loss_tape = softmax_cross_entropy(logits, targets, mask=np.ones(6, bool))
    first, second = (window_backward(softmax_cross_entropy_backward(loss_tape), tape) for _ in range(2))
    assert all((first[name] == second[name]).all() for name in first)
