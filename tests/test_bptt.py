"""Backpropagation through time: NumPy = PyTorch = torch.nn, central differences, and the rules for lengths and padding."""
import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rnnbook.bptt import DERIVATIVES, TORCH_DERIVATIVES, BPTTLayer, RNNFunction, rnn_backward
from rnnbook.rnn import ACTIVATIONS, RNNLayer, numpy_params, rnn_forward, rnn_init
from rnnbook.testing import assert_parity, gradient_check, parity_tolerance

NAMES = {"weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"}


def pair(nonlinearity="tanh", bias=True, I=3, H=5, seed=0):
    "`torch.nn.RNN` and our layer with the same weights, float64."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        theirs = torch.nn.RNN(I, H, bias=bias, nonlinearity=nonlinearity, dtype=torch.float64)
        torch.manual_seed(seed)
        ours = BPTTLayer(I, H, bias=bias, nonlinearity=nonlinearity, dtype=torch.float64)
    return theirs, ours


def layer_of(params, kind=BPTTLayer, **options):
    "A layer with the weights of a NumPy dict."
    H, I = params["weight_ih_l0"].shape
    layer = kind(I, H, bias="bias_ih_l0" in params, dtype=torch.from_numpy(params["weight_ih_l0"]).dtype, **options)
    layer.load_state_dict({f"cell.{name.removesuffix('_l0')}": torch.tensor(p) for name, p in params.items() if name in NAMES})
    return layer


def problem(T, B, I=3, H=5, seed=0):
    "Inputs, an initial state, and a gradient for each answer."
    rng = np.random.default_rng([seed, T, B])
    shapes = (T, B, I), (1, B, H), (T, B, H), (1, B, H)
    return [rng.standard_normal(shape) for shape in shapes]


def torch_answers(module, x, h0, d_output, d_state, **options):
    "Outputs and gradients by autograd: (output, state), (x, h0, parameters ...)."
    x, h0 = torch.tensor(x, requires_grad=True), None if h0 is None else torch.tensor(h0, requires_grad=True)
    module.zero_grad()
    output, state = module(x, h0, **options)
    answers, grads = (output, state), (torch.from_numpy(d_output), torch.from_numpy(d_state))
    torch.autograd.backward(answers, grads)
    return answers, (x.grad, *([] if h0 is None else [h0.grad]), *(p.grad for p in module.parameters()))


class Packed(torch.nn.Module):
    "`torch.nn.RNN` behind our face: through a packed sequence where there are lengths."
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, h0, *, lengths=None):
        if lengths is None:
            return self.rnn(x, h0)
        packed, state = self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False), h0)
        return pad_packed_sequence(packed, total_length=len(x))[0], state


GRID = list(itertools.product(("tanh", "relu"), (True, False), (1, 2, 13, 200), (1, 4), (False, True), (False, True)))


@pytest.mark.parametrize("nonlinearity, bias, T, B, carried, unequal", GRID)
def test_answers_and_gradients_equal_torch(nonlinearity, bias, T, B, carried, unequal):
    theirs, ours = pair(nonlinearity, bias)
    x, h0, d_output, d_state = problem(T, B)
    h0 = h0 if carried else None
    lengths = np.random.default_rng(T).integers(1, T + 1, B).tolist() if unequal else None
    expected, expected_grads = torch_answers(Packed(theirs), x, h0, d_output, d_state, lengths=lengths)
    answers, grads = torch_answers(ours, x, h0, d_output, d_state, lengths=lengths)
    assert_parity(answers, expected, tol=1e-12)
    assert_parity(grads, expected_grads, tol=1e-9)
    params = numpy_params(theirs)
    output, state, tape = rnn_forward(x, params, h0, lengths=lengths, nonlinearity=nonlinearity)
    by_hand = rnn_backward(d_output, d_state, tape)
    assert_parity((output, state), expected, tol=1e-12)
    assert set(by_hand) == {"x", "h0", *params}
    names = ["x", *(["h0"] if carried else []), *params]
    assert_parity(tuple(by_hand[name] for name in names), expected_grads, tol=1e-9)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "sigmoid"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lengths", [None, [5, 1, 0, 4]])
