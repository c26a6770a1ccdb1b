"""Stacked layers: NumPy = PyTorch = torch.nn, dropout and residual connections, the rules for lengths and states, and the errors."""
import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rnnbook.bidirectional import CELLS, Bidirectional
from rnnbook.bptt import BPTTLayer
from rnnbook.gru import GRULayer, gru_init
from rnnbook.lstm import CellLayer, LSTMCell, LSTMLayer, lstm_backward, lstm_forward, lstm_init
from rnnbook.rnn import RNNLayer, numpy_params, rnn_init
from rnnbook.stacked import Stacked, recurrent_backward, recurrent_forward, recurrent_init
from rnnbook.testing import assert_parity, gradient_check

THEIRS = {"rnn": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}
LAYERS = {"rnn": RNNLayer, "lstm": LSTMLayer, "gru": GRULayer}
INITS = {"rnn": rnn_init, "lstm": lstm_init, "gru": gru_init}
I, H = 3, 5
each_cell = pytest.mark.parametrize("cell", list(CELLS))
each_direction = pytest.mark.parametrize("bidirectional", [False, True], ids=["one direction", "two directions"])


def stack_of(cell, num_layers, bidirectional, *, input_size=I, hidden_size=H, merge="concat", dropout=0.0, residual=False, proj_size=0, **options):
    "Our stack of that form."
    layers, size, width = [], input_size, proj_size or hidden_size
    projection = dict(proj_size=proj_size) if proj_size else {}
    for _ in range(num_layers):
        one = [LAYERS[cell](size, hidden_size, **options, **projection) for _ in range(1 + bidirectional)]
        layers.append(Bidirectional(*one, merge=merge) if bidirectional else one[0])
        size = width * (2 if bidirectional and merge == "concat" else 1)
    return Stacked(layers, dropout=dropout, residual=residual)


def fill_(stack, params):
    "Give our stack the parameters of a dict under torch.nn's names."
    names = list(numpy_params(stack))
    assert names == [name for name in params if name in names], "the same parameters in the same order"
    stack.load_state_dict({path: torch.from_numpy(params[name]) for path, name in zip(stack.state_dict(), names, strict=True)})
    return stack


def trio(cell, num_layers, bidirectional, *, seed=0, dtype=torch.float64, batch_first=False, bias=True, **options):
    "torch.nn's layers, our stack with their weights, and the weights as NumPy arrays."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        theirs = THEIRS[cell](I, H, num_layers, bidirectional=bidirectional, dtype=dtype, batch_first=batch_first, bias=bias, **options)
    options.pop("dropout", None)
    params = numpy_params(theirs)
    ours = stack_of(cell, num_layers, bidirectional, dtype=dtype, batch_first=batch_first, bias=bias, **options)
    return theirs, fill_(ours, params), params


def inputs(cell, rows, T, B, P=H, dtype=np.float64, seed=0):
    "x (T, B, I) and a state with so many rows, as arrays."
    rng = np.random.default_rng(seed + T + B)
    x, h0, c0 = (rng.standard_normal(shape).astype(dtype) for shape in ((T, B, I), (rows, B, P), (rows, B, H)))
    return x, (h0, c0) if cell == "lstm" else h0


def parts(state):
    "The parts of a state as a tuple; none for None."
    return () if state is None else state if isinstance(state, tuple) else (state,)


def like(state, values):
    "The values formed like the state: a tuple, a single one, or None."
    return None if state is None else tuple(values) if isinstance(state, tuple) else values[0]


def reference(theirs, x, state, lengths):
    "What torch.nn's layers answer, through a packed sequence where there are lengths."
    if lengths is None:
        output, final = theirs(x, state)
    else:
        packed, final = theirs(pack_padded_sequence(x, lengths, enforce_sorted=False, batch_first=theirs.batch_first), state)
        output = pad_packed_sequence(packed, total_length=x.shape[1 if theirs.batch_first else 0], batch_first=theirs.batch_first)[0]
    return output, *parts(final)


def loss_of(output, h, c=None):
    "A lopsided loss of tensors."
    return output.sin().sum() + (h ** 2).sum() + (0 if c is None else c.cos().sum())


def arriving(output, final):
    "The gradients of that loss for NumPy's answers."
    by_part = [2 * parts(final)[0], *(-np.sin(c) for c in parts(final)[1:])]
    return np.cos(output), like(final, by_part)


def gradients_of(run, module, x, state):
    "The answer of a module as a tuple, and the gradients of the loss by name."
    leaves = [torch.from_numpy(a).requires_grad_() for a in (x, *parts(state))]
    answer = run(leaves[0], like(state, leaves[1:]))
    loss_of(*answer).backward()
    flat = zip(numpy_params(module), (p.grad for _, p in module.named_parameters()), strict=True)
    return tuple(a.detach().numpy() for a in answer), dict(zip(("x", "h0", "c0"), (leaf.grad.numpy() for leaf in leaves))) | {name: grad.numpy() for name, grad in flat}


def sampled(count, seed=0):
    "A sample of the grid that holds each pair of settings of different kinds several times."
    rng = np.random.default_rng(seed)
    axes = dict(cell=["rnn", "lstm", "gru"], num_layers=[1, 2, 3], bidirectional=[False, True], bias=[True, False], batch_first=[False, True],
                unequal=[False, True], carried=[False, True], T=[1, 2, 13, 40])
    columns = {name: rng.permutation(np.resize(values, count)).tolist() for name, values in axes.items()}
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


LONG = [dict(cell=cell, num_layers=k + 1, bidirectional=k != 1, bias=True, batch_first=False, unequal=True, carried=True, T=300) for k, cell in enumerate(THEIRS)]


