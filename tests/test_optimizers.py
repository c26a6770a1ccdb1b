"Optimizers: the paths of NumPy, of our classes and of torch.optim, their options, states and errors; the schedules."
import copy
import inspect
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.optim import lr_scheduler

from rnnbook.optimizers import (
    SGD, Adadelta, Adagrad, Adam, AdamW, Plateau, RMSprop, adadelta, adagrad, adam, adamw, cosine_schedule, rmsprop, sgd, step_schedule, warmup_schedule,
)
from rnnbook.testing import assert_parity

COMMON = dict(lr=[0.01, 0.1, 0.0], weight_decay=[0.0, 0.1], maximize=[False, True])
CHOICES = {  # every option that changes the numbers, the values of the single-option runs last
    sgd: dict(momentum=[0.0, 0.5, 0.9], dampening=[0.0, 0.3, 1.0], nesterov=[False, True]),
    adagrad: dict(lr_decay=[0.0, 0.1], initial_accumulator_value=[0.0, 0.5], eps=[1e-10, 0.1]),
    adadelta: dict(rho=[0.9, 0.0, 1.0, 0.5], eps=[1e-6, 0.1]),
    rmsprop: dict(alpha=[0.99, 0.2, 0.5], eps=[1e-8, 0.1], momentum=[0.0, 0.9], centered=[False, True]),
    adam: dict(betas=[(0.9, 0.999), (0.0, 0.0), (0.5, 0.9)], eps=[1e-8, 0.1], amsgrad=[False, True], decoupled_weight_decay=[False, True]),
    adamw: dict(betas=[(0.9, 0.999), (0.5, 0.9)], eps=[1e-8, 0.1], amsgrad=[False, True], weight_decay=[0.01, 0.0, 0.3]),
}
CHOICES = {reference: {**COMMON, **choices} for reference, choices in CHOICES.items()}
OURS = {sgd: SGD, adagrad: Adagrad, adadelta: Adadelta, rmsprop: RMSprop, adam: Adam, adamw: AdamW}
THEIRS = {reference: getattr(torch.optim, ours.__name__) for reference, ours in OURS.items()}
SHAPES = {"weight": (3, 4), "bias": (3,), "scalar": ()}
each_member = pytest.mark.parametrize("reference", OURS, ids=lambda reference: reference.__name__)


def cases():
    "Each member with its defaults, and with each value of each option alone (Nesterov and dampening need a momentum)."
    for reference, choices in CHOICES.items():
        found = [dict(lr=0.1)]
        for name, values in choices.items():
            needs = dict(momentum=0.9) if name in ("nesterov", "dampening") else dict(weight_decay=0.1) if name == "decoupled_weight_decay" else {}
            found += [dict(lr=0.1) | needs | {name: value} for value in values[1:]]
        if reference is rmsprop: found.append(dict(lr=0.01, centered=True, momentum=0.9))
        yield from (pytest.param(reference, options, id=f"{reference.__name__}-{options}") for options in found)


each_case = pytest.mark.parametrize("reference, options", list(cases()))