@pytest.mark.parametrize("seen", ["output", "state", "both"])
def test_numpy_gradients_pass_central_differences(nonlinearity, bias, lengths, seen):
    x, h0, d_output, d_state = problem(5, 4)
    d_output, d_state = d_output if seen != "state" else None, d_state if seen != "output" else None
    point = {"x": x, "h0": h0, **rnn_init(3, 5, rng=np.random.default_rng(1), bias=bias)}

    def forward(at): return rnn_forward(at["x"], at, at["h0"], lengths=lengths, nonlinearity=nonlinearity)

    def loss(at):
        output, state, _ = forward(at)
        return (0 if d_output is None else (d_output * output).sum()) + (0 if d_state is None else (d_state * state).sum())

    errors = gradient_check(loss, point, rnn_backward(d_output, d_state, forward(point)[2]), tol=1e-6)
    assert set(errors) == set(point)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "sigmoid"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lengths", [None, [4, 1, 0]])
def test_function_passes_gradcheck(nonlinearity, bias, lengths):
    rng = np.random.default_rng(2)
    params = rnn_init(2, 3, rng=rng, bias=bias)
    x, h0 = rng.standard_normal((4, 3, 2)), rng.standard_normal((3, 3))
    mask = None if lengths is None else torch.arange(4)[:, None, None] < torch.tensor(lengths)[:, None]
    leaves = [torch.tensor(a, requires_grad=True) for a in (x, h0, *params.values())]
    biases = () if bias else (None, None)
    assert torch.autograd.gradcheck(lambda *t: RNNFunction.apply(*t, *biases, mask, nonlinearity), leaves)


@pytest.mark.parametrize("tile", [1, 3, 7, 100])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "sigmoid"])
@pytest.mark.parametrize("lengths", [None, [13, 5, 0, 6]])
def test_tiles_of_any_size_give_the_same_gradients(tile, nonlinearity, lengths, monkeypatch):
    monkeypatch.setattr("rnnbook.bptt._TILE", tile * 4 * 5)  # `tile` steps at a time
    params, (x, h0, d_output, d_state) = rnn_init(3, 5, rng=np.random.default_rng(0)), problem(13, 4)
    _, grads = torch_answers(layer_of(params, nonlinearity=nonlinearity), x, h0, d_output, d_state, lengths=lengths)
    tape = rnn_forward(x, params, h0, lengths=lengths, nonlinearity=nonlinearity)[2]
    assert_parity(grads, tuple(rnn_backward(d_output, d_state, tape).values()))


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "sigmoid"])
def test_slopes(nonlinearity):
    a = np.array([-2.0, -0.5, -1e-3, 1e-3, 0.4, 3.0])
    f = ACTIVATIONS[nonlinearity]
    assert_parity(DERIVATIVES[nonlinearity](f(a)), (f(a + 1e-6) - f(a - 1e-6)) / 2e-6, tol=1e-8)
    assert_parity(TORCH_DERIVATIVES[nonlinearity](torch.from_numpy(f(a))), DERIVATIVES[nonlinearity](f(a)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 8), st.integers(0, 4), st.sampled_from(["tanh", "relu", "sigmoid"]), st.data())
def test_each_sequence_as_if_alone_whatever_the_padding_holds(T, B, nonlinearity, data):
    "Bit for bit the same with NaN in the padding of x and of d_output; zeros leave it; T = 0, B = 0 and length 0 work."
    lengths = data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
    params = rnn_init(2, 3, rng=np.random.default_rng(B))
    x, h0, d_output, d_state = problem(T, B, 2, 3)
    bad_x, bad_d = x.copy(), d_output.copy()
    for b, n in enumerate(lengths):
        bad_x[n:, b] = bad_d[n:, b] = np.nan
    tape, bad_tape = (rnn_forward(a, params, h0, lengths=lengths, nonlinearity=nonlinearity)[2] for a in (x, bad_x))
    grads, bad_grads = rnn_backward(d_output, d_state, tape), rnn_backward(bad_d, d_state, bad_tape)
    assert all(np.array_equal(grads[name], bad_grads[name]) for name in grads)
    layer = layer_of(params, nonlinearity=nonlinearity)
    clean = torch_answers(layer, x, h0, d_output, d_state, lengths=lengths)
    dirty = torch_answers(layer, bad_x, h0, bad_d, d_state, lengths=lengths)
    assert all(torch.equal(a, b) for a, b in zip((*clean[0], *clean[1]), (*dirty[0], *dirty[1]), strict=True))
    assert_parity(clean[1], tuple(grads.values()), tol=1e-12)
    summed = {name: np.zeros_like(p) for name, p in params.items()}
    for b, n in enumerate(lengths):
        assert (grads["x"][n:, b] == 0).all() and (clean[1][0][n:, b] == 0).all()
        _, _, tape = rnn_forward(x[:n, b:b + 1], params, h0[:, b:b + 1], nonlinearity=nonlinearity)
        alone = rnn_backward(d_output[:n, b:b + 1], d_state[:, b:b + 1], tape)
        assert_parity(grads["x"][:n, b:b + 1], alone["x"])
        assert_parity(grads["h0"][:, b:b + 1], alone["h0"])
        for name in summed:
            summed[name] += alone[name]
        if n == 0:
            assert np.array_equal(grads["h0"][:, b], d_state[:, b])
    assert_parity({name: grads[name] for name in summed}, summed)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "sigmoid"])