@pytest.mark.parametrize("case", sampled(72) + LONG, ids=lambda case: "-".join(map(str, case.values())))
def test_equals_torch_with_gradients(case):
    cell, T, B = case["cell"], case["T"], 4
    theirs, ours, params = trio(cell, case["num_layers"], case["bidirectional"], bias=case["bias"], batch_first=case["batch_first"])
    x, state = inputs(cell, case["num_layers"] * (1 + case["bidirectional"]), T, B)
    if not case["carried"]: state = None
    lengths = np.random.default_rng(T).integers(1, T + 1, B).tolist() if case["unequal"] else None
    turned = x.swapaxes(0, 1).copy() if case["batch_first"] else x
    expected, by_torch = gradients_of(lambda x, s: reference(theirs, x, s, lengths), theirs, turned, state)

    def run(x, s):
        output, final = ours(x, s, lengths=lengths)
        return output, *parts(final)

    answer, by_autograd = gradients_of(run, ours, turned, state)
    assert_parity(answer, expected, tol=1e-12)
    assert_parity(by_autograd, by_torch, tol=1e-9)
    output, final, tape = recurrent_forward(cell, x, params, state, lengths=lengths)
    if case["batch_first"]:
        expected, by_torch["x"] = (expected[0].swapaxes(0, 1), *expected[1:]), by_torch["x"].swapaxes(0, 1)
    assert_parity((output, *parts(final)), expected, tol=1e-12)
    by_hand = recurrent_backward(*arriving(output, final), tape)
    assert set(by_hand) == {"x", "h0", *(["c0"] if cell == "lstm" else []), *params}
    assert_parity({name: by_hand[name] for name in by_torch}, by_torch, tol=1e-9)


def test_sample_holds_every_pair():
    cases = sampled(72)
    for one, other in [("cell", "num_layers"), ("cell", "bidirectional"), ("num_layers", "bidirectional"), ("cell", "unequal"), ("cell", "bias"), ("bidirectional", "unequal"), ("batch_first", "unequal"), ("cell", "T")]:
        values = {name: {case[name] for case in cases} for name in (one, other)}
        assert {(case[one], case[other]) for case in cases} == {(a, b) for a in values[one] for b in values[other]}


@each_direction
@pytest.mark.parametrize("num_layers", [1, 3])
def test_projection_equals_torch(bidirectional, num_layers):
    theirs, ours, params = trio("lstm", num_layers, bidirectional, proj_size=2)
    x, state = inputs("lstm", num_layers * (1 + bidirectional), 9, 4, P=2)
    lengths = [9, 2, 5, 7]
    expected, by_torch = gradients_of(lambda x, s: reference(theirs, x, s, lengths), theirs, x, state)
    output, final = ours(torch.from_numpy(x), tuple(map(torch.from_numpy, state)), lengths=lengths)
    assert_parity((output.detach(), *(s.detach() for s in final)), expected, tol=1e-12)
    output, final, tape = recurrent_forward("lstm", x, params, state, lengths=lengths)
    assert_parity((output, *final), expected, tol=1e-12)
    assert final[0].shape[2] == 2 and final[1].shape[2] == H
    assert_parity(recurrent_backward(*arriving(output, final), tape), by_torch, tol=1e-9)
    drawn = recurrent_init("lstm", I, H, num_layers=num_layers, bidirectional=bidirectional, rng=np.random.default_rng(0), proj_size=2)
    assert {name: p.shape for name, p in drawn.items()} == {name: p.shape for name, p in params.items()}


@each_cell
@each_direction
def test_float32(cell, bidirectional):
    theirs, ours, params = trio(cell, 2, bidirectional, dtype=torch.float32)
    x, state = inputs(cell, 2 * (1 + bidirectional), 20, 4, dtype=np.float32)
    lengths = [20, 3, 11, 7]
    expected, by_torch = gradients_of(lambda x, s: reference(theirs, x, s, lengths), theirs, x, state)
    answer, by_autograd = gradients_of(lambda x, s: (lambda o, f: (o, *parts(f)))(*ours(x, s, lengths=lengths)), ours, x, state)
    output, final, tape = recurrent_forward(cell, x, params, state, lengths=lengths)
    by_hand = recurrent_backward(*arriving(output, final), tape)
    assert {a.dtype for a in (output, *parts(final), *by_hand.values())} == {np.dtype(np.float32)}
    for ours_, theirs_ in zip((*answer, output, *parts(final)), expected * 2, strict=True):
        torch.testing.assert_close(torch.from_numpy(ours_), torch.from_numpy(theirs_))
    for grads in (by_autograd, by_hand):
        for name, grad in by_torch.items():
            torch.testing.assert_close(torch.from_numpy(grads[name]), torch.from_numpy(grad), msg=lambda text: f"{name}: {text}")


# ---- parameters

@each_cell
@each_direction
@pytest.mark.parametrize("bias", [True, False])
def test_names_shapes_and_range_as_torch(cell, bidirectional, bias):
    drawn = recurrent_init(cell, I, H, num_layers=3, bidirectional=bidirectional, rng=np.random.default_rng(0), bias=bias)
    expected = numpy_params(THEIRS[cell](I, H, 3, bidirectional=bidirectional, bias=bias))
    assert {name: p.shape for name, p in drawn.items()} == {name: p.shape for name, p in expected.items()}
    assert list(drawn) == list(expected)
    values = np.concatenate([p.ravel() for p in drawn.values()])
    assert 0.95 / np.sqrt(H) < np.abs(values).max() <= 1 / np.sqrt(H) and len(np.unique(values)) == len(values)


@each_cell
def test_one_layer_is_drawn_as_by_the_cell(cell):
    a, b = (np.random.default_rng(3) for _ in range(2))
    assert all(np.array_equal(p, q) for p, q in zip(recurrent_init(cell, I, H, 2, rng=a).values(), INITS[cell](I, H, 2, rng=b).values(), strict=True))


def test_init_readout_merge_and_dtype():
    rng = np.random.default_rng(0)
    drawn = recurrent_init("rnn", I, H, 2, num_layers=2, bidirectional=True, rng=rng, dtype=np.float32)
    assert drawn["weight_ho"].shape == (2, 2 * H) and drawn["weight_ih_l1"].shape == (H, 2 * H) and {p.dtype for p in drawn.values()} == {np.dtype(np.float32)}
    summed = recurrent_init("rnn", I, H, 2, num_layers=2, bidirectional=True, merge="sum", rng=rng)
    assert summed["weight_ho"].shape == (2, H) and summed["weight_ih_l1_reverse"].shape == (H, H)
    assert "bias_ho" not in recurrent_init("rnn", I, H, 2, rng=rng, bias=False)
    assert recurrent_init(lstm_init, I, H, num_layers=2, rng=rng, peephole=True)["peephole_i_l1"].shape == (H,)
    output, _, _ = recurrent_forward("rnn", np.ones((4, 2, I)), summed, merge="sum")
    assert output.shape == (4, 2, H)
    with pytest.raises(ValueError, match="cell: expected one of 'rnn', 'lstm', 'gru', got 'ltsm'"):
        recurrent_init("ltsm", I, H, rng=rng)
    with pytest.raises(ValueError, match="num_layers: expected at least 1, got 0"):
        recurrent_init("rnn", I, H, num_layers=0, rng=rng)