def start(dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


def random_grads(steps=20, dtype=np.float64, seed=1, spread=(-4, 3)):
    rng = np.random.default_rng(seed)
    return [{name: np.asarray(10 ** rng.uniform(*spread) * rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()} for _ in range(steps)]


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


# ---- One path


@each_case
@pytest.mark.parametrize("dtype, tol", [(np.float64, 1e-10), (np.float32, 1e-4)])
def test_paths_of_20_steps(reference, options, dtype, tol):
    params, grads = start(dtype), random_grads(dtype=dtype)
    expected, _ = torch_path(THEIRS[reference], grads, params, **options)
    by_numpy, state = numpy_path(reference, grads, params, **options)
    by_torch, _ = torch_path(OURS[reference], grads, params, **options)
    assert_parity(by_numpy, expected, tol=tol)
    assert_parity(by_torch, expected, tol=tol)
    assert all(p.dtype == dtype for p in by_numpy[-1].values())
    assert all(m.dtype == dtype for key, memory in state.items() if key != "step" for m in memory.values())


@each_member
@settings(max_examples=40)
@given(data=st.data())
def test_combinations_of_options(reference, data):
    options = {name: data.draw(st.sampled_from(values), name) for name, values in CHOICES[reference].items()}
    if options.get("nesterov"): options.update(momentum=options["momentum"] or 0.9, dampening=0.0)
    seed, half = data.draw(st.integers(0, 1000), "seed"), data.draw(st.integers(1, 19), "half")
    params, grads = start(seed=seed), random_grads(seed=seed + 1, spread=(-2, 2))
    expected, _ = torch_path(THEIRS[reference], grads, params, **options)
    assert_parity(numpy_path(reference, grads, params, **options)[0], expected, tol=1e-9)
    for first, second in ((OURS, OURS), (OURS, THEIRS), (THEIRS, OURS)):  # stopped half-way, and taken over
        assert_parity(taken_over(first[reference], second[reference], grads, params, half, options), expected, tol=1e-9)


def taken_over(first, second, grads, params, half, options):
    "A path begun with one class and ended with the other, which knows the options from the state alone."
    begun, optimizer = torch_path(first, grads[:half], params, **options)
    def resume(tensors):
        resumed = second(tensors)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return resumed
    return begun + torch_path(resume, grads[half:], begun[-1])[0]


def test_initial_accumulator_of_a_state_counts():
    "torch.optim takes this option from the constructor only, and ignores that of a group."
    expected, _ = torch_path(torch.optim.Adagrad, random_grads(), start(), initial_accumulator_value=0.5)
    by_group, _ = torch_path(lambda ps: Adagrad([dict(params=list(ps), initial_accumulator_value=0.5)]), random_grads(), start())
    assert_parity(by_group, expected)


@each_case
def test_state_has_torchs_names_and_values(reference, options):
    grads = random_grads(7)
    _, state = numpy_path(reference, grads, start(), **options)
    _, ours = torch_path(OURS[reference], grads, start(), **options)
    _, theirs = torch_path(THEIRS[reference], grads, start(), **options)
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours["param_groups"] == theirs["param_groups"] and set(ours["state"]) == set(theirs["state"])
    for index, name in enumerate(SHAPES):
        of_ours, of_theirs = (d["state"].get(index, {}) for d in (ours, theirs))
        assert set(of_ours) == set(of_theirs) == set(state) - ({"step"} if reference is sgd else set())
        for key in of_ours:
            assert of_ours[key].dtype == of_theirs[key].dtype
            assert_parity(of_ours[key], of_theirs[key])
            assert_parity(np.asarray(state["step"] if key == "step" else state[key][name], float), np.asarray(of_theirs[key], float), tol=1e-9)


@each_member
def test_signature_is_torchs(reference):
    ours, theirs = (inspect.signature(kind[reference].__init__).parameters for kind in (OURS, THEIRS))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [(p.name, p.kind, p.default) for p in theirs.values()]
    ours = {name: p.default for name, p in inspect.signature(reference).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert all(ours[name] == p.default for name, p in theirs.items() if name in ours and ours[name] is not inspect.Parameter.empty)
    assert set(ours) == set(theirs) - {"self", "params", "foreach", "fused", "capturable", "differentiable"}


@each_member
@pytest.mark.parametrize("lr", [torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64), torch.tensor([0.1])])
def test_a_rate_that_is_a_tensor(reference, lr):
    options = dict(weight_decay=0.1)
    expected, _ = torch_path(THEIRS[reference], random_grads(), start(), lr=lr.clone(), **options)
    found, optimizer = torch_path(OURS[reference], random_grads(), start(), lr=lr, **options)
    assert_parity(found, expected, tol=1e-10)
    assert optimizer.param_groups[0]["lr"] is lr
    with pytest.raises(ValueError, match=r"lr: expected a number .* got tensor"):
        OURS[reference]([torch.nn.Parameter(torch.zeros(2))], lr=torch.tensor([0.1, 0.2]))


def test_plain_calls_compute_as_they_always_did():
    "Bit for bit the formulas of plain descent, Adagrad and Adam in this order of operations."
    p, m, v, s = start()["weight"], 0, 0, 0
    paths = {reference: numpy_path(reference, random_grads(), start(), lr=0.1)[0] for reference in (sgd, adagrad, adam)}
    plain = divided = moved = p
    for t, g in enumerate([g["weight"] for g in random_grads()], 1):
        plain, s = plain - 0.1 * g, g**2 + s
        divided = divided - 0.1 * g / (np.sqrt(s) + 1e-10)
        m, v = (1 - 0.9) * g + 0.9 * m, (1 - 0.999) * g**2 + 0.999 * v
        moved = moved - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        for reference, expected in ((sgd, plain), (adagrad, divided), (adam, moved)):
            assert (paths[reference][t - 1]["weight"] == expected).all()


# ---- Properties of NumPy's functions


@each_case
def test_numpy_functions_are_pure(reference, options):
    params, (g, h) = start(), random_grads(2)
    _, state = reference(params, g, **options)
    kept = copy.deepcopy((params, g, h, state))
    first = reference(params, h, state, **options)
    assert_parity((params, g, h), kept[:3], tol=0)
    assert str(state) == str(kept[3])
    for array in (*params.values(), *g.values()): array[...] = np.nan  # nothing of the arguments lives on in the state
    assert_parity(reference(kept[0], h, state, **options)[0], first[0], tol=0)  # the same again


@given(exponent=st.integers(-3, 3), seed=st.integers(0, 1000))
def test_rulers_cancel_the_scale_of_the_loss(exponent, seed):
    grads = random_grads(5, seed=seed)
    scaled = [{name: 10.0**exponent * g for name, g in step.items()} for step in grads]
    for reference in (adagrad, rmsprop, adam, adamw):
        paths = [numpy_path(reference, g, start(), lr=0.1, eps=0.0)[0] for g in (grads, scaled)]
        assert_parity(paths[1], paths[0], tol=1e-9)


def test_first_step_has_the_length_of_the_rate():
    params, (g,) = start(), random_grads(1)
    for reference in (adagrad, adam):
        new, _ = reference(params, g, lr=0.25, eps=0.0)
        assert_parity({n: new[n] - params[n] for n in new}, {n: -0.25 * np.sign(g[n]) for n in g})


@each_member
def test_numpy_numbers_keep_float32(reference):
    options = {name: np.float64(values[-1]) for name, values in CHOICES[reference].items() if isinstance(values[-1], float)}
    params, state = start(np.float32), None
    for g in random_grads(2, np.float32): params, state = reference(params, g, state, **options)
    assert all(p.dtype == np.float32 for p in params.values())


@each_member
def test_zero_gradients_move_nothing(reference):
    params = start()
    zeros = [{name: np.zeros_like(p) for name, p in params.items()}] * 3
    assert_parity(numpy_path(reference, zeros, params, lr=0.1, weight_decay=0.0)[0][-1], params, tol=0)
    assert_parity(torch_path(OURS[reference], zeros, params, lr=0.1, weight_decay=0.0)[0][-1], params, tol=0)


def test_a_centered_ruler_is_never_the_root_of_a_negative_number():
    "Under a constant gradient the variance is zero but for rounding, which makes torch's negative and its path NaN."
    params, grads = dict(p=np.zeros(50)), [dict(p=np.linspace(0.1, 7, 50))] * 400
    with np.errstate(invalid="raise"): path, _ = numpy_path(rmsprop, grads, params, centered=True, alpha=0.5)
    found, _ = torch_path(RMSprop, grads, params, centered=True, alpha=0.5)
    assert np.isfinite(path[-1]["p"]).all() and np.isfinite(found[-1]["p"]).all()
    assert np.isnan(torch_path(torch.optim.RMSprop, grads, params, centered=True, alpha=0.5)[0][-1]["p"]).any()


# ---- Errors


@each_member
def test_errors_of_numpy_name_the_argument(reference):
    params, (g,) = start(), random_grads(1)
    for lr in (-1.0, math.nan, "0.1", None, np.array([0.1, 0.2])):
        with pytest.raises(ValueError, match="lr: expected .* got"):
            reference(params, g, lr=lr)
    with pytest.raises(ValueError, match="'bias'"):
        reference(params, {"weight": g["weight"], "scalar": g["scalar"]}, lr=0.1)
    with pytest.raises(ValueError, match=r"grads\['bias'\]: expected \(3,\), got \(1,\)"):
        reference(params, {**g, "bias": np.zeros(1)}, lr=0.1)  # would broadcast
    with pytest.raises(TypeError, match=r"grads\['bias'\]: expected a NumPy array, got list"):
        reference(params, {**g, "bias": [0.0, 0.0, 0.0]}, lr=0.1)
    with pytest.raises(TypeError, match=r"params\['w'\]: expected a NumPy array, got Tensor"):
        reference({"w": torch.zeros(2)}, {"w": np.zeros(2)}, lr=0.1)
    with pytest.raises(TypeError, match="float64"):
        reference(params, {**g, "bias": np.zeros(3, np.float32)}, lr=0.1)
    with pytest.raises(TypeError, match="real floats, got complex128"):
        reference({"z": np.zeros(2, complex)}, {"z": np.zeros(2, complex)}, lr=0.1)
    reference(params, {**g, "x": np.zeros(9)}, lr=0.1)  # gradients of other things are passed over


def test_errors_of_a_state_that_does_not_fit():
    params, (g, h) = start(), random_grads(2)
    _, state = adam(params, g)
    with pytest.raises(ValueError, match="state: expected 'square_avg', got"): rmsprop(params, h, state)
    with pytest.raises(ValueError, match="state: expected what an update has returned, got .*'weight'"): adam(params, h, params)
    with pytest.raises(ValueError, match="state: expected 'max_exp_avg_sq', got"): adam(params, h, state, amsgrad=True)
    with pytest.raises(ValueError, match=r"state\['exp_avg'\]\['new'\]: expected \(2,\), got None"):
        adam({**params, "new": np.zeros(2)}, {**h, "new": np.zeros(2)}, state)
    with pytest.raises(ValueError, match=r"state\['exp_avg'\]\['bias'\]: expected \(3,\), got \(1,\)"):
        adam(params, h, {**state, "exp_avg": {**state["exp_avg"], "bias": np.zeros(1)}})


BAD = [(adam, dict(betas=betas)) for betas in [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9,), (math.nan, 0.9), 0.9, None]]
BAD += [(rmsprop, dict(alpha=1.1)), (rmsprop, dict(momentum=-0.1)), (adadelta, dict(rho=-0.1)), (adadelta, dict(rho=math.nan)), (adagrad, dict(lr_decay=-1.0)),
        (adagrad, dict(initial_accumulator_value=-1.0)), (sgd, dict(dampening=1.1)), (sgd, dict(nesterov=True)), (sgd, dict(momentum=math.nan)),
        (sgd, dict(nesterov=True, momentum=0.9, dampening=0.1)), (adamw, dict(weight_decay=-0.1))]
BAD += [(reference, dict(eps=-1.0)) for reference in OURS if reference is not sgd]


@pytest.mark.parametrize("reference, options", BAD)
def test_bad_options_are_named(reference, options):
    p = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=f"{list(options)[0]}: expected"): reference(start(), random_grads(1)[0], lr=0.1, **options)
    with pytest.raises(ValueError, match=f"{list(options)[0]}: expected"): OURS[reference]([p], lr=0.1, **options)
    with pytest.raises(ValueError, match=f"{list(options)[0]}: expected"): OURS[reference]([dict(params=[p], lr=0.1, **options)])


