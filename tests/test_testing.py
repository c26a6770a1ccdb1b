"""The instruments of proof: what they let pass, what they catch, and what they say."""
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from rnnbook.testing import MACHINE_EPSILON, STEP, assert_parity, assert_raises, gradient_check, numeric_gradient, parity_tolerance


def problem(seed=0):
    "A two-layer loss of unequal sizes, its parameters and gradients."
    rng = np.random.default_rng(seed)
    params = {"x": rng.standard_normal((5, 3)), "weight": rng.standard_normal((4, 3)), "bias": rng.standard_normal(4)}
    mix = rng.standard_normal((5, 4))
    def loss(p): return (mix * np.tanh(p["x"] @ p["weight"].T + p["bias"])).sum()
    d_a = mix * (1 - np.tanh(params["x"] @ params["weight"].T + params["bias"]) ** 2)
    return loss, params, {"x": d_a @ params["weight"], "weight": d_a.T @ params["x"], "bias": d_a.sum(0)}


@pytest.mark.parametrize("seed", range(10))
def test_right_gradients_pass(seed):
    loss, params, grads = problem(seed)
    errors = gradient_check(loss, params, grads)
    assert list(errors) == ["x", "weight", "bias"] and all(type(error) is float and error < 1e-7 for error in errors.values())


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
@pytest.mark.parametrize("slip", [
    lambda g: -g, lambda g: 2 * g, lambda g: g * (1 + 1e-4), lambda g: g[::-1], lambda g: 0 * g, lambda g: g + 1e-5, lambda g: g * np.nan,
])
def test_wrong_gradients_are_named(name, slip):
    loss, params, grads = problem()
    with pytest.raises(AssertionError, match=f"^gradient of {name}: expected"):
        gradient_check(loss, params, {**grads, name: slip(grads[name])})


def test_one_wrong_entry_is_found_where_it_is():
    loss, params, grads = problem()
    weight = grads["weight"].copy()
    weight[2, 1] += 1e-3
    with pytest.raises(AssertionError, match=r"gradient of weight: .* at \[2, 1\]"):
        gradient_check(loss, params, {**grads, "weight": weight})


def test_every_wrong_parameter_is_listed():
    loss, params, grads = problem()
    with pytest.raises(AssertionError) as caught:
        gradient_check(loss, params, {"x": -grads["x"], "weight": grads["weight"], "bias": grads["bias"][None]})
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and lines[0].startswith("gradient of x") and lines[1] == "gradient of bias: expected shape (4,), got (1, 4)"


def test_tolerance_is_the_limit():
    loss, params, grads = problem()
    off = {name: grad * (1 + 1e-5) for name, grad in grads.items()}
    assert max(gradient_check(loss, params, off, tol=1e-4).values()) < 1.01e-5
    with pytest.raises(AssertionError): gradient_check(loss, params, off)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e-3])
def test_small_gradients_give_no_false_alarm(scale):
    def loss(p): return np.cos(p["a"]).sum() + scale * (p["b"] ** 2).sum()
    rng = np.random.default_rng(1)
    params = {"a": rng.standard_normal(4), "b": rng.standard_normal(4)}
    grads = {"a": -np.sin(params["a"]), "b": 2 * scale * params["b"]}
    gradient_check(loss, params, grads)
    with pytest.raises(AssertionError, match="gradient of b"):
        gradient_check(loss, params, {**grads, "b": grads["b"] + 1e-8})  # above what is let go


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
def test_large_losses_give_no_false_alarm(size):
    def loss(p): return size + np.sin(p["a"]).sum()
    params = {"a": np.random.default_rng(2).standard_normal(6)}
    gradient_check(loss, params, {"a": np.cos(params["a"])})