# ---- what a stack is

@each_cell
@each_direction
def test_a_stack_is_its_layers_one_after_the_other(cell, bidirectional):
    D = 1 + bidirectional
    params = recurrent_init(cell, I, H, num_layers=3, bidirectional=bidirectional, rng=np.random.default_rng(1))
    x, state = inputs(cell, 3 * D, 8, 4)
    lengths = [8, 0, 3, 5]
    output, final, _ = recurrent_forward(cell, x, params, state, lengths=lengths)
    below, finals = x, []
    for k in range(3):
        own = {name.replace(f"_l{k}", "_l0"): p for name, p in params.items() if f"_l{k}" in name}
        rows = [part[D * k:D * (k + 1)] for part in parts(state)]
        below, last, _ = recurrent_forward(cell, below, own, like(state, rows), lengths=lengths)
        finals.append(parts(last))
    assert np.array_equal(output, below)
    assert all(np.array_equal(part, np.concatenate(rows)) for part, rows in zip(parts(final), zip(*finals)))


def test_layers_of_one_and_two_directions_mixed():
    "As in Wu et al. (2016): the lowest layer reads both ways, the others one way."
    rng = np.random.default_rng(2)
    params = recurrent_init("lstm", I, H, bidirectional=True, rng=rng)
    params |= {name.replace("_l0", "_l1"): p for name, p in lstm_init(2 * H, H, rng=rng).items()}
    stack = Stacked([Bidirectional(LSTMLayer(I, H, dtype=torch.float64), LSTMLayer(I, H, dtype=torch.float64)), LSTMLayer(2 * H, H, dtype=torch.float64)])
    fill_(stack, params)
    x, state = inputs("lstm", 3, 6, 4)
    output, final, tape = recurrent_forward("lstm", x, params, state, lengths=[6, 0, 4, 1])
    assert output.shape == (6, 4, H) and final[0].shape == (3, 4, H)
    answer, grads = gradients_of(lambda x, s: (lambda o, f: (o, *f))(*stack(x, s, lengths=[6, 0, 4, 1])), stack, x, state)
    assert_parity(answer, (output, *final))
    assert_parity(recurrent_backward(*arriving(output, final), tape), grads, tol=1e-9)


@pytest.mark.parametrize("merge", ["concat", "sum", "mean"])
@pytest.mark.parametrize("residual", [False, True])
def test_merges_and_residuals_numpy_equals_pytorch_and_central_differences(merge, residual):
    params = recurrent_init("gru", 4, 4, num_layers=3, bidirectional=True, merge=merge, rng=np.random.default_rng(3))
    stack = fill_(stack_of("gru", 3, True, input_size=4, hidden_size=4, merge=merge, residual=residual, dtype=torch.float64), params)
    rng = np.random.default_rng(4)
    x, state, lengths = rng.standard_normal((6, 3, 4)), rng.standard_normal((6, 3, 4)), [6, 0, 4]

    def run(at):
        return recurrent_forward("gru", at["x"], {name: at[name] for name in params}, at["h0"], lengths=lengths, merge=merge, residual=residual)

    def loss(at):
        output, final, _ = run(at)
        return np.sin(output).sum() + (final ** 2).sum()

    point = {"x": x, "h0": state, **params}
    output, final, tape = run(point)
    by_hand = recurrent_backward(*arriving(output, final), tape)
    few = {name: point[name] for name in ("x", "h0", "bias_ih_l0", "weight_hh_l1_reverse", "bias_hh_l2")}
    assert max(gradient_check(lambda at: loss(point | at), few, by_hand).values()) < 1e-6
    answer, grads = gradients_of(lambda x, s: stack(x, s, lengths=lengths), stack, x, state)
    assert_parity(answer, (output, final))
    assert_parity(by_hand, grads, tol=1e-9)


def test_residual_adds_where_the_sizes_agree():
    rng = np.random.default_rng(5)
    params = {name: np.zeros_like(p) for name, p in recurrent_init("rnn", 4, 4, num_layers=3, rng=rng).items()}
    x = rng.standard_normal((5, 3, 4))
    output, _, tape = recurrent_forward("rnn", x, params, residual=True, lengths=[5, 2, 0])
    inside = np.arange(5)[:, None, None] < np.array([5, 2, 0])[:, None]
    assert np.array_equal(output, np.where(inside, x, 0))  # layers that say nothing let the input through
    d = rng.standard_normal((5, 3, 4))
    assert np.array_equal(recurrent_backward(d, None, tape)["x"], np.where(inside, d, 0))
    wider = {name: np.zeros_like(p) for name, p in recurrent_init("rnn", 4, 6, num_layers=2, rng=rng).items()}
    assert not recurrent_forward("rnn", x, wider, residual=True)[0].any()  # 4 and 6: nothing to add to the first
    assert not recurrent_forward("rnn", x, params)[0].any()


@each_cell
def test_options_reach_every_layer(cell):
    options = dict(rnn=dict(nonlinearity="relu"), lstm=dict(coupled=True), gru=dict(reset_after=False))[cell]
    init = dict(lstm=dict(coupled=True)).get(cell, {})
    params = recurrent_init(cell, I, H, num_layers=2, bidirectional=True, rng=np.random.default_rng(6), **init)
    stack = fill_(stack_of(cell, 2, True, dtype=torch.float64, **options), params)
    x, state = inputs(cell, 4, 7, 3)
    output, final, tape = recurrent_forward(cell, x, params, state, **options)
    answer, grads = gradients_of(lambda x, s: (lambda o, f: (o, *parts(f)))(*stack(x, s)), stack, x, state)
    assert_parity(answer, (output, *parts(final)))
    assert_parity(recurrent_backward(*arriving(output, final), tape), grads, tol=1e-9)