@pytest.mark.parametrize("lengths", [None, [6, 4, 3]])
def test_nan_stays_in_its_row(nonlinearity, lengths):
    params = rnn_init(3, 5, rng=np.random.default_rng(0))
    x, h0, d_output, d_state = problem(6, 3)
    bad = x.copy()
    bad[2, 1] = np.nan
    layer, others = layer_of(params, nonlinearity=nonlinearity), [0, 2]
    clean, dirty = (torch_answers(layer, a, h0, d_output, d_state, lengths=lengths) for a in (x, bad))
    for a, b in zip((*clean[0], *clean[1][:2]), (*dirty[0], *dirty[1][:2]), strict=True):  # outputs, and gradients of x and h0
        assert torch.equal(a[:, others], b[:, others])
    clean, dirty = (rnn_backward(d_output, d_state, rnn_forward(a, params, h0, lengths=lengths, nonlinearity=nonlinearity)[2]) for a in (x, bad))
    assert all(np.array_equal(clean[name][:, others], dirty[name][:, others]) for name in ("x", "h0"))
    bad = d_output.copy()
    bad[1, 1] = np.nan  # the same for a gradient
    dirty = rnn_backward(bad, d_state, rnn_forward(x, params, h0, lengths=lengths, nonlinearity=nonlinearity)[2])
    assert all(np.array_equal(clean[name][:, others], dirty[name][:, others]) for name in ("x", "h0"))


def test_arguments_are_left_alone():
    params, (x, h0, d_output, d_state) = rnn_init(3, 5, rng=np.random.default_rng(0)), problem(6, 3)
    _, _, tape = rnn_forward(x, params, h0, lengths=[6, 2, 0])
    before = copy.deepcopy((d_output, d_state, tape))
    first = rnn_backward(d_output, d_state, tape)
    second = rnn_backward(d_output, d_state, tape)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert np.array_equal(d_output, before[0]) and np.array_equal(d_state, before[1])
    for name in ("x", "h", "mask"):
        assert np.array_equal(tape[name], before[2][name])
    assert not any(np.shares_memory(a, b) for a, b in itertools.combinations(first.values(), 2))
    for grad in first.values():
        grad += 1  # nor do the gradients share memory with the tape
    assert np.array_equal(tape["h"], before[2]["h"]) and np.array_equal(tape["x"], before[2]["x"])


@pytest.mark.parametrize("lengths", [None, [6, 2, 0]])
def test_layer_leaves_arguments_alone_and_runs_backward_twice(lengths):
    layer = layer_of(rnn_init(3, 5, rng=np.random.default_rng(0)))
    x, h0, d_output, d_state = (torch.tensor(a) for a in problem(6, 3))
    leaves = x.requires_grad_(), h0.requires_grad_()
    before = [t.detach().clone() for t in (x, h0, d_output, d_state)]
    answers = layer(*leaves, lengths=lengths)
    first = torch.autograd.grad(answers, leaves, (d_output, d_state), retain_graph=True)
    second = torch.autograd.grad(answers, leaves, (d_output, d_state))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((x, h0, d_output, d_state), before, strict=True))


def test_gradients_do_not_share_memory():
    layer = BPTTLayer(3, 5)
    layer(torch.ones(4, 2, 3))[0].sum().backward()
    pointers = [p.grad.untyped_storage().data_ptr() for p in layer.parameters()]
    assert len(set(pointers)) == 4
    layer.cell.bias_ih.grad.zero_()
    assert layer.cell.bias_hh.grad.abs().sum() > 0