def test_gradient_check_faults():
    loss, params, grads = problem()
    with pytest.raises(ValueError, match="grads: expected a gradient for 'bias', got \\['x', 'weight'\\]"):
        gradient_check(loss, params, {name: grads[name] for name in ("x", "weight")})
    with pytest.raises(TypeError, match="float64, got float32"):
        gradient_check(loss, {**params, "bias": params["bias"].astype(np.float32)}, grads)
    with pytest.raises(TypeError, match=r"loss: expected one number, got an array of shape \(5,\)"):
        gradient_check(lambda p: p["x"].sum(1), params, grads)


def test_further_gradients_and_empty_parameters():
    loss, params, grads = problem()
    errors = gradient_check(loss, {**params, "none": np.zeros((0, 3))}, {**grads, "h0": None, "none": np.zeros((0, 3))})
    assert errors["none"] == 0


def test_nothing_is_modified():
    loss, params, grads = problem()
    before = {name: array.copy() for name, array in params.items()}
    for array in [*params.values(), *grads.values()]: array.flags.writeable = False
    gradient_check(loss, params, grads)
    assert all((params[name] == before[name]).all() for name in params)


def test_gradients_of_a_torch_loss():
    w = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    def loss(w): return w.sin().prod(0).sum()
    loss(w).backward()
    gradient_check(lambda p: loss(torch.from_numpy(p["w"])), {"w": w.detach().numpy()}, {"w": w.grad})


@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4), st.floats(-2, 2))
def test_numeric_gradient_of_a_cubic(coefficients, point):
    a, b, c, d = coefficients
    found = numeric_gradient(lambda w: a * w**3 + b * w**2 + c * w + d, np.array(point))
    assert abs(found - (3 * a * point**2 + 2 * b * point + c)) < 1e-8


def test_numeric_gradient_keeps_the_shape():
    array = np.random.default_rng(0).standard_normal((2, 3, 4))
    assert_parity(numeric_gradient(lambda a: (a**2).sum(), array), 2 * array, tol=1e-8)
    assert numeric_gradient(np.sum, np.zeros((0, 2))).shape == (0, 2)
    with pytest.raises(TypeError, match="array: expected float64, got list"): numeric_gradient(np.sum, [1.0])


def test_step_is_near_the_best():
    def error(eps): return abs(numeric_gradient(lambda w: np.exp(w), np.array(1.0), eps) - np.e)
    assert error(STEP) < 3e-10 and error(100 * STEP) > 1e-8 and error(1e-5 * STEP) > 1e-8


@pytest.mark.parametrize("dtype, name", [
    (np.float64, "float64"), (np.dtype("float32"), "float32"), ("float16", "float16"), (torch.float32, "float32"),
    (torch.bfloat16, "bfloat16"), (torch.float64, "float64"), (np.zeros(1, np.float32).dtype, "float32"),
])
def test_parity_tolerance(dtype, name):
    assert parity_tolerance(dtype, 7) == 7 * MACHINE_EPSILON[name]


def test_machine_epsilons():
    for name, epsilon in MACHINE_EPSILON.items():
        assert epsilon == torch.finfo(getattr(torch, name)).eps


@pytest.mark.parametrize("dtype, terms, message", [
    (int, 3, "dtype: expected one of float64, .*, got int"), (torch.int64, 3, "got int64"), (np.float64, 0, "terms: expected at least 1, got 0"),
])
def test_parity_tolerance_faults(dtype, terms, message):
    with pytest.raises(ValueError, match=message): parity_tolerance(dtype, terms)


@pytest.mark.parametrize("n", [1, 3, 50, 2000])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bound_covers_matrix_products(n, dtype):
    rng = np.random.default_rng(n)
    a, b = rng.standard_normal((20, n)).astype(dtype), rng.standard_normal((n, 20)).astype(dtype)
    a /= abs(a).sum(1, keepdims=True) * abs(b).max()  # the terms of each sum add up to at most 1
    loop = sum((a[:, k : k + 1] * b[k] for k in range(n)), np.zeros((20, 20), dtype))
    assert_parity(loop, a @ b, tol=parity_tolerance(dtype, n + 1))


