"""Two directions: NumPy = PyTorch = torch.nn for every cell and merge, lengths, states, gradients, and errors; and the names of Python's source."""
import ast
import copy
import keyword
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rnnbook.bidirectional import (
    CELLS, KINDS, MERGES, PYTHON_TOKENS, Bidirectional, bidirectional_backward, bidirectional_forward, reverse_sequences, tagged_lines,
)
from rnnbook.bptt import BPTTLayer, rnn_backward
from rnnbook.gru import GRULayer, gru_init
from rnnbook.lstm import CellLayer, LSTMLayer, lstm_backward, lstm_forward, lstm_init
from rnnbook.rnn import RNNCell, RNNLayer, numpy_params, rnn_forward, rnn_init
from rnnbook.testing import assert_parity, gradient_check

I, H = 3, 4
INITS = {"rnn": rnn_init, "lstm": lstm_init, "gru": gru_init}
LAYERS = {"rnn": RNNLayer, "lstm": LSTMLayer, "gru": GRULayer}
TORCH = {"rnn": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}
each_cell = pytest.mark.parametrize("cell", CELLS)


def both_inits(cell, rng, **options):
    "Parameters of two directions."
    return {f"{name}{suffix}": p for suffix in ("", "_reverse") for name, p in INITS[cell](I, H, rng=rng, **options).items()}


def layer_of(cell, params, merge="concat", dtype=torch.float64, batch_first=False, **options):
    "Our module with these parameters."
    directions = []
    for suffix in ("", "_reverse"):
        layer = LAYERS[cell](I, H, batch_first=batch_first, dtype=dtype, bias="bias_ih_l0" in params, **options)
        names = [name for name in params if name.endswith("_l0" + suffix)]
        layer.cell.load_state_dict({name.removesuffix("_l0" + suffix): torch.from_numpy(params[name]) for name in names})
        directions.append(layer)
    return Bidirectional(*directions, merge)


def parts(state): return state if isinstance(state, tuple) else (state,)


def as_state(cell, tensors): return tuple(tensors) if cell == "lstm" else tensors[0]


def loss_of(output, *state):
    "A lopsided loss of tensors."
    weights = torch.linspace(-1, 2, output.shape[-1], dtype=output.dtype, device=output.device)
    return (output.sin() * weights).sum() + sum((s ** 2).sum() * (k + 1) for k, s in enumerate(state))


def arriving(cell, output, state):
    "The gradients of that loss for NumPy's answers."
    weights = np.linspace(-1, 2, output.shape[-1])
    return np.cos(output) * weights, as_state(cell, [2 * (k + 1) * s for k, s in enumerate(parts(state))])


def point_of(cell, T, B, bias=True, carried=True, seed=0, P=H, **options):
    "x, initial states and parameters in one dict."
    rng = np.random.default_rng(seed + 10 * T + B)
    point = both_inits(cell, rng, bias=bias, **options) | {"x": rng.standard_normal((T, B, I))}
    if carried: point |= {"h0": rng.standard_normal((2, B, P))} | ({"c0": rng.standard_normal((2, B, H))} if cell == "lstm" else {})
    return point


def run(cell, point, **options):
    "NumPy's answer at that point."
    states = [point[name] for name in ("h0", "c0") if name in point]
    params = {name: p for name, p in point.items() if "_l0" in name}
    return bidirectional_forward(cell, point["x"], params, as_state(cell, states) if states else None, **options)


def torch_grads(module, cell, point, **options):
    "The answer of our module, flat, and the gradients by autograd under NumPy's names."
    leaves = {name: torch.from_numpy(point[name]).requires_grad_() for name in ("x", "h0", "c0") if name in point}
    states = list(leaves.values())[1:]
    output, state = module(leaves["x"], as_state(cell, states) if states else None, **options)
    loss_of(output, *parts(state)).backward()
    shadow = copy.deepcopy(module)
    for p, q in zip(shadow.parameters(), module.parameters()):
        p.data = torch.zeros_like(q) if q.grad is None else q.grad
    return (output.detach(), *(s.detach() for s in parts(state))), {name: leaf.grad for name, leaf in leaves.items()} | numpy_params(shadow)


