"The instruments of the clinic: every patient is caught, no control is, on seeds the chapter does not use."
import ast
import json
import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

from rnnbook.debugging import ActivationReport, activation_report, influence, loss_by_shift, overfit_one_batch, update_ratio
from rnnbook.feedforward import softmax_cross_entropy
from rnnbook.training import History

matplotlib.use("agg")
NOTEBOOK = Path(__file__).resolve().parent.parent / "nbs" / "09_debugging.ipynb"


def defines(source):
    "Does a cell hold definitions, imports or cases, and nothing that runs them?"
    if source.startswith("#| default_exp") or "Solution" in "".join(source.splitlines()[:2]):
        return False
    def harmless(node):
        if isinstance(node, ast.Assign):
            name = ast.unparse(node.targets[0])
            return name.startswith(("patient_", "control_")) or name.isupper()
        return isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)) or ast.unparse(node) == "use_style()"
    return all(map(harmless, ast.parse(source).body))


@pytest.fixture(scope="module")
def clinic():
    "The patients and controls as they stand on the page; plots keep the style they had."
    names = {}
    with matplotlib.rc_context():
        for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and defines(source) and "LAG" not in source:
                exec(compile(source, "09_debugging", "exec"), names)
    unseen, _ = next(names["chain"](np.random.default_rng(0), steps=100))
    def shifts(module):
        with torch.no_grad():
            return loss_by_shift(module(torch.from_numpy(unseen))[0], unseen)
    names["shifts"] = shifts
    return names


CAUGHT = {1: {"by heart", "gradient"}, 2: {"by heart", "dead units"}, 3: {"by heart", "update"},
          4: {"influence"}, 5: {"influence"}, 6: {"shift"}}


@pytest.mark.parametrize("k", CAUGHT)
def test_every_patient_is_caught_and_no_control(clinic, k):
    "Every instrument that applies, on five seeds that the page has not seen: exactly the expected alarms."
    for who, expected in (("patient", CAUGHT[k]), ("control", set())):
        case = clinic["CASES"][k][who]
        for seed in range(10, 15):
            model, history = clinic["treat"](case, seed, steps=80)
            found = clinic["readings"](k, case, model, seed)
            assert {name for name, alarm in found.items() if alarm} == expected, (who, seed, found)
            assert min(history["loss"]) < history["loss"][0]  # patients too: nothing crashes, and the loss falls


def test_patients_and_controls_start_alike(clinic):
    "A control differs by the fault alone: the same weights, and for all but patients 2 and 6 the same first loss."
    for k, case in clinic["CASES"].items():
        losses = [clinic["treat"](case[who], 3, steps=1)[1]["loss"][0] for who in ("patient", "control")]
        if k in (1, 3, 4):
            assert losses[0] == pytest.approx(losses[1], abs=1e-6)


# ---- overfit_one_batch


class Straight(torch.nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1, bias=bias).double()
        torch.nn.init.zeros_(self.linear.weight)


def square(module, batch, state):
    x, y = batch
    return ((module.linear(x) - y) ** 2).mean(), None


@pytest.mark.parametrize("bias, learned", [(True, True), (False, False)])
def test_overfitting_tells_a_model_that_can_from_one_that_cannot(bias, learned):
    torch_state = torch.get_rng_state()
    with torch.random.fork_rng():
        module = Straight(bias)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    x = torch.tensor([[-1.0], [1.0]]).double()
    history = overfit_one_batch(module, square, (x, x + 1), lr=0.1)
    assert isinstance(history, History) and len(history["loss"]) == 200
    assert (history["loss"][-1] < 1e-3) == learned
    assert all((before[name] == p).all() for name, p in module.named_parameters())  # a copy was trained
    assert (torch.get_rng_state() == torch_state).all()


def test_overfitting_uses_the_options_given():
    calls = []
    def loss(params, batch, state):
        calls.append(state)
        return float(params["w"] ** 2), {"w": 2 * params["w"]}, "carried"
    def still(params, grads, state=None, *, lr):
        assert lr == 0.5 and abs(grads["w"]) <= 0.1 + 1e-9
        return params, None
    params = {"w": np.array(3.0)}
    history = overfit_one_batch(params, loss, None, optimizer=still, lr=0.5, max_norm=0.1, steps=7)
    assert history["loss"] == [9.0] * 7 and params["w"] == 3.0
    assert calls == [None] * 7  # each reading of the batch starts afresh


# ---- update_ratio