@each_member
def test_ways_to_compute_must_stay_as_they_are(reference):
    p = torch.nn.Parameter(torch.zeros(1))
    ways = [name for name in ("foreach", "fused", "capturable", "differentiable") if name in inspect.signature(OURS[reference]).parameters]
    assert len(ways) >= 3
    for name in ways:
        for make in (lambda: OURS[reference]([p], **{name: True}), lambda: OURS[reference]([{"params": [p], name: True}])):
            with pytest.raises(ValueError, match=f"{name}: expected"): make()
    optimizer = OURS[reference]([p])
    with pytest.raises(ValueError, match="foreach: expected None"): optimizer.load_state_dict(THEIRS[reference]([p], foreach=True).state_dict())
    with pytest.raises(ValueError, match="foreach: expected None, .* got False"): OURS[reference]([p], foreach=False)


@each_member
def test_options_of_others_are_refused_by_name(reference):
    p = torch.nn.Parameter(torch.zeros(1))
    others = {name: values[-1] for choices in CHOICES.values() for name, values in choices.items()} | dict(typo=1)
    for name in set(others) - set(inspect.signature(OURS[reference]).parameters) - ({"decoupled_weight_decay"} if reference is adamw else set()):
        with pytest.raises(TypeError, match=name): OURS[reference]([p], **{name: others[name]})
        with pytest.raises(ValueError, match=f"{name}: {OURS[reference].__name__} has no such option"):
            OURS[reference]([{"params": [p], name: others[name]}])
    for other in set(OURS) - {reference}:
        if {reference, other} == {adam, adamw}: continue  # they understand each other
        optimizer = OURS[reference]([p])
        with pytest.raises(ValueError, match="has no such option"): optimizer.load_state_dict(OURS[other]([p]).state_dict())