@each_cell
@pytest.mark.parametrize("T, B, bias, carried, unequal", [(1, 1, True, True, False), (2, 3, False, True, True), (13, 4, True, False, True), (13, 4, False, False, False), (300, 2, True, True, True)])
def test_equals_torch_with_gradients(cell, T, B, bias, carried, unequal):
    with torch.random.fork_rng():
        torch.manual_seed(T)
        theirs = TORCH[cell](I, H, bias=bias, bidirectional=True, dtype=torch.float64)
    point = point_of(cell, T, B, carried=carried) | numpy_params(theirs)
    point = {name: a for name, a in point.items() if bias or not name.startswith("bias")}
    lengths = np.random.default_rng(T).integers(1, T + 1, B).tolist() if unequal else None

    def reference(x, state=None, lengths=None):
        if lengths is None: return theirs(x, state)
        packed, final = theirs(pack_padded_sequence(x, lengths, enforce_sorted=False), state)
        return pad_packed_sequence(packed, total_length=len(x))[0], final

    reference.parameters = theirs.parameters
    leaves = {name: torch.from_numpy(point[name]).requires_grad_() for name in ("x", "h0", "c0") if name in point}
    states = list(leaves.values())[1:]
    answer = reference(leaves["x"], as_state(cell, states) if states else None, lengths)
    loss_of(answer[0], *parts(answer[1])).backward()
    expected = tuple(a.detach() for a in (answer[0], *parts(answer[1])))
    grads = {name: leaf.grad for name, leaf in leaves.items()} | {name: p.grad for name, p in theirs.named_parameters()}
    output, state, tape = run(cell, point, lengths=lengths)
    assert_parity((output, *parts(state)), expected, tol=1e-12)
    by_hand = bidirectional_backward(*arriving(cell, output, state), tape)
    assert set(by_hand) == set(point) | {"h0"} | ({"c0"} if cell == "lstm" else set())
    ours, ours_grads = torch_grads(layer_of(cell, point), cell, point, lengths=lengths)
    assert_parity(ours, expected, tol=1e-12)
    for name, grad in grads.items():
        assert_parity(by_hand[name], grad, tol=1e-9, name=name)
        assert_parity(ours_grads[name], grad, tol=1e-9, name=name)


OPTIONS = [("rnn", dict(nonlinearity="sigmoid"), H), ("lstm", {}, H), ("lstm", dict(peephole=True, coupled=True), H), ("lstm", dict(proj_size=2), 2),
           ("gru", {}, H), ("gru", dict(reset_after=False), H)]


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("cell, options, P", OPTIONS)
def test_merges_and_options_central_differences_and_pytorch(cell, options, P, merge):
    for_params = {name: value for name, value in options.items() if name not in ("nonlinearity", "reset_after")}
    for_run = {name: value for name, value in options.items() if name != "proj_size"}
    point, lengths = point_of(cell, 4, 3, P=P, **for_params), [2, 4, 0]

    def loss(at):
        output, state, _ = run(cell, at, lengths=lengths, merge=merge, **for_run)
        weights = np.linspace(-1, 2, output.shape[-1])
        return (np.sin(output) * weights).sum() + sum((s ** 2).sum() * (k + 1) for k, s in enumerate(parts(state)))

    output, state, tape = run(cell, point, lengths=lengths, merge=merge, **for_run)
    assert output.shape == (4, 3, 2 * P if merge == "concat" else P) and parts(state)[0].shape == (2, 3, P)
    grads = bidirectional_backward(*arriving(cell, output, state), tape)
    assert max(gradient_check(loss, point, grads, tol=1e-6).values()) < 1e-6
    ours, ours_grads = torch_grads(layer_of(cell, point, merge, **options), cell, point, lengths=lengths)
    assert_parity(ours, (output, *parts(state)))
    for name in point:
        assert_parity(ours_grads[name], grads[name], tol=1e-9, name=name)


def test_merges_by_their_equations():
    point = point_of("rnn", 5, 2, carried=False)
    answers = {merge: run("rnn", point, merge=merge)[0] for merge in MERGES}
    forward, reverse = np.split(answers["concat"], 2, axis=-1)
    assert_parity(answers["sum"], forward + reverse)
    assert_parity(answers["mean"], (forward + reverse) / 2)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(CELLS)), st.sampled_from(MERGES), st.integers(0, 7), st.integers(0, 4), st.data())