def test_update_ratio_is_a_share_of_the_norm():
    rng = np.random.default_rng(0)
    old = {"a": rng.standard_normal((3, 4)), "b": torch.randn(5, generator=torch.Generator().manual_seed(0), requires_grad=True)}
    new = {"a": 1.25 * old["a"], "b": (old["b"] * 0.5).detach()}
    ratios = update_ratio(old, new)
    assert ratios["a"] == pytest.approx(0.25) and ratios["b"] == pytest.approx(0.5)
    assert update_ratio({"z": np.zeros(2)}, {"z": np.zeros(2)}) == {"z": 0.0}
    assert update_ratio({"z": np.zeros(2)}, {"z": np.ones(2)}) == {"z": math.inf}


@pytest.mark.parametrize("after, complaint", [({}, "after: expected"), ({"a": np.ones(3)}, r"after\['a'\]: expected \(2,\), got \(3,\)")])
def test_update_ratio_refuses_what_does_not_fit(after, complaint):
    with pytest.raises(ValueError, match=complaint):
        update_ratio({"a": np.ones(2)}, after)


# ---- activation_report


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "sigmoid"])
def test_dead_and_flat_are_counted(nonlinearity, seed):
    "Five units that live, three that stand still: the count is exact, and without those three there is no alarm."
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((12, 6, 8))
    f = {"tanh": np.tanh, "relu": lambda a: np.maximum(a, 0), "sigmoid": lambda a: 1 / (1 + np.exp(-a))}[nonlinearity]
    assert activation_report(f(a), nonlinearity).dead == 0
    a[..., :3] = -20.0
    report = activation_report(f(a), nonlinearity)
    assert report.dead == 3 / 8
    assert report.flat == pytest.approx(np.mean(np.concatenate([np.ones((12, 6, 3)), a[..., 3:] <= 0 if nonlinearity == "relu" else 0 * a[..., 3:]], -1)), abs=0.05)
    assert isinstance(report, ActivationReport)
    assert activation_report(torch.from_numpy(f(a)), nonlinearity) == report


def test_padding_does_not_count():
    states = np.random.default_rng(0).uniform(-0.5, 0.5, (6, 3, 4))
    states[4:, 1], states[2:, 2] = np.nan, np.nan
    report = activation_report(states, lengths=[6, 4, 2])
    inside = np.concatenate([states[:, 0], states[:4, 1], states[:2, 2]])
    assert report.mean == pytest.approx(inside.mean()) and report.std == pytest.approx(inside.std())
    assert (report.dead, report.flat) == (0, 0)


@pytest.mark.parametrize("states, lengths", [(np.zeros((3, 4)), None), (np.zeros((1, 1, 4)), None), (np.zeros((3, 2, 4)), [0, 1])])
def test_too_little_to_report_is_refused(states, lengths):
    with pytest.raises(ValueError, match="states: expected"):
        activation_report(states, lengths=lengths)


def test_an_unknown_nonlinearity_is_refused():
    with pytest.raises(ValueError, match="nonlinearity: expected one of 'tanh', 'relu', 'sigmoid', got 'gelu'"):
        activation_report(np.zeros((3, 2, 4)), "gelu")


# ---- influence


@pytest.mark.parametrize("seed", range(5))
def test_influence_finds_exactly_what_is_connected(seed):
    "A random linear map over the steps: an entry of the table is zero exactly where the map is."
    rng = np.random.default_rng(seed)
    connected = rng.random((6, 5)) < 0.4
    weights = np.where(connected, rng.uniform(0.5, 1, (6, 5)), 0)  # (from, to)
    x = rng.standard_normal((6, 3, 2))
    copy = x.copy()
    table = influence(lambda x: np.einsum("sbi,st->tbi", x, weights), x)
    np.testing.assert_allclose(table, weights, atol=1e-12)
    np.testing.assert_allclose(influence(lambda x: np.einsum("sbi,st->tbi", x, weights), x, nudge=-0.5), weights / 2, atol=1e-12)
    assert (x == copy).all()


def test_influence_works_along_each_axis_and_on_tensors():
    x = torch.zeros(4, 3, 2)
    mixed = influence(lambda x: x + x.roll(1, dims=1), x, axis=1)
    assert (mixed == np.eye(3) + np.eye(3)[[1, 2, 0]]).all()
    assert (influence(lambda x: x, x, axis=2) == np.eye(2)).all() and (x == 0).all()
    for axis in (-1, 3):
        with pytest.raises(ValueError, match=r"axis: expected 0 to 2"):
            influence(lambda x: x, x, axis=axis)


# ---- loss_by_shift


