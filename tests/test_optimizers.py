"Optimizers: the paths of NumPy, of our classes and of torch.optim, their options, states and errors."
import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from rnnbook.optimizers import SGD, Adagrad, Adam, adagrad, adam, sgd
from rnnbook.testing import assert_parity

FAMILY = [
    (sgd, SGD, torch.optim.SGD, dict(lr=0.1)),
    (sgd, SGD, torch.optim.SGD, dict(lr=0.0)),
    (adagrad, Adagrad, torch.optim.Adagrad, dict(lr=0.1)),
    (adagrad, Adagrad, torch.optim.Adagrad, dict(lr=0.01, eps=0.1)),
    (adam, Adam, torch.optim.Adam, dict(lr=0.01)),
    (adam, Adam, torch.optim.Adam, dict(lr=0.1, betas=(0.5, 0.9), eps=1e-3)),
    (adam, Adam, torch.optim.Adam, dict(lr=0.1, betas=(0.0, 0.0), eps=1e-3)),
]
SHAPES = {"weight": (3, 4), "bias": (3,), "scalar": ()}


def start(dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


def random_grads(steps=20, dtype=np.float64, seed=1):
    rng = np.random.default_rng(seed)
    return [{name: np.asarray(10 ** rng.uniform(-4, 3) * rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()} for _ in range(steps)]


def numpy_path(optimizer, grads, params, **options):
    state, path = None, []
    for g in grads:
        params, state = optimizer(params, g, state, **options)
        path.append(params)
    return path, state


def torch_path(optimizer, grads, params, device="cpu", **options):
    tensors = {name: torch.nn.Parameter(torch.from_numpy(np.array(p)).to(device)) for name, p in params.items()}
    optimizer, path = optimizer(tensors.values(), **options), []
    for g in grads:
        for name, p in tensors.items():
            p.grad = torch.from_numpy(np.array(g[name])).to(device)
        optimizer.step()
        path.append({name: p.detach().cpu().numpy().copy() for name, p in tensors.items()})
    return path, optimizer


@pytest.mark.parametrize("reference, ours, theirs, options", FAMILY)
@pytest.mark.parametrize("dtype, tol", [(np.float64, 1e-12), (np.float32, 2e-5)])
def test_paths_of_20_steps(reference, ours, theirs, options, dtype, tol):
    params, grads = start(dtype), random_grads(dtype=dtype)
    expected, _ = torch_path(theirs, grads, params, **options)
    by_numpy, _ = numpy_path(reference, grads, params, **options)
    by_torch, _ = torch_path(ours, grads, params, **options)
    assert_parity(by_numpy, expected, tol=tol)
    assert_parity(by_torch, expected, tol=tol)
    assert all(p.dtype == dtype for p in by_numpy[-1].values())


@pytest.mark.parametrize("reference, ours, theirs, options", FAMILY)
def test_state_has_torchs_names_and_values(reference, ours, theirs, options):
    grads = random_grads(7)
    _, state = numpy_path(reference, grads, start(), **options)
    _, optimizer = torch_path(ours, grads, start(), **options)
    _, expected = torch_path(theirs, grads, start(), **options)
    for index, name in enumerate(SHAPES):
        of_ours, of_theirs = (o.state_dict()["state"].get(index, {}) for o in (optimizer, expected))
        of_theirs = {key: value for key, value in of_theirs.items() if value is not None}  # SGD without momentum
        assert set(of_ours) == set(of_theirs)
        for key in of_ours:
            assert_parity(of_ours[key], of_theirs[key])
            assert_parity(np.asarray(state["step"] if key == "step" else state[key][name], float), np.asarray(of_theirs[key], float))


@pytest.mark.parametrize("reference, ours, theirs, options", FAMILY)
def test_a_run_of_torch_can_be_taken_over(reference, ours, theirs, options):
    grads = random_grads(20)
    expected, _ = torch_path(theirs, grads, start(), **options)
    half, optimizer = torch_path(theirs, grads[:10], start(), **options)
    saved = copy.deepcopy(optimizer.state_dict())
    def resume(params):
        taken_over = ours(params)
        taken_over.load_state_dict(saved)
        return taken_over
    rest, _ = torch_path(resume, grads[10:], half[-1])
    assert_parity(rest[-1], expected[-1], tol=1e-12)


@pytest.mark.parametrize("reference, ours, theirs, options", FAMILY)
def test_numpy_functions_are_pure(reference, ours, theirs, options):
    params, (g, h) = start(), random_grads(2)
    _, state = reference(params, g, **options)
    kept = copy.deepcopy((params, g, h, state))
    first = reference(params, h, state, **options)
    assert_parity((params, g, h), kept[:3], tol=0)
    assert str(state) == str(kept[3])
    assert_parity(reference(params, h, state, **options)[0], first[0], tol=0)  # the same again


@given(exponent=st.integers(-3, 3), seed=st.integers(0, 1000))
def test_rulers_cancel_the_scale_of_the_loss(exponent, seed):
    grads = random_grads(5, seed=seed)
    scaled = [{name: 10.0**exponent * g for name, g in step.items()} for step in grads]
    for reference in (adagrad, adam):
        paths = [numpy_path(reference, g, start(), lr=0.1, eps=0.0)[0] for g in (grads, scaled)]
        assert_parity(paths[1], paths[0], tol=1e-9)


def test_first_step_has_the_length_of_the_rate():
    params, (g,) = start(), random_grads(1)
    for reference in (adagrad, adam):
        new, _ = reference(params, g, lr=0.25, eps=0.0)
        assert_parity({n: new[n] - params[n] for n in new}, {n: -0.25 * np.sign(g[n]) for n in g})


def test_float32_stays_float32():
    params, (g,) = start(np.float32), random_grads(1, np.float32)
    for reference in (sgd, adagrad, adam):
        new, _ = reference(params, g, lr=np.float64(0.1))
        assert all(p.dtype == np.float32 for p in new.values())


def test_zero_gradients_move_nothing():
    params = start()
    zeros = {name: np.zeros_like(p) for name, p in params.items()}
    for reference in (sgd, adagrad, adam):
        assert_parity(numpy_path(reference, [zeros] * 3, params, lr=0.1)[0][-1], params, tol=0)


@pytest.mark.parametrize("reference", [sgd, adagrad, adam])
def test_errors_of_numpy_name_the_argument(reference):
    params, (g,) = start(), random_grads(1)
    for lr in (-1.0, math.nan):
        with pytest.raises(ValueError, match="lr: expected .* got"):
            reference(params, g, lr=lr)
    with pytest.raises(ValueError, match="'bias'"):
        reference(params, {"weight": g["weight"], "scalar": g["scalar"]}, lr=0.1)
    with pytest.raises(ValueError, match=r"grads\['bias'\]: expected \(3,\), got \(1,\)"):
        reference(params, {**g, "bias": np.zeros(1)}, lr=0.1)  # would broadcast
    with pytest.raises(TypeError, match="float64"):
        reference(params, {**g, "bias": np.zeros(3, np.float32)}, lr=0.1)
    reference(params, {**g, "x": np.zeros(9)}, lr=0.1)  # gradients of other things are passed over


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9,), (math.nan, 0.9)])
def test_betas(betas):
    with pytest.raises(ValueError, match="betas"):
        adam(start(), random_grads(1)[0], betas=betas)
    with pytest.raises(ValueError, match="betas"):
        Adam([torch.nn.Parameter(torch.zeros(1))], betas=betas)