def test_a_state_of_another_shape_is_refused_and_nothing_changes():
    def stepped(*sizes):
        parameters = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
        for p in parameters: p.grad = torch.ones_like(p)
        optimizer = Adam([dict(params=[p]) for p in parameters])
        optimizer.step()
        return optimizer
    optimizer, other = stepped(3, 2), stepped(3, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    other.param_groups[0]["lr"] = 0.5
    with pytest.raises(ValueError, match=r"state\[1\]\['exp_avg'\]: expected \(2,\), got \(1,\)"): optimizer.load_state_dict(other.state_dict())
    now = optimizer.state_dict()
    assert now["param_groups"] == saved["param_groups"]
    assert_parity(now["state"][0], saved["state"][0], tol=0)


@each_member
def test_sparse_and_complex_gradients_are_refused_before_anything_changes(reference):
    a, table = torch.nn.Parameter(torch.ones(2)), torch.nn.Embedding(4, 2, sparse=True)
    optimizer, before = OURS[reference]([a, table.weight]), table.weight.detach().clone()
    (table(torch.tensor([1])).sum() + a.sum()).backward()
    with pytest.raises(TypeError, match="grad: expected a dense real tensor, got torch.sparse_coo"): optimizer.step()
    assert torch.equal(a, torch.ones(2)) and torch.equal(table.weight, before) and not optimizer.state
    z = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    z.grad = torch.ones_like(z)
    with pytest.raises(TypeError, match="complex64"): OURS[reference]([z]).step()


# ---- The classes as PyTorch uses them


@each_member
def test_groups_have_options_of_their_own(reference):
    def paths(kind):
        a, b = (torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64)) for _ in range(2))
        extra = {name: values[-1] for name, values in CHOICES[reference].items() if name not in ("initial_accumulator_value", "nesterov", "dampening", "lr")}
        optimizer = kind([dict(params=[a], lr=0.5), dict(params=[b], **extra)], lr=0.1)
        for g in random_grads(5):
            a.grad, b.grad = torch.from_numpy(g["bias"][:2]).clone(), torch.from_numpy(g["bias"][:2]).clone()
            optimizer.step()
        return a, b
    ours, theirs = paths(OURS[reference]), paths(THEIRS[reference])
    assert_parity(ours, theirs, tol=1e-10)
    assert (ours[0] != ours[1]).any()