def test_padding_state_and_empty_sequences(cell, merge, T, B, data):
    "Any lengths: each sequence comes out as if alone, forward and backward, whatever its padding holds, bit for bit."
    lengths = data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
    point = point_of(cell, T, B)
    rubbish = point["x"].copy()
    for b, n in enumerate(lengths):
        rubbish[n:, b] = np.nan
    output, state, tape = run(cell, point, lengths=lengths, merge=merge)
    again, state_again, tape_again = run(cell, point | {"x": rubbish}, lengths=lengths, merge=merge)
    assert np.array_equal(output, again) and all(map(np.array_equal, parts(state), parts(state_again)))
    d_output, d_state = arriving(cell, output, state)
    noisy = np.where(np.arange(T)[:, None, None] < np.array(lengths, int)[None, :, None], d_output, np.nan)
    grads, grads_again = bidirectional_backward(d_output, d_state, tape), bidirectional_backward(noisy, d_state, tape_again)
    assert all(np.array_equal(grads[name], grads_again[name]) for name in grads)
    ours, _ = torch_grads(layer_of(cell, point, merge), cell, point | {"x": rubbish}, lengths=lengths)
    assert_parity(ours, (output, *parts(state)))
    for b, n in enumerate(lengths):
        one = slice(b, b + 1)
        alone_point = point | {"x": point["x"][:n, one]} | {name: point[name][:, one] for name in ("h0", "c0") if name in point}
        alone, alone_state, alone_tape = run(cell, alone_point, merge=merge)
        assert_parity((output[:n, one], *(s[:, one] for s in parts(state))), (alone, *parts(alone_state)))
        assert (output[n:, b] == 0).all() and (grads["x"][n:, b] == 0).all()
        alone_grads = bidirectional_backward(d_output[:n, one], as_state(cell, [d[:, one] for d in parts(d_state)]), alone_tape)
        assert_parity(grads["x"][:n, one], alone_grads["x"])
        assert_parity(grads["h0"][:, one], alone_grads["h0"])
        if n == 0:
            assert all((s[:, b] == point[name][:, b]).all() for name, s in zip(("h0", "c0"), parts(state)))


@each_cell
def test_the_reverse_direction_is_the_layer_on_turned_sequences(cell):
    point, lengths = point_of(cell, 6, 3), [3, 6, 1]
    output, state, _ = run(cell, point, lengths=lengths)
    params = {name.removesuffix("_reverse"): p for name, p in point.items() if name.endswith("_reverse")}
    turned = np.zeros_like(point["x"])
    for b, n in enumerate(lengths):
        for t in range(n): turned[t, b] = point["x"][n - 1 - t, b]
    start = as_state(cell, [point[name][1:] for name in ("h0", "c0") if name in point])
    alone, alone_state, _ = CELLS[cell][0](turned, params, start, lengths=lengths)
    for b, n in enumerate(lengths):
        for t in range(n): assert_parity(output[t, b, H:], alone[n - 1 - t, b])
    assert_parity([s[1:] for s in parts(state)], list(parts(alone_state)))
    assert_parity(parts(state)[0][1], output[0, :, H:])                            # the reverse pass ends at the first step,
    assert_parity(parts(state)[0][0], output[np.array(lengths) - 1, range(3), :H])  # the forward one at the last


@each_cell
def test_every_output_sees_every_step(cell):
    point = point_of(cell, 6, 1, carried=False)
    for t in (0, 3, 5):
        d_output = np.zeros((6, 1, 2 * H))
        d_output[t, 0, :H] = 1
        _, _, tape = run(cell, point)
        seen = np.abs(bidirectional_backward(d_output, None, tape)["x"]).sum((1, 2)) > 0
        assert (seen == (np.arange(6) <= t)).all()
        seen = np.abs(bidirectional_backward(np.roll(d_output, H, axis=2), None, tape)["x"]).sum((1, 2)) > 0
        assert (seen == (np.arange(6) >= t)).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 6), st.integers(0, 4), st.data())