@pytest.mark.parametrize("optimizer", [SGD, Adagrad, Adam])
def test_errors_of_the_classes(optimizer):
    p = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="lr"):
        optimizer([p], lr=-1.0)
    with pytest.raises(TypeError):
        optimizer([p], foreach=True)
    with pytest.raises(ValueError, match="weight_decay"):
        optimizer([dict(params=[p], weight_decay=0.1)])
    if optimizer is not SGD:
        with pytest.raises(ValueError, match="eps"):
            optimizer([p], eps=-1.0)


@pytest.mark.parametrize("ours, theirs, option", [(SGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9)), (Adam, torch.optim.Adam, dict(weight_decay=0.1)),
                                                  (Adam, torch.optim.Adam, dict(amsgrad=True)), (Adagrad, torch.optim.Adagrad, dict(lr_decay=0.1))])
def test_a_state_with_unknown_options_is_refused(ours, theirs, option):
    p = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=list(option)[-1]):
        ours([p]).load_state_dict(theirs([p], **option).state_dict())


def test_groups_closure_and_parameters_without_gradient():
    a, b, c = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = SGD([dict(params=[a], lr=0.5), dict(params=[b, c])], lr=0.1)
    def closure():
        optimizer.zero_grad()
        loss = a.sum() + b.sum()
        loss.backward()
        return loss
    assert optimizer.step(closure) == 4.0
    assert_parity((a, b, c), (np.full(2, 0.5), np.full(2, 0.9), np.ones(2)), tol=1e-6)


def test_torchs_schedules_work():
    p = torch.nn.Parameter(torch.zeros(()))
    optimizer = SGD([p], lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(3):
        p.grad = torch.tensor(-1.0)
        optimizer.step(); schedule.step()
    assert p.item() == 1.75


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("reference, ours, theirs, options", FAMILY)
def test_cuda_parity(reference, ours, theirs, options):
    expected, _ = numpy_path(reference, random_grads(), start(), **options)
    assert_parity(torch_path(ours, random_grads(), start(), "cuda", **options)[0], expected, tol=1e-10)