def test_closure_and_parameters_without_gradient():
    a, b, c = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = SGD([dict(params=[a], lr=0.5), dict(params=[b, c])], lr=0.1)
    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = a.sum() + b.sum()
        loss.backward()
        return loss
    assert optimizer.step(closure) == 4.0 and optimizer.step() is None
    assert_parity((a, b, c), (np.zeros(2), np.full(2, 0.8), np.ones(2)), tol=1e-6)


def test_adam_and_adamw_take_over_from_each_other():
    grads, params = random_grads(6), start()
    for kinds in ((Adam, AdamW), (AdamW, Adam), (torch.optim.Adam, AdamW)):
        expected = taken_over(*(getattr(torch.optim, kind.__name__) for kind in kinds), grads, params, 3, dict(weight_decay=0.3))
        assert_parity(taken_over(*kinds, grads, params, 3, dict(weight_decay=0.3)), expected)
    w = AdamW([torch.nn.Parameter(torch.zeros(1))])
    w.load_state_dict(Adam(w.param_groups[0]["params"]).state_dict())
    assert w.param_groups[0]["decoupled_weight_decay"]


def test_a_copy_goes_on_by_itself():
    params, grads = start(), random_grads(6)
    path, optimizer = torch_path(Adam, grads[:3], params)
    twin = copy.deepcopy(optimizer)
    for o in (optimizer, twin):
        for group in o.param_groups:
            for p, g in zip(group["params"], grads[3].values(), strict=True): p.grad = torch.from_numpy(np.array(g))
        o.step()
    assert_parity(*[[p for group in o.param_groups for p in group["params"]] for o in (optimizer, twin)], tol=0)