def test_a_pair_of_functions_is_a_cell():
    params = recurrent_init("lstm", I, H, num_layers=2, bidirectional=True, rng=np.random.default_rng(7))
    x, state = inputs("lstm", 4, 6, 3)
    by_name, by_pair = (recurrent_forward(cell, x, params, state, lengths=[6, 2, 4]) for cell in ("lstm", (lstm_forward, lstm_backward)))
    assert all(np.array_equal(a, b) for a, b in zip((by_name[0], *by_name[1]), (by_pair[0], *by_pair[1])))
    grads = [recurrent_backward(*arriving(*answer[:2]), answer[2]) for answer in (by_name, by_pair)]
    assert list(grads[0]) == list(grads[1]) and all(np.array_equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_a_pair_without_recurrent_weights():
    "A layer that keeps a running mean: nothing but the pair's own names and shapes is taken for granted."
    def forward(x, params, state=None, *, lengths=None):
        u, h = x @ params["weight_ih_l0"].T, np.zeros((len(x) + 1, x.shape[1], len(params["weight_ih_l0"])))
        if state is not None:
            h[0] = state[0]
        for t in range(len(x)):
            h[t + 1] = 0.5 * h[t] + u[t]
        return h[1:].copy(), h[-1:].copy(), (x, params)

    def backward(d_output, d_state, tape):
        x, params = tape
        d_h = np.concatenate([np.zeros_like(d_output[:1]), d_output])
        d_h[-1] += d_state[0]
        for t in reversed(range(len(x))):
            d_h[t] += 0.5 * d_h[t + 1]
        return {"x": d_h[1:] @ params["weight_ih_l0"], "h0": 0.5 * d_h[1:2], "weight_ih_l0": np.einsum("tbh,tbi->hi", d_h[1:], x)}

    rng = np.random.default_rng(8)
    params = {f"weight_ih_l{k}": rng.standard_normal((4, 4)) for k in range(3)}
    point = params | {"x": rng.standard_normal((5, 2, 4)), "h0": rng.standard_normal((3, 2, 4))}

    def run(at):
        return recurrent_forward((forward, backward), at["x"], {name: at[name] for name in params}, at["h0"], residual=True)

    output, final, tape = run(point)
    grads = recurrent_backward(*arriving(output, final), tape)
    assert list(grads) == ["x", "h0", *params]
    gradient_check(lambda at: np.sin(run(at)[0]).sum() + (run(at)[1] ** 2).sum(), point, grads)


def test_cells_of_the_readers_own_stack_and_turn_around():
    class Leaky(LSTMCell):
        "Keeps a third of h as it was."
        def step(self, projected, state):
            h, c = super().step(projected, state)
            return (2 * h + state[0]) / 3, c

    def layer(size): return CellLayer(Leaky(size, H, dtype=torch.float64))

    stack = Stacked([Bidirectional(layer(I), layer(I)), layer(2 * H)])
    x, state = inputs("lstm", 3, 6, 2)
    output, final = stack(torch.from_numpy(x), tuple(map(torch.from_numpy, state)), lengths=[6, 4])
    assert output.shape == (6, 2, H) and final[1].shape == (3, 2, H)
    below, _ = stack.layers[0](torch.from_numpy(x), tuple(torch.from_numpy(s[:2]) for s in state), lengths=[6, 4])
    assert torch.equal(stack.layers[1](below, tuple(torch.from_numpy(s[2:]) for s in state), lengths=[6, 4])[0], output)
    assert Stacked([BPTTLayer(I, H), RNNLayer(H, H)])(torch.zeros(4, 2, I))[1].shape == (2, 2, H)


# ---- dropout

@each_cell
@each_direction
@pytest.mark.parametrize("residual", [False, True])
def test_dropout_same_masks_same_answers(cell, bidirectional, residual):
    "The masks that PyTorch drew, handed to NumPy: same answers, same gradients; and right by central differences."
    D, T, B = 1 + bidirectional, 6, 3
    _, stack, params = trio(cell, 3, bidirectional)
    stack.dropout.p, stack.residual = 0.4, residual
    x, state = inputs(cell, 3 * D, T, B)
    lengths = [6, 4, 2]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        answer, by_autograd = gradients_of(lambda x, s: (lambda o, f: (o, *parts(f)))(*stack(x, s, lengths=lengths)), stack, x, state)
        torch.manual_seed(5)
        masks = [torch.nn.functional.dropout(torch.ones(T, B, D * H, dtype=torch.float64), 0.4).numpy() for _ in range(2)]
    point = {"x": x, **dict(zip(("h0", "c0"), parts(state))), **params}

    def run(at):
        return recurrent_forward(cell, at["x"], {name: at[name] for name in params}, like(state, [at[name] for name in ("h0", "c0") if name in at]), lengths=lengths, dropout=masks, residual=residual)

    def loss(at):
        output, final, _ = run(at)
        h, *c = parts(final)
        return np.sin(output).sum() + (h ** 2).sum() + sum(np.cos(part).sum() for part in c)

    output, final, tape = run(point)
    by_hand = recurrent_backward(*arriving(output, final), tape)
    assert_parity(answer, (output, *parts(final)))
    assert_parity(by_hand, by_autograd, tol=1e-9)
    few = {name: point[name] for name in ("x", "bias_ih_l1")}
    assert max(gradient_check(lambda at: loss(point | at), few, by_hand).values()) < 1e-6


@each_cell
def test_dropout_falls_where_torch_lets_it_fall(cell):
    "With the same seed torch.nn draws the same masks at the same places, and none after the last layer."
    theirs, ours, _ = trio(cell, 3, True, dropout=0.3)
    ours.dropout.p = 0.3
    x, _ = inputs(cell, 6, 7, 4)
    answers = []
    for module in (theirs, ours):
        with torch.random.fork_rng():
            torch.manual_seed(9)
            output, final = module(torch.from_numpy(x))
        answers.append((output.detach(), *(s.detach() for s in parts(final))))
    assert_parity(*answers)
    theirs.eval(), ours.eval()
    assert_parity(ours(torch.from_numpy(x))[0].detach(), theirs(torch.from_numpy(x))[0].detach())


def test_dropout_in_numpy():
    params = recurrent_init("rnn", I, 50, num_layers=3, rng=np.random.default_rng(0))
    x = np.random.default_rng(1).standard_normal((40, 8, I))
    runs = [recurrent_forward("rnn", x, params, dropout=0.3, rng=np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert np.array_equal(runs[0][0], runs[1][0]) and not np.array_equal(runs[0][0], runs[2][0])
    first, *others = [layer["dropped"] for layer in runs[0][2]["layers"]]
    assert first is None and not np.array_equal(*others)
    for mask in others:
        assert_parity(np.unique(mask), np.array([0, 1 / 0.7]))
        assert abs(mask.mean() - 1) < 4 * np.sqrt(0.3 / 0.7 / mask.size)  # four standard errors
    again, _, _ = recurrent_forward("rnn", x, params, dropout=others)
    assert np.array_equal(again, runs[0][0])
    assert np.array_equal(recurrent_forward("rnn", x, params, dropout=0.0)[0], recurrent_forward("rnn", x, params)[0])
    all_gone, _, tape = recurrent_forward("rnn", x, params, dropout=1.0, rng=np.random.default_rng(0))
    assert np.isfinite(all_gone).all() and not recurrent_backward(all_gone, None, tape)["x"].any()
    assert np.array_equal(all_gone, recurrent_forward("rnn", 0 * x, params, dropout=1.0, rng=np.random.default_rng(0))[0])
    one = {name: p for name, p in params.items() if "_l0" in name}
    assert np.array_equal(recurrent_forward("rnn", x, one, dropout=0.9, rng=np.random.default_rng(0))[0], recurrent_forward("rnn", x, one)[0])


def test_dropout_leaves_the_global_random_states_alone():
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    params = recurrent_init("gru", I, H, num_layers=2, rng=np.random.default_rng(0))
    recurrent_forward("gru", np.zeros((3, 2, I)), params, dropout=0.5, rng=np.random.default_rng(0))
    assert torch.equal(torch_before, torch.get_rng_state()) and np.array_equal(numpy_before, np.random.get_state()[1])


def test_a_module_in_place_of_dropout():
    class Halve(torch.nn.Module):
        def forward(self, x): return x / 2

    _, stack, params = trio("lstm", 2, False)
    halved = Stacked([*stack.layers], dropout=Halve())
    x = torch.from_numpy(inputs("lstm", 2, 5, 3)[0])
    expected, _, _ = recurrent_forward("lstm", x.numpy(), params, dropout=[np.full((5, 3, H), 0.5)])
    assert_parity(halved(x)[0].detach(), expected)


# ---- lengths, states, padding, empty sequences

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 6), st.integers(0, 4), st.sampled_from(list(CELLS)), st.booleans(), st.integers(1, 3), st.booleans(), st.data())
def test_padding_state_and_empty_sequences(T, B, cell, bidirectional, num_layers, residual, data):
    "Any lengths: each sequence comes out as if alone, forward and backward, whatever its padding holds, bit for bit."
    lengths = data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
    rows = num_layers * (1 + bidirectional)
    rng = np.random.default_rng(T * 10 + B)
    params = recurrent_init(cell, I, H, num_layers=num_layers, bidirectional=bidirectional, rng=rng)
    x, state = inputs(cell, rows, T, B)
    rubbish = x.copy()
    for b, n in enumerate(lengths):
        rubbish[n:, b] = np.nan
    options = dict(lengths=lengths, residual=residual)
    output, final, tape = recurrent_forward(cell, x, params, state, **options)
    again, final_again, tape_again = recurrent_forward(cell, rubbish, params, state, **options)
    assert output.shape == (T, B, (1 + bidirectional) * H) and all(part.shape == (rows, B, H) for part in parts(final))
    assert np.array_equal(output, again) and all(map(np.array_equal, parts(final), parts(final_again)))
    d_output, d_state = arriving(output, final)
    noisy = np.where(np.arange(T)[:, None, None] < np.array(lengths, int)[None, :, None], d_output, np.nan)
    grads, grads_again = recurrent_backward(d_output, d_state, tape), recurrent_backward(noisy, d_state, tape_again)
    assert all(np.array_equal(grads[name], grads_again[name]) for name in grads)
    stack = fill_(stack_of(cell, num_layers, bidirectional, residual=residual, dtype=torch.float64), params)
    clean, dirty = (stack(torch.from_numpy(a), like(state, [torch.from_numpy(s) for s in parts(state)]), lengths=torch.tensor(lengths, dtype=torch.int64)) for a in (x, rubbish))
    assert torch.equal(clean[0], dirty[0]) and all(map(torch.equal, parts(clean[1]), parts(dirty[1])))
    assert_parity((clean[0].detach(), *(s.detach() for s in parts(clean[1]))), (output, *parts(final)))
    for b, n in enumerate(lengths):
        one = slice(b, b + 1)
        alone, alone_final, alone_tape = recurrent_forward(cell, x[:n, one], params, like(state, [s[:, one] for s in parts(state)]), residual=residual)
        assert_parity((output[:n, one], *(s[:, one] for s in parts(final))), (alone, *parts(alone_final)))
        assert (output[n:, b] == 0).all() and (grads["x"][n:, b] == 0).all()
        alone_grads = recurrent_backward(d_output[:n, one], like(final, [d[:, one] for d in parts(d_state)]), alone_tape)
        assert_parity((grads["x"][:n, one], grads["h0"][:, one]), (alone_grads["x"], alone_grads["h0"]))
        if n == 0:
            assert all((s[:, b] == s0[:, b]).all() for s, s0 in zip(parts(final), parts(state)))
            assert (grads["h0"][:, b] == parts(d_state)[0][:, b]).all()


@each_cell
@each_direction
def test_nan_stays_in_its_row(cell, bidirectional):
    params = recurrent_init(cell, I, H, num_layers=2, bidirectional=bidirectional, rng=np.random.default_rng(0))
    x = np.random.default_rng(1).standard_normal((6, 3, I))
    bad = x.copy()
    bad[2, 1] = np.nan
    options = dict(lengths=[6, 4, 5], residual=True, dropout=[np.random.default_rng(2).random((6, 3, (1 + bidirectional) * H)).round() * 2])
    (clean, _, tape), (dirty, _, bad_tape) = (recurrent_forward(cell, a, params, **options) for a in (x, bad))
    assert np.array_equal(clean[:, [0, 2]], dirty[:, [0, 2]]) and np.isnan(dirty[:, 1]).any() and (dirty[4:, 1] == 0).all()
    grads, bad_grads = (recurrent_backward(np.ones_like(clean), None, t) for t in (tape, bad_tape))
    assert np.array_equal(grads["x"][:, [0, 2]], bad_grads["x"][:, [0, 2]]) and (bad_grads["x"][4:, 1] == 0).all()
    stack = fill_(stack_of(cell, 2, bidirectional, residual=True, dtype=torch.float64), params)
    leaf = torch.from_numpy(bad).requires_grad_()
    stack(leaf, lengths=[6, 4, 5])[0].sum().backward()
    assert torch.isfinite(leaf.grad[:, [0, 2]]).all()


@each_cell
def test_carrying_the_state(cell):
    params = recurrent_init(cell, I, H, num_layers=3, rng=np.random.default_rng(5))
    x = np.random.default_rng(6).standard_normal((9, 2, I))
    whole, final, _ = recurrent_forward(cell, x, params)
    first, state, _ = recurrent_forward(cell, x[:4], params)
    second, end, _ = recurrent_forward(cell, x[4:], params, state)
    assert_parity((np.concatenate([first, second]), *parts(end)), (whole, *parts(final)))
    swapped = like(state, [part[[1, 0, 2]] for part in parts(state)])
    assert np.abs(recurrent_forward(cell, x[4:], params, swapped)[0] - whole[4:]).max() > 1e-4  # each layer has its own
    stack = fill_(stack_of(cell, 3, False, dtype=torch.float64), params)
    leaves = [torch.zeros(3, 2, H, dtype=torch.float64, requires_grad=True) for _ in parts(state)]
    stack(torch.from_numpy(x), like(state, leaves))[0].sum().backward()
    assert all((leaf.grad.abs().sum((1, 2)) > 0).all() for leaf in leaves)  # a state passed in is not detached


def test_parts_of_the_gradient_add_up():
    params = recurrent_init("lstm", I, H, num_layers=2, bidirectional=True, rng=np.random.default_rng(6))
    x, state = inputs("lstm", 4, 5, 2)
    output, (h, c), tape = recurrent_forward("lstm", x, params, state, lengths=[5, 3], residual=True)
    whole = recurrent_backward(output, (h, c), tape)
    three = [recurrent_backward(output, None, tape), recurrent_backward(None, (h, None), tape), recurrent_backward(None, (None, c), tape)]
    assert_parity({name: sum(part[name] for part in three) for name in whole}, whole)
    assert not any(g.any() for g in recurrent_backward(None, None, tape).values())


@each_cell
def test_arguments_are_left_alone(cell):
    params = recurrent_init(cell, I, I, num_layers=2, rng=np.random.default_rng(0))
    rng = np.random.default_rng(1)
    x, one = rng.standard_normal((5, 2, I)), rng.standard_normal((2, 2, I))
    state = (one, one.copy()) if cell == "lstm" else one
    masks = [np.ones((5, 2, I))]
    before = copy.deepcopy((params, x, state, masks))
    output, final, tape = recurrent_forward(cell, x, params, state, lengths=[5, 2], residual=True, dropout=masks)
    d_output, d_state = output.copy(), copy.deepcopy(final)
    kept = copy.deepcopy(d_output)
    grads, again = (recurrent_backward(d_output, d_state, tape) for _ in range(2))
    assert all(np.array_equal(grads[name], again[name]) for name in grads)  # the tape can be read twice
    assert np.array_equal(d_output, kept)
    kept = copy.deepcopy(grads)
    for array in (output, *parts(final)):
        array += 1
    third = recurrent_backward(d_output, d_state, tape)
    assert all(np.array_equal(third[name], kept[name]) for name in kept)
    assert np.array_equal(x, before[1]) and all(map(np.array_equal, parts(state), parts(before[2]))) and np.array_equal(masks[0], before[3][0])
    assert all(np.array_equal(params[name], before[0][name]) for name in params)


# ---- errors

LSTM = recurrent_init("lstm", I, H, num_layers=2, bidirectional=True, rng=np.random.default_rng(0))
RNN = recurrent_init("rnn", I, H, num_layers=2, rng=np.random.default_rng(0))
X = np.zeros((6, 3, I))


def zeros(*shape): return np.zeros(shape)


@pytest.mark.parametrize("cell, change, error, message", [
    ("rnn", dict(x=zeros(5, 3)), ValueError, r"x: expected 3 dimensions \(T, B, I\), got \(5, 3\)"),
    ("rnn", dict(x=np.zeros((6, 3, I), int)), TypeError, "x: expected a float array, got int64"),
    ("rnn", dict(x=zeros(6, 3, 7)), ValueError, r"weight_ih_l0: expected \(5, 7\), got \(5, 3\)"),
    ("rnn", dict(x=np.zeros((6, 3, I), np.float32)), TypeError, "weight_ih_l0: expected float32 like x, got float64"),
    ("rnn", dict(state=zeros(4, 3, H)), ValueError, r"h0: expected \(2, 3, 5\), got \(4, 3, 5\)"),
    ("rnn", dict(state=zeros(2, 3, 4)), ValueError, r"h0: expected \(2, 3, 5\), got \(2, 3, 4\)"),
    ("rnn", dict(state=np.zeros((2, 3, H), np.float32)), TypeError, "h0: expected float64 like x, got float32"),
    ("rnn", dict(state=(zeros(2, 3, H),)), TypeError, "state: expected an array, got a tuple"),
    ("lstm", dict(state=(zeros(2, 3, H), zeros(4, 3, H))), ValueError, r"h0: expected \(4, 3, 5\), got \(2, 3, 5\)"),
    ("lstm", dict(state=(zeros(4, 3, H), zeros(4, 2, H))), ValueError, r"c0: expected \(4, 3, 5\), got \(4, 2, 5\)"),
    ("lstm", dict(state=zeros(4, 3, H)), TypeError, r"state: expected a pair \(h, c\), got ndarray"),
    ("lstm", dict(state=(zeros(4, 3, H), np.zeros((4, 3, H), np.float32))), TypeError, "c0: expected float64 like x, got float32"),
    ("rnn", dict(lengths=[6, 7, 1]), ValueError, "lengths: expected values from 0 to 6, got 7"),
    ("rnn", dict(lengths=[6, -1, 1]), ValueError, "lengths: expected values from 0 to 6, got -1"),
    ("lstm", dict(lengths=[6.0, 1.0, 1.0]), TypeError, "lengths: expected integers, got float64"),
    ("lstm", dict(lengths=[6, 1]), ValueError, r"lengths: expected \(3,\), got \(2,\)"),
    ("rnn", dict(params=RNN | {"weight_ih_l1": zeros(H, 4)}), ValueError, r"weight_ih_l1: expected \(5, 5\), got \(5, 4\)"),
    ("rnn", dict(params=RNN | {"bias_hh_l1": zeros(4)}), ValueError, r"bias_hh_l1: expected \(5,\), got \(4,\)"),
    ("rnn", dict(params=RNN | {"weight_hh_l1": np.zeros((H, H), np.float32)}), TypeError, "weight_hh_l1: expected float64 like x, got float32"),
    ("lstm", dict(params=LSTM | {"bias_ih_l1_reverse": zeros(4)}), ValueError, r"bias_ih_l1_reverse: expected \(20,\), got \(4,\)"),
    ("lstm", dict(params=LSTM | {"weight_ih_l1": zeros(20, 5), "weight_ih_l1_reverse": zeros(20, 5)}), ValueError, r"weight_ih_l1: expected \(20, 10\), got \(20, 5\)"),
    ("lstm", dict(params={name: p for name, p in LSTM.items() if name != "bias_ih_l1_reverse"}), ValueError, "params: expected bias_ih_l1 and bias_ih_l1_reverse, got no bias_ih_l1_reverse"),
    ("rnn", dict(params={name: p for name, p in RNN.items() if "_l0" not in name}), ValueError, r"params: expected layers 0, 1, ... without a gap, got \[1\]"),
    ("rnn", dict(params={}), ValueError, r"params: expected layers 0, 1, ... without a gap, got \[\]"),
    ("rnn", dict(params=RNN | {"weight_hh_l1": zeros(H, 4)}), ValueError, r"weight_hh_l1: expected \(5, 5\), got \(5, 4\)"),
    ("rnn", dict(params=RNN | {name.replace("l0", "l1"): p for name, p in rnn_init(H, 7, rng=np.random.default_rng(0)).items()}), ValueError,
     r"weight_hh_l1: expected \(5, 5\), got \(7, 7\)"),
    ("lstm", dict(params=LSTM | {"weight_hh_l1": zeros(20, 6)}), ValueError, r"weight_hh_l1: expected \(20, 5\), got \(20, 6\)"),
    ("lstm", dict(params=LSTM | {"weight_hh_l1_reverse": zeros(20, 6)}), ValueError, r"weight_hh_l1_reverse: expected \(20, 5\), got \(20, 6\)"),
    ("rnn", dict(params={name: p for name, p in RNN.items() if name != "weight_hh_l1"}), KeyError, "weight_hh_l1"),
    (lstm_forward, {}, TypeError, r"cell: expected a name or a pair \(forward, backward\), got <function lstm_forward"),
    ("rrn", {}, ValueError, "cell: expected one of 'rnn', 'lstm', 'gru' or a pair .forward, backward., got 'rrn'"),
    ("rnn", dict(nonlinearity="sine"), ValueError, "nonlinearity: expected one of"),
    ("rnn", dict(dropout=1.5), ValueError, "dropout: expected a probability from 0 to 1, got 1.5"),
    ("rnn", dict(dropout="0.5"), TypeError, "dropout: expected a number or a list of masks, got str"),
    ("rnn", dict(dropout=zeros(6, 3, H)), TypeError, "dropout: expected a number or a list of masks, got ndarray"),
    ("rnn", dict(dropout=0.5), TypeError, "rng: expected a numpy.random.Generator, got NoneType"),
    ("rnn", dict(dropout=0.5, rng=0), TypeError, "rng: expected a numpy.random.Generator, got int"),
    ("rnn", dict(dropout=[zeros(6, 3, H), zeros(6, 3, H)]), ValueError, "dropout: expected 1 masks, got 2"),
    ("rnn", dict(dropout=[torch.zeros(6, 3, H)]), TypeError, r"dropout\[0\]: expected an array, got Tensor"),
    ("rnn", dict(dropout=[zeros(6, 1, H)]), ValueError, r"dropout\[0\]: expected \(6, 3, 5\), got \(6, 1, 5\)"),
    ("rnn", dict(dropout=[np.zeros((6, 3, H), np.float32)]), TypeError, r"dropout\[0\]: expected float64 like x, got float32"),
])
def test_errors_name_the_argument(cell, change, error, message):
    call = dict(x=X, params=LSTM if cell == "lstm" else RNN, state=None) | change
    with pytest.raises(error, match=message):
        recurrent_forward(cell, call.pop("x"), call.pop("params"), call.pop("state"), **call)


@pytest.mark.parametrize("cell, d_output, d_state, error, message", [
    ("rnn", zeros(5, 3, H), None, ValueError, r"d_output: expected \(6, 3, 5\), got \(5, 3, 5\)"),
    ("rnn", np.zeros((6, 3, H), np.float32), None, TypeError, "d_output: expected float64 like the states, got float32"),
    ("rnn", None, zeros(1, 3, H), ValueError, r"d_state: expected \(2, 3, 5\), got \(1, 3, 5\)"),
    ("rnn", None, (zeros(2, 3, H), None), TypeError, "d_state: expected an array, got a tuple"),
    ("lstm", None, zeros(4, 3, H), TypeError, r"d_state: expected a pair \(h, c\), got ndarray"),
    ("lstm", None, (None, zeros(2, 3, H)), ValueError, r"d_state, c: expected \(4, 3, 5\), got \(2, 3, 5\)"),
])
def test_backward_errors_name_the_argument(cell, d_output, d_state, error, message):
    _, _, tape = recurrent_forward(cell, X, LSTM if cell == "lstm" else RNN)
    with pytest.raises(error, match=message):
        recurrent_backward(d_output, d_state, tape)


@pytest.mark.parametrize("cell, x, state, error, message", [
    ("rnn", torch.zeros(6, I), None, ValueError, r"x: expected \(T, B, I\) with I = 3, got \(6, 3\)"),
    ("rnn", torch.zeros(6, I), torch.zeros(2, 3, H), ValueError, r"x: expected \(T, B, I\) with I = 3, got \(6, 3\)"),
    ("rnn", torch.zeros(6, 3, 4), None, ValueError, r"x: expected \(T, B, I\) with I = 3, got \(6, 3, 4\)"),
    ("rnn", torch.zeros(6, 3, I).double(), None, TypeError, "x: expected torch.float32 like the weights, got torch.float64"),
    ("rnn", torch.zeros(6, 3, I), torch.zeros(1, 3, H), ValueError, r"h0: expected \(2, 3, 5\), got \(1, 3, 5\)"),
    ("rnn", torch.zeros(6, 3, I), torch.zeros(2, 3, H).double(), TypeError, "h0: expected torch.float32 like x, got torch.float64"),
    ("lstm", torch.zeros(6, 3, I), torch.zeros(2, 3, H), TypeError, r"state: expected a tuple \(h0, c0\), got Tensor"),
    ("lstm", torch.zeros(6, 3, I), (torch.zeros(2, 3, H), torch.zeros(2, 3, 4)), ValueError, r"c0: expected \(2, 3, 5\), got \(2, 3, 4\)"),
    ("gru", torch.zeros(6, 3, I), torch.zeros(2, 6, H), ValueError, r"h0: expected \(2, 3, 5\), got \(2, 6, 5\)"),
])
def test_stack_errors_name_the_argument(cell, x, state, error, message):
    with pytest.raises(error, match=message):
        stack_of(cell, 2, False)(x, state)


def test_a_stack_of_two_directions_names_the_shape_of_its_state():
    with pytest.raises(ValueError, match=r"h0: expected \(4, 3, 5\), got \(2, 3, 5\)"):
        stack_of("gru", 2, True, batch_first=True)(torch.zeros(3, 6, I), torch.zeros(2, 3, H))


@pytest.mark.parametrize("layers, options, message", [
    ([], {}, "layers: expected at least one, got none"),
    ([(I, H), (4, H)], {}, r"layers\[1\]: expected input_size 5, got 4"),
    ([(I, H), (H, 4)], {}, r"layers\[1\]: expected state sizes \(5,\) as below, got \(4,\)"),
    ([(I, H), (H, H)], dict(dropout=-0.1), "dropout: expected a probability from 0 to 1, got -0.1"),
])
def test_layers_that_do_not_fit(layers, options, message):
    with pytest.raises(ValueError, match=message):
        Stacked([RNNLayer(*sizes) for sizes in layers], **options)


def test_a_merge_that_is_none_of_ours():
    with pytest.raises(ValueError, match="merge: expected one of 'concat', 'sum', 'mean', got 'add'"):
        recurrent_init("rnn", I, H, num_layers=2, bidirectional=True, merge="add", rng=np.random.default_rng(0))


def test_layers_that_differ_in_kind():
    with pytest.raises(ValueError, match=r"layers\[1\]: expected state sizes \(5,\) as below, got \(5, 5\)"):
        Stacked([RNNLayer(I, H), LSTMLayer(H, H)])
    with pytest.raises(ValueError, match=r"layers\[1\]: expected batch_first False as below, got True"):
        Stacked([RNNLayer(I, H), RNNLayer(H, H, batch_first=True)])
    with pytest.raises(ValueError, match=r"layers\[1\]: expected input_size 10, got 5"):
        Stacked([Bidirectional(GRULayer(I, H), GRULayer(I, H)), GRULayer(H, H)])
    with pytest.raises(TypeError, match=r"layers\[1\]: expected a layer with a cell, such as LSTMLayer, or a Bidirectional, got LSTM$"):
        Stacked([LSTMLayer(I, H), torch.nn.LSTM(H, H)])
    with pytest.raises(TypeError, match="layers: expected a list of layers, got one LSTMLayer"):
        Stacked(LSTMLayer(I, H))
    with pytest.raises(TypeError, match="dropout: expected a number or a module, got NoneType"):
        Stacked([RNNLayer(I, H)], dropout=None)
    assert Stacked([RNNLayer(I, H), GRULayer(H, H)])(torch.zeros(2, 2, I))[1].shape == (2, 2, H)  # kinds with one part each


def test_face_and_state_dict():
    stack = stack_of("lstm", 2, True, dropout=0.2, residual=True)
    assert "Dropout(p=0.2" in repr(stack) and "residual=True" in repr(stack)
    assert list(stack.state_dict())[0] == "layers.0.forward_layer.cell.weight_ih"
    assert list(numpy_params(stack)) == list(numpy_params(torch.nn.LSTM(I, H, 2, bidirectional=True)))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        theirs = numpy_params(torch.nn.LSTM(I, H, 2, bidirectional=True))
        torch.manual_seed(1)
        ours = numpy_params(stack_of("lstm", 2, True))
    assert all(np.array_equal(ours[name], p) for name, p in theirs.items())  # the same seed, the same weights


@pytest.mark.parametrize("change", [copy.deepcopy, lambda stack: stack.double()])
def test_copies_and_casts(change):
    stack = stack_of("gru", 2, True)
    changed = change(copy.deepcopy(stack))
    x = torch.randn(4, 2, I, generator=torch.Generator().manual_seed(0))
    expected = stack(x)[0].detach()
    assert_parity(changed(x.to(next(changed.parameters()).dtype))[0].detach(), expected, tol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@each_cell
@each_direction
def test_cuda(cell, bidirectional):
    params = recurrent_init(cell, I, H, num_layers=2, bidirectional=bidirectional, rng=np.random.default_rng(0))
    stack = fill_(stack_of(cell, 2, bidirectional, residual=True, dtype=torch.float64), params).cuda()
    x, state = inputs(cell, 2 * (1 + bidirectional), 12, 4)
    lengths = [12, 0, 5, 7]
    output, final, tape = recurrent_forward(cell, x, params, state, lengths=lengths, residual=True)
    grads = recurrent_backward(*arriving(output, final), tape)
    leaves = [torch.from_numpy(a).cuda().requires_grad_() for a in (x, *parts(state))]
    answer, last = stack(leaves[0], like(state, leaves[1:]), lengths=torch.tensor(lengths).cuda())
    assert_parity((answer.detach(), *(s.detach() for s in parts(last))), (output, *parts(final)), tol=1e-10)
    loss_of(answer, *parts(last)).backward()
    found = dict(zip(("x", "h0", "c0"), (leaf.grad for leaf in leaves))) | dict(zip(numpy_params(stack), (p.grad for p in stack.parameters())))
    assert_parity(found, grads, tol=1e-10)