@pytest.mark.parametrize("actual, expected", [
    (1.0, 1.0 + 5e-13), (1000.0, 1000.0 + 5e-10), (np.array([1e-13, 1e3]), np.array([5e-10, 1e3])), (np.inf, np.inf),
    (np.array([-np.inf, 2]), torch.tensor([-np.inf, 2])), (np.zeros((0, 3)), np.zeros((0, 3))), (True, True), (np.int32([3]), torch.tensor([3])),
    (torch.ones(2, requires_grad=True), np.ones(2, np.float32)), (torch.ones(2, dtype=torch.bfloat16), np.ones(2)), (1 + 2j, 1 + 2j),
    ({"a": (1.0, [np.ones(2)])}, {"a": (1.0, [torch.ones(2)])}), ((np.ones(2), 3.0), [np.ones(2), 3.0]),
])
def test_parity_passes(actual, expected):
    assert assert_parity(actual, expected) is None


@pytest.mark.parametrize("actual, expected, message", [
    (1.0, 1.0 + 2e-12, r"^array: expected 1.000000000002.* at \[\], got 1 \(error 2.0e-12, allowed 1.0e-12\)"),
    (np.nan, np.nan, "got nan"), (np.nan, 1.0, "got nan"), (1.0, np.nan, "expected nan"), (np.inf, -np.inf, "got inf"),
    (np.inf, 1.0, "got inf"), (1.0, np.inf, "expected inf"), (np.array([np.inf, 1]), np.array([np.inf, 1 + 1e-9]), r"at \[1\]"),
    (np.ones((1, 3)), np.ones(3), r"^array: expected \(3,\), got \(1, 3\)"), (np.ones(()), np.ones(1), r"expected \(1,\), got \(\)"),
    (np.uint8([1]), np.uint8([2]), "expected 2 at"), (False, True, "error 1.0e"), (1j, 1.0, "error 1.4e"),
    ({"a": 1.0}, {"b": 1.0}, r"^array: expected keys \['b'\], got \['a'\]"), (1.0, {"b": 1.0}, "got float"), ({}, {"a": 1.0}, r"got \[\]"),
    ((1.0,), (1.0, 2.0), "expected 2 items, got 1"), ({"a": (1.0, 2.0)}, {"a": (1.0, 2.1)}, r"^array\['a'\]\[1\]: expected 2.1"),
    (torch.ones(2, dtype=torch.bfloat16), np.array([1, 1.01]), r"at \[1\]"),
])
def test_parity_fails(actual, expected, message):
    with pytest.raises(AssertionError, match=message): assert_parity(actual, expected)


def test_parity_scales_with_the_expected_result():
    assert_parity(np.array([0.0, 1e6]), np.array([9e-7, 1e6]))
    with pytest.raises(AssertionError, match="^output: "): assert_parity(np.array([0.0, 1e6]), np.array([9e-7, 1.0]), name="output")
    assert_parity(1.0, 1.1, tol=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_parity_reads_cuda_tensors():
    assert_parity(torch.ones(3, device="cuda", requires_grad=True), np.ones(3))
    with pytest.raises(AssertionError): assert_parity(torch.zeros(3, device="cuda"), np.ones(3))


def test_assert_raises(capsys):
    with assert_raises(ValueError, "three"): int("three")
    assert capsys.readouterr().out == "ValueError: invalid literal for int() with base 10: 'three'\n"
    with assert_raises(LookupError): {}["a"]
    assert capsys.readouterr().out == "KeyError: 'a'\n"  # the name of what was raised


def test_assert_raises_can_fail():
    with pytest.raises(AssertionError, match="expected ValueError, but nothing was raised"):
        with assert_raises(ValueError): pass
    with pytest.raises(AssertionError, match="expected a message with 'four'"):
        with assert_raises(ValueError, "four"): int("three")
    with pytest.raises(ZeroDivisionError):
        with assert_raises(ValueError): 1 / 0


def test_no_torch_needed():
    code = "import sys, rnnbook.testing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