def test_old_states_with_fewer_options_load():
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = Adam([p])
    optimizer.load_state_dict(dict(state={}, param_groups=[dict(params=[0], lr=0.5, betas=(0.9, 0.99), eps=1e-8)]))
    p.grad = torch.ones(2)
    optimizer.step()
    assert_parity(p, np.full(2, -0.5), tol=1e-6)


@pytest.mark.parametrize("make", [
    lambda o: lr_scheduler.StepLR(o, 3, gamma=0.5), lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=20),
    lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.5, step_size_up=3), lambda o: torch.optim.swa_utils.SWALR(o, 0.05),
])
def test_torchs_schedules_work_and_their_notes_travel(make):
    def path(kind):
        p = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        optimizer = kind([p], lr=1.0, momentum=0.9)
        schedule = make(optimizer)
        for k in range(10):
            p.grad = torch.tensor(math.sin(k), dtype=torch.float64)
            optimizer.step(); schedule.step()
        other = kind([p])
        other.load_state_dict(optimizer.state_dict())
        return p.item(), other.param_groups[0]["lr"], other.param_groups[0]["initial_lr"]
    assert path(SGD) == pytest.approx(path(torch.optim.SGD), rel=1e-12)


def test_named_parameters():
    module = torch.nn.Linear(2, 1)
    optimizer = Adam(module.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    Adam(module.named_parameters()).load_state_dict(optimizer.state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@each_case
def test_cuda_parity(reference, options):
    expected, _ = numpy_path(reference, random_grads(), start(), **options)
    assert_parity(torch_path(OURS[reference], random_grads(), start(), "cuda", **options)[0], expected, tol=1e-9)


# ---- Schedules


def torch_rates(make, steps, lr, losses=None):
    "The rates of so many steps by a schedule of torch."
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=lr)
    schedule, found = make(optimizer), []
    for k in range(steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step(*([] if losses is None else [losses[k]]))
    return np.array(found)


def rates(schedule, steps): return np.array([schedule(k / steps) for k in range(steps)])


@given(steps=st.integers(4, 60), data=st.data(), factor=st.floats(0.05, 1))
def test_step_schedule(steps, data, factor):
    at = data.draw(st.lists(st.integers(1, steps - 1), max_size=4))
    expected = torch_rates(lambda o: lr_scheduler.MultiStepLR(o, at, factor), steps, 0.3)
    assert_parity(rates(step_schedule(0.3, [k / steps for k in at], factor), steps), expected)


@given(steps=st.integers(2, 60), final=st.floats(0, 1))
def test_cosine_schedule(steps, final):
    expected = torch_rates(lambda o: lr_scheduler.CosineAnnealingLR(o, steps, final), steps, 0.3)
    assert_parity(rates(cosine_schedule(0.3, final), steps), expected, tol=1e-10)
    assert cosine_schedule(0.3, final)(1.0) == pytest.approx(final)


@given(warm=st.integers(1, 20), rest=st.integers(2, 40), start=st.floats(0.01, 1))
def test_warmup_schedule(warm, rest, start):
    def make(o):
        parts = [lr_scheduler.LinearLR(o, start, total_iters=warm), lr_scheduler.CosineAnnealingLR(o, rest)]
        return lr_scheduler.SequentialLR(o, parts, milestones=[warm])
    steps = warm + rest
    found = rates(warmup_schedule(cosine_schedule(0.3), warm / steps, start), steps)
    assert_parity(found, torch_rates(make, steps, 0.3), tol=1e-10)
    constant = rates(warmup_schedule(0.3, warm / steps), steps)
    expected = torch_rates(lambda o: lr_scheduler.LambdaLR(o, lambda k: min(1, k / warm)), steps, 0.3)
    assert_parity(constant, expected)


@settings(max_examples=50)
@given(losses=st.lists(st.floats(0, 2), min_size=1, max_size=60), patience=st.integers(0, 5), factor=st.floats(0.05, 0.95),
       threshold=st.sampled_from([0.0, 1e-4, 0.3]), min_lr=st.sampled_from([0.0, 0.01]), half=st.integers(0, 60))
def test_plateau(losses, patience, factor, threshold, min_lr, half):
    options = dict(factor=factor, patience=patience, threshold=threshold, min_lr=min_lr)
    expected = torch_rates(lambda o: lr_scheduler.ReduceLROnPlateau(o, eps=0.0, **options), len(losses), 0.3, losses)
    plateau, found = Plateau(0.3, **options), []
    for k, loss in enumerate(losses):
        if k == half:  # taken over by another
            saved = plateau.state_dict()
            plateau = Plateau(99.0, **options)
            plateau.load_state_dict(saved)
        found.append(plateau(k / len(losses)))
        plateau.observe(loss)
    assert_parity(np.array(found), expected)


def test_plateau_with_losses_below_zero_and_not_finite():
    plateau = Plateau(1.0, patience=0, threshold=0.1)
    plateau.observe(-1.0); plateau.observe(-1.05)  # not lower by a tenth
    assert plateau.lr == pytest.approx(0.1) and plateau.best == -1.0
    plateau.observe(-1.2)
    assert plateau.best == -1.2
    plateau.observe(math.nan)
    assert plateau.lr == pytest.approx(0.01) and plateau.best == -1.2
    for first in (math.nan, math.inf):  # a first loss that is no number is no best either
        plateau = Plateau(1.0, patience=1)
        plateau.observe(first); plateau.observe(0.5)
        assert (plateau.lr, plateau.best, plateau.bad) == (1.0, 0.5, 0)


def test_warmup_keeps_the_memory_of_a_plateau():
    plateau = Plateau(1.0, patience=0, factor=0.5)
    warm = warmup_schedule(plateau, 0.5)
    warm.observe(1.0); warm.observe(2.0)
    assert (warm(0.25), warm(0.75)) == (0.25, 0.5)
    other = warmup_schedule(Plateau(1.0), 0.5)
    other.load_state_dict(warm.state_dict())
    assert other(0.75) == 0.5
    assert not hasattr(warmup_schedule(0.1), "observe")


@pytest.mark.parametrize("make, name", [
    (lambda: step_schedule(-1.0), "lr"), (lambda: step_schedule(1.0, (2.0,)), "drops"), (lambda: step_schedule(1.0, 0.5), "drops"), (lambda: step_schedule(1.0, factor=-1), "factor"),
    (lambda: cosine_schedule(math.nan), "lr"), (lambda: cosine_schedule(1.0, -0.1), "final"), (lambda: warmup_schedule(-1.0), "schedule"),
    (lambda: warmup_schedule(1.0, 1.0), "share"), (lambda: warmup_schedule(1.0, start=-1.0), "start"), (lambda: Plateau(-1.0), "lr"),
    (lambda: Plateau(1.0, factor=1.0), "factor"), (lambda: Plateau(1.0, patience=-1), "patience"), (lambda: Plateau(1.0).load_state_dict({}), "state_dict"),
])
def test_errors_of_schedules(make, name):
    with pytest.raises(ValueError, match=f"{name}: expected"): make()


def test_a_plateau_is_plain_data():
    assert asdict(Plateau(0.1)) == dict(lr=0.1, factor=0.1, patience=10, threshold=1e-4, min_lr=0.0, best=None, bad=0)
    with pytest.raises(TypeError): Plateau(0.1, 0.5)