@pytest.mark.parametrize("used", ["output", "state"])
def test_an_unused_answer_counts_as_zero(used):
    params, (x, h0, d_output, d_state) = rnn_init(3, 5, rng=np.random.default_rng(0)), problem(6, 3)
    _, _, tape = rnn_forward(x, params, h0)
    zero = rnn_backward(d_output, 0 * d_state, tape) if used == "output" else rnn_backward(0 * d_output, d_state, tape)
    none = rnn_backward(d_output, None, tape) if used == "output" else rnn_backward(None, d_state, tape)
    assert_parity(none, zero)
    layer, x, h0 = layer_of(params), torch.tensor(x, requires_grad=True), torch.tensor(h0, requires_grad=True)
    answer = layer(x, h0)[used == "state"]
    answer.backward(torch.tensor(d_output if used == "output" else d_state))
    assert_parity((x.grad, h0.grad), (zero["x"], zero["h0"]))
    nothing = rnn_backward(None, None, tape)
    assert all((grad == 0).all() and grad.dtype == np.float64 for grad in nothing.values())


@pytest.mark.parametrize("frozen", ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "all", "none"])
@pytest.mark.parametrize("x_needs", [True, False])
def test_only_what_is_needed_is_computed(frozen, x_needs):
    _, layer = pair()
    x = torch.ones(4, 2, 3, dtype=torch.float64, requires_grad=x_needs)
    for name, parameter in layer.cell.named_parameters():
        parameter.requires_grad_(frozen not in (name, "all"))
    output, _ = layer(x)
    assert output.requires_grad == (x_needs or frozen != "all")
    if output.requires_grad:
        output.sum().backward()
    assert (x.grad is not None) == x_needs
    for name, parameter in layer.cell.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad


def test_no_gradient_nothing_kept():
    layer, saved = BPTTLayer(3, 5), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), torch.no_grad():
        output, state = layer(torch.ones(4, 2, 3))
    assert not saved and not output.requires_grad
    output += 1  # without a tape the answer is the caller's own
    assert not torch.equal(output[-1], state[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lengths", [None, [7, 2, 0]])
def test_other_precisions(dtype, lengths):
    params, (x, h0, d_output, d_state) = rnn_init(3, 5, rng=np.random.default_rng(0)), problem(7, 3)
    exact = layer_of(params)
    answers, grads = torch_answers(exact, x, h0, d_output, d_state, lengths=lengths)
    layer = copy.deepcopy(exact).to(dtype)
    leaves = [torch.tensor(a).to(dtype).requires_grad_() for a in (x, h0)]
    rough = layer(*leaves, lengths=lengths)
    torch.autograd.backward(rough, [torch.tensor(a).to(dtype) for a in (d_output, d_state)])
    rough_grads = [leaf.grad for leaf in leaves] + [p.grad for p in layer.parameters()]
    assert all(t.dtype == dtype for t in (*rough, *rough_grads))
    tol = parity_tolerance(dtype, 8)  # far fewer than the T (I + H) that would be allowed: rounding errors mostly cancel
    for a, b in zip((*rough, *rough_grads), (*answers, *grads), strict=True):
        assert_parity(a.double(), b, tol=tol)


def test_float32_stays_float32():
    params = rnn_init(3, 4, rng=np.random.default_rng(0), dtype=np.float32)
    output, state, tape = rnn_forward(np.ones((5, 2, 3), np.float32), params, lengths=[5, 3])
    assert {grad.dtype for grad in rnn_backward(output, state, tape).values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_answers_as_the_plain_layer(dtype):
    _, ours = pair()
    ours = ours.float()
    plain = RNNLayer(3, 5)
    plain.load_state_dict(ours.state_dict())
    x = torch.from_numpy(problem(6, 2)[0]).float()
    with torch.autocast("cpu", dtype=dtype):
        answers, expected = ours(x), plain(x)
    assert [t.dtype for t in answers] == [dtype] * 2 == [t.dtype for t in expected]
    for a, b in zip(answers, expected, strict=True):
        assert_parity(a.detach().double(), b.detach().double(), tol=parity_tolerance(dtype, 8))
    answers[0].sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


def test_layer_has_the_face_of_the_plain_one():
    theirs, ours = pair()
    plain = RNNLayer(3, 5, dtype=torch.float64)
    assert list(ours.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(ours.state_dict())
    assert all((numpy_params(ours)[name] == p).all() for name, p in numpy_params(theirs).items())  # drawn like torch.nn's
    first = BPTTLayer(3, 5, batch_first=True, dtype=torch.float64)
    first.load_state_dict(ours.state_dict())
    x, h0, d_output, d_state = problem(6, 2)
    answers, grads = torch_answers(ours, x, h0, d_output, d_state, lengths=[6, 4])
    turned, turned_grads = torch_answers(first, x.swapaxes(0, 1).copy(), h0, d_output.swapaxes(0, 1).copy(), d_state, lengths=[6, 4])
    assert torch.equal(turned[0].transpose(0, 1), answers[0]) and torch.equal(turned[1], answers[1])
    assert_parity((turned_grads[0].transpose(0, 1), *turned_grads[1:]), grads)
    expected, expected_grads = torch_answers(plain, x, h0, d_output, d_state, lengths=[6, 4])
    assert_parity(answers, expected)
    assert_parity(grads, expected_grads)


def test_state_carries_and_is_not_detached():
    _, layer = pair()
    x = torch.from_numpy(problem(6, 2)[0])
    whole, final = layer(x)
    first, carried = layer(x[:4])
    second, end = layer(x[4:], carried)
    assert_parity((torch.cat([first, second]), end), (whole, final))
    grads = torch.autograd.grad(final.sum(), layer.cell.weight_hh), torch.autograd.grad(end.sum(), layer.cell.weight_hh)
    assert_parity(grads[1], grads[0])


def test_a_second_derivative_is_refused():
    layer, x = BPTTLayer(3, 5), torch.ones(4, 2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="create_graph: expected False"):
        torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)


def test_changing_the_kept_states_is_refused():
    layer = BPTTLayer(3, 5)
    output, _ = layer(torch.ones(4, 2, 3))
    with pytest.raises(RuntimeError, match="inplace"):
        output += 1
        output.sum().backward()


TAPE = rnn_forward(np.zeros((5, 2, 3)), rnn_init(3, 4, rng=np.random.default_rng(0)))[2]


@pytest.mark.parametrize("d_output, d_state, error, message", [
    (np.zeros((4, 2, 4)), None, ValueError, r"d_output: expected \(5, 2, 4\), got \(4, 2, 4\)"),
    (np.zeros((5, 2)), None, ValueError, r"d_output: expected \(5, 2, 4\), got \(5, 2\)"),
    (np.zeros((5, 2, 4), np.float32), None, TypeError, r"d_output: expected float64 like the states, got float32"),
    (None, np.zeros((2, 4)), ValueError, r"d_state: expected \(1, 2, 4\), got \(2, 4\)"),
    (None, np.zeros((1, 2, 4), int), TypeError, r"d_state: expected float64 like the states, got int64"),
])
def test_errors_name_the_argument(d_output, d_state, error, message):
    with pytest.raises(error, match=message):
        rnn_backward(d_output, d_state, TAPE)


@pytest.mark.parametrize("x, state, lengths, error, message", [
    (torch.zeros(5, 3), None, None, ValueError, r"x: expected \(T, B, I\) with I = 3, got \(5, 3\)"),
    (torch.zeros(5, 2, 3, dtype=torch.float64), None, None, TypeError, r"x: expected torch.float32"),
    (torch.zeros(5, 2, 3), torch.zeros(1, 1, 4), None, ValueError, r"h0: expected \(1, 2, 4\), got \(1, 1, 4\)"),
    (torch.zeros(5, 2, 3), torch.zeros(1, 2, 4, dtype=torch.float64), None, TypeError, r"h0: expected torch.float32 .* got torch.float64"),
    (torch.zeros(5, 2, 3), None, [5, 6], ValueError, r"lengths: expected"),
])
def test_layer_errors_name_the_argument(x, state, lengths, error, message):
    with pytest.raises(error, match=message):
        BPTTLayer(3, 4)(x, state, lengths=lengths)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "sigmoid"])
@pytest.mark.parametrize("lengths", [None, [7, 0, 3]])
def test_cuda_equals_numpy(nonlinearity, lengths):
    params, (x, h0, d_output, d_state) = rnn_init(3, 5, rng=np.random.default_rng(0)), problem(7, 3)
    layer = layer_of(params, nonlinearity=nonlinearity).cuda()
    leaves = [torch.tensor(a, device="cuda", requires_grad=True) for a in (x, h0)]
    answers = layer(*leaves, lengths=lengths)
    torch.autograd.backward(answers, [torch.tensor(a, device="cuda") for a in (d_output, d_state)])
    output, state, tape = rnn_forward(x, params, h0, lengths=lengths, nonlinearity=nonlinearity)
    assert_parity(answers, (output, state), tol=1e-10)
    grads = tuple(leaf.grad for leaf in leaves) + tuple(p.grad for p in layer.parameters())
    assert_parity(grads, tuple(rnn_backward(d_output, d_state, tape).values()), tol=1e-10)