def test_reverse_sequences(T, B, data):
    lengths = data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
    x = np.random.default_rng(T).standard_normal((T, B, 2))
    turned, before = reverse_sequences(x, lengths), x.copy()
    for b, n in enumerate(lengths):
        assert np.array_equal(turned[:n, b], x[:n, b][::-1]) and np.array_equal(turned[n:, b], x[n:, b])
    assert np.array_equal(reverse_sequences(turned, lengths), x)
    assert np.array_equal(reverse_sequences(x, torch.tensor(lengths, dtype=torch.int64)), turned)
    whole = reverse_sequences(x)
    assert np.array_equal(whole, x[::-1]) and not np.shares_memory(whole, x)
    turned += 1
    assert np.array_equal(x, before)


def test_arguments_are_not_written_into():
    for cell in CELLS:
        point = point_of(cell, 5, 3)
        for a in point.values(): a.flags.writeable = False
        output, state, tape = run(cell, point, lengths=[5, 2, 3])
        d_output, d_state = arriving(cell, output, state)
        for a in (d_output, *parts(d_state)): a.flags.writeable = False
        grads = bidirectional_backward(d_output, d_state, tape)
        again = bidirectional_backward(d_output, d_state, tape)
        assert all(np.array_equal(grads[name], again[name]) for name in grads)


@each_cell
def test_none_is_zero_on_the_way_back(cell):
    point = point_of(cell, 5, 3)
    output, state, tape = run(cell, point, lengths=[5, 2, 3])
    d_output, d_state = arriving(cell, output, state)
    zeros = as_state(cell, [np.zeros_like(s) for s in parts(state)])
    assert_parity(bidirectional_backward(d_output, None, tape), bidirectional_backward(d_output, zeros, tape))
    assert_parity(bidirectional_backward(None, d_state, tape), bidirectional_backward(np.zeros_like(output), d_state, tape))
    if cell == "lstm":
        half = bidirectional_backward(None, (None, d_state[1]), tape)
        assert_parity(half, bidirectional_backward(None, (np.zeros_like(d_state[0]), d_state[1]), tape))


def test_a_pair_of_functions():
    point = point_of("lstm", 5, 3)
    named, paired = run("lstm", point), bidirectional_forward(
        (lstm_forward, lstm_backward), point["x"], {name: p for name, p in point.items() if "_l0" in name}, (point["h0"], point["c0"]))
    assert_parity(paired[:2], named[:2])
    d = arriving("lstm", *named[:2])
    assert_parity(bidirectional_backward(*d, paired[2]), bidirectional_backward(*d, named[2]))


NEW_NAMES = {"weight_ih_l0": "from_input_l0", "weight_hh_l0": "from_past_l0", "bias_ih_l0": "shift", "bias_hh_l0": "drift_l0"}


def renamed_forward(x, params, state=None, *, lengths=None):
    "A reader's own cell: the simple network, its parameters under names of its own, its state a tuple of one."
    output, h, tape = rnn_forward(x, {usual: params[own] for usual, own in NEW_NAMES.items()}, None if state is None else state[0], lengths=lengths)
    return output, (h,), tape


def renamed_backward(d_output, d_state, tape):
    return {NEW_NAMES.get(name, name): d for name, d in rnn_backward(d_output, None if d_state is None else d_state[0], tape).items()}


def test_a_cell_with_names_of_its_own():
    point, lengths = point_of("rnn", 6, 3), [3, 6, 0]
    params = {NEW_NAMES[name.removesuffix("_reverse")] + "_reverse" * name.endswith("_reverse"): p for name, p in point.items() if "_l0" in name}
    own, h0 = (renamed_forward, renamed_backward), point["h0"]
    for state in (None, (h0,)):
        named = run("rnn", {name: p for name, p in point.items() if name != "h0" or state}, lengths=lengths)
        answer = bidirectional_forward(own, point["x"], params, state, lengths=lengths)
        assert_parity((answer[0], *answer[1]), named[:2])
        d_output, d_h = arriving("rnn", *named[:2])
        expected, grads = bidirectional_backward(d_output, d_h, named[2]), bidirectional_backward(d_output, (d_h,), answer[2])
        assert set(grads) == set(params) | {"x", "h0"}
        for name, own_name in NEW_NAMES.items():
            assert_parity(grads[own_name], expected[name])
            assert_parity(grads[own_name + "_reverse"], expected[name + "_reverse"])
        assert_parity((grads["x"], grads["h0"]), (expected["x"], expected["h0"]))
    with pytest.raises(ValueError, match=r"h0: expected \(2, 3, 4\), got \(1, 3, 4\)"):
        bidirectional_forward(own, point["x"], params, (h0[:1],))