@pytest.mark.parametrize("k", [-2, -1, 0, 1, 2, 3])
def test_the_best_shift_is_the_one_learned(k):
    for seed in range(5):
        ids = np.random.default_rng(seed).integers(0, 7, (15, 4))
        logits = 5.0 * np.eye(7)[np.roll(ids, -k, axis=0)]
        losses = loss_by_shift(logits, ids)
        assert min(losses, key=losses.get) == k
        assert losses == loss_by_shift(torch.from_numpy(logits), torch.from_numpy(ids))


def test_shift_one_is_the_loss_of_the_next_token():
    rng = np.random.default_rng(0)
    ids, logits = rng.integers(0, 5, (9, 2)), rng.standard_normal((9, 2, 5))
    losses = loss_by_shift(logits, ids, shifts=[0, 1, -8])
    assert losses[0] == softmax_cross_entropy(logits, ids)[0]
    assert losses[1] == softmax_cross_entropy(logits[:-1], ids[1:])[0]
    assert losses[-8] == softmax_cross_entropy(logits[8:], ids[:1])[0]
    with pytest.raises(ValueError, match="T = 9"):
        loss_by_shift(logits, ids, shifts=[-9])
    with pytest.raises(ValueError, match=r"ids: expected \(9, 2\), got \(9, 1\)"):
        loss_by_shift(logits, ids[:, :1])


# ---- what each instrument accepts, and what it says to what it does not


def test_bfloat16_and_gradients_are_read():
    half = torch.full((3, 2, 4), 0.5, dtype=torch.bfloat16, requires_grad=True)
    assert activation_report(half) == ActivationReport(1.0, 0.0, 0.5, 0.0)
    assert update_ratio({"a": half}, {"a": 2 * half}) == {"a": 1.0}
    for x in (half, 2 * half):  # a leaf and a result of the graph
        assert (influence(lambda x: x, x) == np.eye(3)).all()
    logits = torch.zeros(5, 2, 4, dtype=torch.bfloat16)
    assert loss_by_shift(logits, torch.zeros(5, 2, dtype=torch.int64), shifts=[0])[0] == pytest.approx(math.log(4))


def test_the_size_of_a_step_does_not_overflow():
    large = np.full(10, 1e30, np.float32)
    assert update_ratio({"a": large}, {"a": 2 * large})["a"] == pytest.approx(1)


def test_influence_reads_numbers_verdicts_and_lists():
    integers = np.zeros((3, 2, 1), int)
    assert (influence(lambda x: x, integers) == np.eye(3)).all()
    assert (influence(lambda x: x, torch.from_numpy(integers)) == np.eye(3)).all()
    assert (influence(lambda x: x > 0.5, integers.astype(float)) == np.eye(3)).all()
    assert (influence(np.cumsum, [1.0, 2.0]) == np.triu(np.ones((2, 2)))).all()
    assert influence(lambda x: x[:2], np.zeros((0, 2, 1))).shape == (0, 0)
    def greedy(x):  # a network that writes into its input must not spoil the next reading
        x += 1
        return x
    assert (influence(greedy, integers) == np.eye(3)).all() and not integers.any()


@pytest.mark.parametrize("call, kind, complaint", [
    (lambda: influence(lambda x: (x, x), np.zeros((3, 2, 1))), TypeError, "the output of forward: expected an array or a tensor, got a tuple of 2"),
    (lambda: influence(lambda x: x.sum(), np.zeros((3, 2, 1))), ValueError, r"the output of forward: expected an axis 0, got \(\)"),
    (lambda: activation_report((np.zeros((3, 2, 4)), None)), TypeError, "states: expected an array or a tensor, got a tuple of 2"),
    (lambda: activation_report(np.zeros((3, 2, 0))), ValueError, r"states: expected at least \(2, 1\), got \(6, 0\)"),
    (lambda: activation_report(np.zeros((3, 0, 4))), ValueError, r"states: expected at least \(2, 1\), got \(0, 4\)"),
    (lambda: activation_report(np.zeros((0, 2, 4))), ValueError, r"states: expected at least \(2, 1\), got \(0, 4\)"),
    (lambda: activation_report(np.zeros((3, 2, 4)), lengths=[3]), ValueError, r"lengths: expected \(2,\), got \(1,\)"),
    (lambda: activation_report(np.full((3, 2, 4), np.nan)), ValueError, "states: expected finite values"),
    (lambda: loss_by_shift(np.zeros((5, 4)), np.zeros(5, int)), ValueError, r"logits: expected \(T, B, V\), got \(5, 4\)"),
    (lambda: overfit_one_batch(square, {"a": np.ones(1)}, None), TypeError, "model: expected a dict or a module, got function"),
])
def test_a_wrong_argument_is_named(call, kind, complaint):
    with pytest.raises(kind, match=complaint):
        call()