@each_cell
def test_float32_follows_the_input(cell):
    point = {name: a.astype(np.float32) for name, a in point_of(cell, 9, 3).items()}
    for merge in MERGES:
        output, state, tape = run(cell, point, lengths=[9, 4, 7], merge=merge)
        expected, expected_state, _ = run(cell, {name: a.astype(float) for name, a in point.items()}, lengths=[9, 4, 7], merge=merge)
        grads = bidirectional_backward(output, state, tape)
        assert {a.dtype for a in (output, *parts(state), *grads.values())} == {np.dtype(np.float32)}
        assert_parity((output, *parts(state)), (expected, *parts(expected_state)), tol=1e-5)


@each_cell
@pytest.mark.parametrize("lengths", [None, [6, 2, 0]])
def test_batch_first(cell, lengths):
    point = point_of(cell, 6, 3)
    x, state = torch.from_numpy(point["x"]), as_state(cell, [torch.from_numpy(point[name]) for name in ("h0", "c0") if name in point])
    usual, first = (layer_of(cell, point, batch_first=b) for b in (False, True))
    expected, answer = usual(x, state, lengths=lengths), first(x.transpose(0, 1), state, lengths=lengths)
    assert first.batch_first and not usual.batch_first
    assert_parity(answer[0].transpose(0, 1), expected[0])
    assert_parity(answer[1], expected[1])


def test_other_layers():
    point = point_of("rnn", 6, 3)
    expected = run("rnn", point, lengths=[6, 2, 4])
    by_autograd, grads = torch_grads(layer_of("rnn", point), "rnn", point, lengths=[6, 2, 4])
    fast = Bidirectional(BPTTLayer(I, H, dtype=torch.float64), BPTTLayer(I, H, dtype=torch.float64))
    fast.load_state_dict(layer_of("rnn", point).state_dict())
    plain = Bidirectional(*(CellLayer(RNNCell(I, H, dtype=torch.float64)) for _ in range(2)))
    plain.load_state_dict(fast.state_dict())
    for module in (fast, plain):
        answer, module_grads = torch_grads(module, "rnn", point, lengths=[6, 2, 4])
        assert_parity(answer, (expected[0], expected[1]))
        assert_parity(module_grads, grads, tol=1e-9)


def test_weights_move_to_torch_and_back():
    for cell in CELLS:
        point = point_of(cell, 5, 2)
        ours = layer_of(cell, point)
        theirs = TORCH[cell](I, H, bidirectional=True, dtype=torch.float64)
        theirs.load_state_dict({name: torch.from_numpy(p) for name, p in numpy_params(ours).items()})
        assert_parity(ours(torch.from_numpy(point["x"]))[0], theirs(torch.from_numpy(point["x"]))[0])
        assert [name.partition(".")[0] for name in ours.state_dict()] == ["forward_layer"] * 4 + ["reverse_layer"] * 4


def test_repr_and_merge():
    text = repr(Bidirectional(LSTMLayer(I, H), LSTMLayer(I, H), merge="mean"))
    assert "merge='mean'" in text and "(forward_layer): LSTMLayer(" in text and "(reverse_layer): LSTMLayer(" in text


def test_double_backward():
    point = point_of("lstm", 3, 2, carried=False)
    module = layer_of("lstm", point, merge="sum")
    x = torch.from_numpy(point["x"]).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: module(x, lengths=[3, 2])[0], (x,))


POINT = point_of("lstm", 5, 3)
PARAMS = {name: p for name, p in POINT.items() if "_l0" in name}
STATE = POINT["h0"], POINT["c0"]


@pytest.mark.parametrize("change, error, message", [
    (dict(cell="elman"), ValueError, "cell: expected one of 'rnn', 'lstm'"),
    (dict(cell=lstm_forward), ValueError, r"cell: expected one of .* or a pair \(forward, backward\), got <function"),
    (dict(cell=(lstm_forward,)), ValueError, "cell: expected one of"),
    (dict(cell="rnn", state=STATE), TypeError, "state: expected an array, got a tuple"),
    (dict(cell="gru", state=[STATE[0]]), TypeError, "state: expected an array, got a list"),
    (dict(merge="product"), ValueError, "merge: expected one of 'concat', 'sum', 'mean', got 'product'"),
    (dict(x=POINT["x"][0]), ValueError, r"x: expected 3 dimensions \(T, B, I\), got \(3, 3\)"),
    (dict(x=POINT["x"].astype(int)), TypeError, "x: expected a float array, got int64"),
    (dict(lengths=[5, 6, 1]), ValueError, "lengths: expected values from 0 to 5, got 6"),
    (dict(lengths=[5, -1, 1]), ValueError, "lengths: expected values from 0 to 5, got -1"),
    (dict(lengths=[5, 4]), ValueError, r"lengths: expected \(3,\), got \(2,\)"),
    (dict(lengths=[5.0, 4.0, 1.0]), TypeError, "lengths: expected integers, got float64"),
    (dict(state=tuple(s[:1] for s in STATE)), ValueError, r"h0: expected \(2, 3, 4\), got \(1, 3, 4\)"),
    (dict(state=(STATE[0], STATE[1][:, :2])), ValueError, r"c0: expected \(2, 3, 4\), got \(2, 2, 4\)"),
    (dict(state=STATE[0]), TypeError, r"state: expected a pair \(h, c\)"),
    (dict(state=(STATE[0], STATE[1].astype(np.float32))), TypeError, "c0: expected float64 like x, got float32"),
    (dict(params=lstm_init(I, H, rng=np.random.default_rng(0))), ValueError, "params: expected bias_hh_l0 and bias_hh_l0_reverse, got no bias_hh_l0_reverse"),
    (dict(params={name: p for name, p in PARAMS.items() if name != "bias_ih_l0"}), ValueError, "params: expected .* got no bias_ih_l0$"),
    (dict(params=PARAMS | {"weight_hh_l0_reverse": np.zeros((8, 2))}), ValueError, r"weight_hh_l0_reverse: expected \(16, 4\), got \(8, 2\)"),
    (dict(params=PARAMS | {"weight_hh_l0_reverse": np.zeros((16, 4), np.float32)}), TypeError, "weight_hh_l0_reverse: expected float64 like weight_hh_l0, got float32"),
])
def test_bad_input_is_named(change, error, message):
    arguments = dict(cell="lstm", x=POINT["x"], params=PARAMS) | change
    with pytest.raises(error, match=message): bidirectional_forward(**arguments)


@pytest.mark.parametrize("merge, d_output, d_state, error, message", [
    ("concat", np.zeros((5, 3, 4)), None, ValueError, r"d_output: expected \(5, 3, 8\), got \(5, 3, 4\)"),
    ("sum", np.zeros((5, 3, 8)), None, ValueError, r"d_output: expected \(5, 3, 4\), got \(5, 3, 8\)"),
    ("concat", np.zeros((5, 3, 8), np.float32), None, TypeError, "d_output: expected float64"),
    ("concat", None, (np.zeros((1, 3, 4)), None), ValueError, r"d_state, h: expected \(2, 3, 4\), got \(1, 3, 4\)"),
    ("concat", None, np.zeros((2, 3, 4)), TypeError, r"d_state: expected a pair \(h, c\)"),
])
def test_bad_gradients_are_named(merge, d_output, d_state, error, message):
    tape = bidirectional_forward("lstm", POINT["x"], PARAMS, merge=merge)[2]
    with pytest.raises(error, match=message): bidirectional_backward(d_output, d_state, tape)


def test_a_pair_of_gradients_for_a_single_state():
    params = {name: p for name, p in point_of("gru", 5, 3).items() if "_l0" in name}
    tape = bidirectional_forward("gru", POINT["x"], params)[2]
    with pytest.raises(TypeError, match="d_state: expected an array, got a tuple"): bidirectional_backward(None, (STATE[0],), tape)


@pytest.mark.parametrize("x, error, message", [
    ([[1, 2]], TypeError, "x: expected an array, got list"), (torch.zeros(3, 2), TypeError, "x: expected an array, got Tensor"),
    (np.zeros(3), ValueError, r"x: expected \(T, B, ...\), got \(3,\)"),
])
def test_what_cannot_be_turned_is_named(x, error, message):
    with pytest.raises(error, match=message): reverse_sequences(x)


@pytest.mark.parametrize("make, error, message", [
    (lambda: Bidirectional(torch.nn.LSTM(3, 4), LSTMLayer(3, 4)), TypeError, "forward_layer: expected a layer with a cell, such as LSTMLayer, got LSTM"),
    (lambda: Bidirectional(LSTMLayer(3, 4), Bidirectional(LSTMLayer(3, 4), LSTMLayer(3, 4))), TypeError, "reverse_layer: expected a layer with a cell"),
    (lambda: Bidirectional(LSTMLayer(3, 4), LSTMLayer(3, 4), "max"), ValueError, "merge: expected one of"),
    (lambda: Bidirectional(LSTMLayer(3, 4), LSTMLayer(3, 4, batch_first=True)), ValueError, "reverse_layer: expected batch_first False like forward_layer, got True"),
    (lambda: Bidirectional(LSTMLayer(3, 4), LSTMLayer(2, 4)), ValueError, "reverse_layer: expected input_size 3 like forward_layer, got 2"),
    (lambda: Bidirectional(LSTMLayer(3, 4), LSTMLayer(3, 5)), ValueError, r"reverse_layer: expected state_sizes \(4, 4\) like forward_layer, got \(5, 5\)"),
    (lambda: Bidirectional(LSTMLayer(3, 4), RNNLayer(3, 4)), ValueError, r"reverse_layer: expected state_sizes \(4, 4\) like forward_layer, got \(4,\)"),
])
def test_layers_that_do_not_fit_together(make, error, message):
    with pytest.raises(error, match=message): make()


@pytest.mark.parametrize("change, error, message", [
    (dict(x=torch.zeros(5, 3)), ValueError, r"x: expected \(T, B, I\) with I = 3, got \(5, 3\)"),
    (dict(x=torch.zeros(5, 3, 2)), ValueError, r"x: expected \(T, B, I\) with I = 3"),
    (dict(x=torch.zeros(5, 3, 3, dtype=torch.float64)), TypeError, "x: expected torch.float32 like the weights, got torch.float64"),
    (dict(state=(torch.zeros(1, 3, 4),) * 2), ValueError, r"h0: expected \(2, 3, 4\), got \(1, 3, 4\)"),
    (dict(state=(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))), ValueError, r"c0: expected \(2, 3, 4\), got \(2, 3, 5\)"),
    (dict(state=torch.zeros(2, 3, 4)), TypeError, "state: expected a tuple"),
    (dict(state=(torch.zeros(2, 3, 4), None)), TypeError, "c0: expected a tensor, got NoneType"),
    (dict(lengths=[5, 6, 1]), ValueError, "lengths: expected values from 0 to 5, got 6"),
    (dict(lengths=[5, 1]), ValueError, r"lengths: expected \(3,\), got \(2,\)"),
])
def test_bad_tensors_are_named(change, error, message):
    module = Bidirectional(LSTMLayer(3, 4), LSTMLayer(3, 4))
    with pytest.raises(error, match=message): module(**(dict(x=torch.zeros(5, 3, 3)) | change))


@pytest.mark.parametrize("line, kinds", [  # the kinds of the names in the line, in their order
    ("f(x)", "called read"), ("f = x", "assigned read"), ("f.x = 1", "changed attribute"), ("f", "read"),
    ("a, (b, *c) = d", "assigned assigned assigned read"), ("a: int = 1", "assigned read"), ("a += b", "assigned read"), ("(a := b)", "assigned read"),
    ("a.b[c].d = e, f[g]", "changed attribute read attribute read read read"), ("a[b] += c", "changed read read"), ("f(x)[0] = a.b", "called read read attribute"),
    ("f(a, b=c, *d, **e)", "called read keyword read read read"), ("a.f(b)(c)", "read attribute read read"),
    ("from a.b import c as d, e", "imported imported imported imported imported"), ("import a.b as c", "imported imported imported"),
    ("def f(a, *b, c=d, **e) -> g: return a", "defined parameter parameter parameter read parameter read read"), ("class A(B, c=d): x = y", "defined read keyword read assigned read"),
    ("lambda a, b=c: a", "parameter parameter read read"), ("@a.b(c)\ndef f(): pass", "read attribute read defined"),
    ("for a, b in c: d = a", "loop_variable loop_variable read assigned read"), ("for a.b in c: pass", "changed attribute read"),
    ("[a + f(b) for a in c if a]", "element called element loop_variable read read"), ("{a: b for a in c}", "read read loop_variable read"),
    ("g(a[b] for a in c)", "called element element loop_variable read"), ("[[a for a in b] for b in c]", "element loop_variable element loop_variable read"),
    ("[(lambda a: a)(b) for b in c]", "parameter element element loop_variable read"),
    ("with f(a) as b: pass", "called read assigned"), ("x = f'{a.b} {c}' + d", "assigned read"), ("x = f'{f(a)} {b!r:>{c}}' if b else c", "assigned read read"),
    ("ä = ö.ü('ß', é=ê).à", "assigned read attribute keyword read attribute"), ("x = 'ßßß', y.z", "assigned read attribute"),
    ("f(a,\n  b)", "called read read"), ("x = '''a\nb''', y(z)", "assigned called read"), ("x = \\\n    y.z", "assigned read attribute"),
])
def test_kinds_of_names(line, kinds):
    tagged = tagged_lines(line + "\n")
    assert [kind.replace(" ", "_") for _, found in tagged for kind in found if kind] == kinds.split()
    assert all(len(tokens) == len(found) for tokens, found in tagged)


def test_names_without_a_kind():
    assert tagged_lines("global a, b\n") == [(("global", "NAME", ",", "NAME"), (None,) * 4)]
    assert tagged_lines("try: b\nexcept C as d: pass\n") == [
        (("try", ":", "NAME"), (None, None, "read")), (("except", "NAME", "as", "NAME", ":", "pass"), (None, "read", None, None, None, None))]


def test_tokens_hide_names_and_layout():
    source = "if x:  # why\n    y = [1.5,\n         'a' 'b']\n\nz\n"
    assert [tokens for tokens, _ in tagged_lines(source)] == [("if", "NAME", ":"), ("NAME", "=", "[", "NUMBER", ",", "STRING", "STRING", "]"), ("NAME",)]
    assert tagged_lines("") == [] and tagged_lines("f(g)") == [(("NAME", "(", "NAME", ")"), ("called", None, "read", None))]
    with pytest.raises(SyntaxError): tagged_lines("if")


def test_the_library_is_tagged():
    for path in sorted(Path(ast.__file__).parent.glob("*.py"))[::16]:
        for tokens, kinds in tagged_lines(path.read_text(encoding="utf-8")):
            assert set(tokens) <= set(PYTHON_TOKENS) and set(kinds) <= {None, *KINDS} and len(tokens) == len(kinds) > 0
            assert all(token == "NAME" for token, kind in zip(tokens, kinds) if kind)
            for before, kind, after in zip((None, *tokens), kinds, (*tokens[1:], None)):
                assert kind != "called" or after in ("(", ")")  # f(x), (f)(x)
                assert kind != "keyword" or after == "="
                assert kind != "attribute" or before == "."
    assert len(set(PYTHON_TOKENS)) == len(PYTHON_TOKENS) and set(keyword.kwlist) < set(PYTHON_TOKENS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@each_cell
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("lengths", [None, [7, 0, 3]])
def test_cuda_equals_numpy(cell, merge, lengths):
    point = point_of(cell, 7, 3)
    module = layer_of(cell, point, merge).cuda()
    leaves = {name: torch.from_numpy(point[name]).cuda().requires_grad_() for name in ("x", "h0", "c0") if name in point}
    output, state = module(leaves["x"], as_state(cell, list(leaves.values())[1:]), lengths=lengths)
    expected, expected_state, tape = run(cell, point, lengths=lengths, merge=merge)
    assert_parity((output.detach(), *(s.detach() for s in parts(state))), (expected, *parts(expected_state)), tol=1e-10)
    loss_of(output, *parts(state)).backward()
    grads = bidirectional_backward(*arriving(cell, expected, expected_state), tape)
    for name, leaf in leaves.items():
        assert_parity(leaf.grad, grads[name], tol=1e-10, name=name)
    assert_parity(module.reverse_layer.cell.weight_hh.grad, grads["weight_hh_l0_reverse"], tol=1e-9)
