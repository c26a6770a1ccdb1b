"""The LSTM: NumPy = PyTorch = torch.nn, its variants, its gradients, its rules for lengths and states, and its errors."""
import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rnnbook.lstm import (
    CellLayer, LSTMCell, LSTMLayer, chrono_bias, lstm_backward, lstm_forward, lstm_init, lstm_step, set_gate_biases, set_gate_biases_,
)
from rnnbook.rnn import RNNCell, RNNLayer, numpy_params
from rnnbook.testing import assert_parity, gradient_check

VARIANTS = {
    "2000": {}, "1997": dict(forget_gate=False), "coupled": dict(coupled=True), "peephole": dict(peephole=True),
    "1997, peephole": dict(forget_gate=False, peephole=True), "coupled, peephole": dict(coupled=True, peephole=True),
}
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
each_size = pytest.mark.parametrize("P", [0, 3])


def pair(bias=True, P=0, I=3, H=5, seed=0, dtype=torch.float64):
    "`torch.nn.LSTM` and our layer with the same weights."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        theirs = torch.nn.LSTM(I, H, bias=bias, proj_size=P, dtype=dtype)
    return theirs, layer_of(numpy_params(theirs), I, H, bias=bias, proj_size=P, dtype=dtype)


def layer_of(params, I, H, dtype=torch.float64, **options):
    "Our layer with these parameters."
    layer = LSTMLayer(I, H, dtype=dtype, **options)
    layer.cell.load_state_dict({name.removesuffix("_l0"): torch.from_numpy(p) for name, p in params.items()})
    return layer


def inputs(T, B, I=3, H=5, P=0, carried=True, seed=0):
    "x, h0 and c0 as tensors; the states None unless carried."
    rng = np.random.default_rng(seed + T + B)
    x, h0, c0 = (torch.from_numpy(rng.standard_normal(shape)) for shape in ((T, B, I), (1, B, P or H), (1, B, H)))
    return x, (h0, c0) if carried else None


def reference(theirs, x, state, lengths):
    "What torch.nn.LSTM answers, through a packed sequence where there are lengths: output, h, c."
    if lengths is None:
        output, final = theirs(x, state)
        return output, *final
    packed, final = theirs(pack_padded_sequence(x, lengths, enforce_sorted=False), state)
    return pad_packed_sequence(packed, total_length=len(x))[0], *final


def flat(answer):
    "Output, h and c of any of our functions."
    return answer[0], *answer[1]


def arrays(state):
    return None if state is None else tuple(s.numpy() for s in state)


def loss_of(output, h, c):
    "A lopsided loss of tensors."
    return output.sin().sum() + (h ** 2).sum() + c.cos().sum()


def arriving(output, h, c):
    "The gradients of that loss for NumPy's answers."
    return np.cos(output), (2 * h, -np.sin(c))


GRID = [case for case in itertools.product((True, False), (0, 3), (1, 2, 13, 300), (1, 4), (False, True), (False, True)) if case[2] < 300 or case[3] == 4]


@pytest.mark.parametrize("bias, P, T, B, carried, unequal", GRID)
def test_equals_torch_with_gradients(bias, P, T, B, carried, unequal):
    theirs, ours = pair(bias, P)
    x, state = inputs(T, B, P=P, carried=carried)
    lengths = np.random.default_rng(T).integers(1, T + 1, B).tolist() if unequal else None
    params, grads = numpy_params(theirs), []
    for module in (theirs, ours):
        leaves = [a.clone().requires_grad_() for a in (x, *(state or ()))]
        states = tuple(leaves[1:]) or None
        answer = reference(theirs, leaves[0], states, lengths) if module is theirs else flat(ours(leaves[0], states, lengths=lengths))
        loss_of(*answer).backward()
        grads.append(dict(zip(("x", "h0", "c0"), (leaf.grad for leaf in leaves))) | {f"{name.removeprefix('cell.').removesuffix('_l0')}_l0": p.grad for name, p in module.named_parameters()})
        if module is theirs:
            expected = tuple(a.detach() for a in answer)
    assert_parity(tuple(a.detach() for a in answer), expected, tol=1e-12)
    output, final, tape = lstm_forward(x.numpy(), params, arrays(state), lengths=lengths)
    assert_parity((output, *final), expected, tol=1e-12)
    by_hand = lstm_backward(*arriving(output, *final), tape)
    assert set(by_hand) == {"x", "h0", "c0", *params}
    for name, grad in grads[0].items():
        assert_parity(grads[1][name], grad, tol=1e-9, name=name)
        assert_parity(by_hand[name], grad, tol=1e-9, name=name)


@each_variant
@each_size
@pytest.mark.parametrize("lengths", [None, [6, 2, 0, 5]])
def test_variants_numpy_equals_pytorch_and_central_differences(options, P, lengths):
    rng = np.random.default_rng(1)
    params = lstm_init(3, 4, rng=rng, proj_size=P, **options)
    x, state = inputs(6, 4, H=4, P=P)
    point = {"x": x.numpy(), "h0": state[0].numpy(), "c0": state[1].numpy(), **params}

    def run(at):
        return lstm_forward(at["x"], {name: at[name] for name in params}, (at["h0"], at["c0"]), lengths=lengths, **options)

    def loss(at):
        output, (h, c), _ = run(at)
        return np.sin(output).sum() + (h ** 2).sum() + np.cos(c).sum()

    output, final, tape = run(point)
    grads = lstm_backward(*arriving(output, *final), tape)
    assert max(gradient_check(loss, point, grads, tol=1e-6).values()) < 1e-6
    layer = layer_of(params, 3, 4, proj_size=P, **options)
    leaves = [x.requires_grad_(), *(s.requires_grad_() for s in state)]
    answer = flat(layer(leaves[0], tuple(leaves[1:]), lengths=lengths))
    assert_parity(tuple(a.detach() for a in answer), (output, *final), tol=1e-12)
    loss_of(*answer).backward()
    for name, leaf in zip(("x", "h0", "c0"), leaves):
        assert_parity(leaf.grad, grads[name], tol=1e-9, name=name)
    for name, p in layer.cell.named_parameters():
        assert_parity(p.grad, grads[f"{name}_l0"], tol=1e-9, name=name)


@each_variant
@each_size
def test_forward_is_the_step_repeated(options, P):
    rng = np.random.default_rng(2)
    params = lstm_init(3, 4, rng=rng, proj_size=P, **options)
    x, state = inputs(7, 2, H=4, P=P)
    output, final, tape = lstm_forward(x.numpy(), params, arrays(state), **options)
    h, c = (s[0].numpy() for s in state)
    cell = layer_of(params, 3, 4, proj_size=P, **options).cell
    for t in range(7):
        assert_parity(cell(x[t], (torch.from_numpy(h), torch.from_numpy(c))), lstm_step(x[t].numpy(), (h, c), params, **options))
        h, c = lstm_step(x[t].numpy(), (h, c), params, **options)
        assert_parity(output[t], h)
    assert_parity((h, c), (final[0][0], final[1][0]))
    assert tape["c"].shape == (8, 2, 4) and tape["h"].shape == (8, 2, P or 4)


def test_the_equations_of_the_variants():
    "Each option against its equation, written out for one step."
    rng = np.random.default_rng(3)
    x, h, c = rng.standard_normal((2, 3)), rng.standard_normal((2, 4)), rng.standard_normal((2, 4))
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    for options in VARIANTS.values():
        p = lstm_init(3, 4, rng=rng, **options)
        a = x @ p["weight_ih_l0"].T + p["bias_ih_l0"] + h @ p["weight_hh_l0"].T + p["bias_hh_l0"]
        blocks = np.split(a, a.shape[1] // 4, axis=1)
        a_i, a_g, a_o = blocks[0], blocks[-2], blocks[-1]
        seen = {gate: p.get(f"peephole_{gate}_l0", 0) for gate in "ifo"}
        i = sigmoid(a_i + seen["i"] * c)
        f = 1 if options.get("forget_gate") is False else 1 - i if options.get("coupled") else sigmoid(blocks[1] + seen["f"] * c)
        new = f * c + i * np.tanh(a_g)
        expected = sigmoid(a_o + seen["o"] * new) * np.tanh(new), new
        assert_parity(lstm_step(x, (h, c), p, **options), expected)
        assert ("peephole_f_l0" in p) == (len(blocks) == 4 and "peephole" in options)


def test_variants_are_the_standard_lstm_with_special_weights():
    rng = np.random.default_rng(4)
    params, x = lstm_init(3, 4, rng=rng), rng.standard_normal((9, 2, 3))
    wide_open = set_gate_biases(params, f=60.0)
    keep = np.r_[0:4, 8:16]
    expected, state, _ = lstm_forward(x, {name: p[keep] for name, p in params.items()}, forget_gate=False)
    wide_open["weight_ih_l0"], wide_open["weight_hh_l0"] = wide_open["weight_ih_l0"].copy(), wide_open["weight_hh_l0"].copy()
    wide_open["weight_ih_l0"][4:8] = wide_open["weight_hh_l0"][4:8] = 0
    assert_parity(lstm_forward(x, wide_open)[0], expected)                       # f = 1
    mirrored = {name: np.concatenate([p[:4], -p[:4], p[8:]]) for name, p in params.items()}
    coupled = {name: p[keep] for name, p in params.items()}
    assert_parity(lstm_forward(x, mirrored)[:2], lstm_forward(x, coupled, coupled=True)[:2])  # 1 - s(a) = s(-a)
    blind = params | {f"peephole_{gate}_l0": np.zeros(4) for gate in "ifo"}
    assert_parity(lstm_forward(x, blind, peephole=True)[:2], lstm_forward(x, params)[:2])
    square = params | {"weight_hr_l0": np.eye(4)}
    assert_parity(lstm_forward(x, square)[:2], lstm_forward(x, params)[:2])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_cell_drops_in(bias, batched):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        theirs = torch.nn.LSTMCell(3, 4, bias, dtype=torch.float64)
        torch.manual_seed(7)
        ours = LSTMCell(3, 4, bias, dtype=torch.float64)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert repr(ours) == repr(theirs)
    x, h, c = (torch.linspace(-1, 1, 2 * n, dtype=torch.float64).reshape(2, n) for n in (3, 4, 4))
    if not batched:
        x, h, c = x[0], h[0], c[0]
    assert_parity(ours(x, (h, c)), theirs(x, (h, c)))
    assert_parity(ours(input=x), theirs(input=x))
    assert ours(x)[0].shape == theirs(x)[0].shape


def test_same_seed_same_weights_as_torch():
    for P in (0, 2):
        with torch.random.fork_rng():
            torch.manual_seed(11)
            ours = numpy_params(LSTMLayer(3, 4, proj_size=P))
            torch.manual_seed(11)
            theirs = numpy_params(torch.nn.LSTM(3, 4, proj_size=P))
        assert list(ours) == list(theirs) and all((ours[name] == theirs[name]).all() for name in ours)


def test_repr_says_what_differs():
    assert "LSTMCell(3, 4, bias=False, proj_size=2, peephole=True)" in repr(LSTMLayer(3, 4, bias=False, proj_size=2, peephole=True))
    assert repr(LSTMCell(3, 4, coupled=True)) == "LSTMCell(3, 4, coupled=True)"


@each_variant
@each_size
def test_names_and_shapes_agree(options, P):
    params = lstm_init(3, 4, 2, rng=np.random.default_rng(0), proj_size=P, **options)
    model = torch.nn.Module()
    model.layer, model.readout = LSTMLayer(3, 4, proj_size=P, **options), torch.nn.Linear(P or 4, 2)
    assert {name: p.shape for name, p in numpy_params(model).items()} == {name: p.shape for name, p in params.items()}
    for p in params.values():
        assert np.abs(p).max() <= 0.5
    assert not any(name.startswith("bias_i") for name in lstm_init(3, 4, rng=np.random.default_rng(0), bias=False))


def test_batch_first():
    theirs, ours = pair()
    first = LSTMLayer(3, 5, batch_first=True, dtype=torch.float64)
    first.load_state_dict(ours.state_dict())
    x, state = inputs(6, 2)
    expected, answer = flat(ours(x, state, lengths=[6, 4])), flat(first(x.transpose(0, 1), state, lengths=[6, 4]))
    assert torch.equal(answer[0].transpose(0, 1), expected[0]) and torch.equal(answer[1], expected[1]) and torch.equal(answer[2], expected[2])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 7), st.integers(0, 4), st.sampled_from(list(VARIANTS.values())), st.data())
def test_padding_state_and_empty_sequences(T, B, options, data):
    "Any lengths: each sequence comes out as if alone, forward and backward, whatever its padding holds, bit for bit."
    lengths = data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
    rng = np.random.default_rng(T * 10 + B)
    params = lstm_init(2, 3, rng=rng, **options)
    x, state = rng.standard_normal((T, B, 2)), tuple(rng.standard_normal((2, 1, B, 3)))
    rubbish = x.copy()
    for b, n in enumerate(lengths):
        rubbish[n:, b] = np.nan
    output, final, tape = lstm_forward(x, params, state, lengths=lengths, **options)
    again, final_again, tape_again = lstm_forward(rubbish, params, state, lengths=lengths, **options)
    assert output.shape == (T, B, 3) and final[0].shape == final[1].shape == (1, B, 3)
    assert np.array_equal(output, again) and all(map(np.array_equal, final, final_again))
    d_output, d_state = arriving(output, *final)
    noisy = np.where(np.arange(T)[:, None, None] < np.array(lengths, int)[None, :, None], d_output, np.nan)
    grads, grads_again = lstm_backward(d_output, d_state, tape), lstm_backward(noisy, d_state, tape_again)
    assert all(np.array_equal(grads[name], grads_again[name]) for name in grads)
    layer = layer_of(params, 2, 3, **options)
    clean, dirty = (flat(layer(torch.from_numpy(a), tuple(map(torch.from_numpy, state)), lengths=torch.tensor(lengths, dtype=torch.int64))) for a in (x, rubbish))
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert_parity(clean, (output, *final))
    for b, n in enumerate(lengths):
        one = slice(b, b + 1)
        alone, alone_final, alone_tape = lstm_forward(x[:n, one], params, tuple(s[:, one] for s in state), **options)
        assert_parity((output[:n, one], *(s[:, one] for s in final)), (alone, *alone_final))
        assert (output[n:, b] == 0).all() and (grads["x"][n:, b] == 0).all()
        alone_grads = lstm_backward(d_output[:n, one], tuple(d[:, one] for d in d_state), alone_tape)
        assert_parity((grads["x"][:n, one], grads["h0"][:, one], grads["c0"][:, one]), tuple(alone_grads[name] for name in ("x", "h0", "c0")))
        if n == 0:
            assert all((s[0, b] == s0[0, b]).all() for s, s0 in zip(final, state))
            assert (grads["c0"][0, b] == d_state[1][0, b]).all()


@each_variant
def test_nan_stays_in_its_row(options):
    rng = np.random.default_rng(0)
    params, x = lstm_init(3, 4, rng=rng, **options), rng.standard_normal((6, 3, 3))
    bad = x.copy()
    bad[2, 1] = np.nan
    others = [0, 2]
    (clean, _, tape), (dirty, _, bad_tape) = (lstm_forward(a, params, lengths=[6, 4, 5], **options) for a in (x, bad))
    assert np.array_equal(clean[:, others], dirty[:, others]) and np.isnan(dirty[2:4, 1]).all() and (dirty[4:, 1] == 0).all()
    grads, bad_grads = (lstm_backward(np.ones_like(clean), None, t) for t in (tape, bad_tape))
    assert np.array_equal(grads["x"][:, others], bad_grads["x"][:, others]) and (bad_grads["x"][4:, 1] == 0).all()
    leaf = torch.from_numpy(bad).requires_grad_()
    layer_of(params, 3, 4, **options)(leaf)[0].sum().backward()
    assert torch.isfinite(leaf.grad[:, others]).all()


def test_carrying_the_state():
    rng = np.random.default_rng(5)
    params, x = lstm_init(3, 4, rng=rng), rng.standard_normal((9, 2, 3))
    whole, final, _ = lstm_forward(x, params)
    first, state, _ = lstm_forward(x[:4], params)
    second, end, _ = lstm_forward(x[4:], params, state)
    assert_parity((np.concatenate([first, second]), *end), (whole, *final))
    only_h, _, _ = lstm_forward(x[4:], params, (state[0], np.zeros((1, 2, 4))))
    assert np.abs(only_h - whole[4:]).max() > 0.01  # the cell belongs to the state
    layer = layer_of(params, 3, 4)
    leaves = [torch.zeros(1, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    layer(torch.from_numpy(x), tuple(leaves))[1][1].sum().backward()
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves)  # a state passed in is not detached


def test_parts_of_the_gradient_add_up():
    rng = np.random.default_rng(6)
    params, x = lstm_init(3, 4, rng=rng, proj_size=2, peephole=True), rng.standard_normal((5, 2, 3))
    output, (h, c), tape = lstm_forward(x, params, lengths=[5, 3], peephole=True)
    whole = lstm_backward(output, (h, c), tape)
    parts = [lstm_backward(output, None, tape), lstm_backward(None, (h, None), tape), lstm_backward(None, (None, c), tape)]
    assert_parity({name: sum(part[name] for part in parts) for name in whole}, whole)
    assert not any(g.any() for g in lstm_backward(None, None, tape).values())


def test_arguments_are_left_alone():
    rng = np.random.default_rng(0)
    params, x, state = lstm_init(3, 4, rng=rng), rng.standard_normal((5, 2, 3)), tuple(rng.standard_normal((2, 1, 2, 4)))
    before = copy.deepcopy((params, x, state))
    output, final, tape = lstm_forward(x, params, state, lengths=[5, 2])
    d_output, d_state = output.copy(), tuple(s.copy() for s in final)
    kept = copy.deepcopy(tape)
    grads = lstm_backward(d_output, d_state, tape)
    again = lstm_backward(d_output, d_state, tape)
    assert all(np.array_equal(grads[name], again[name]) for name in grads)  # the tape can be read twice
    assert all(np.array_equal(tape[key], kept[key]) for key in ("x", "h", "c", "gates", "tanh_c"))
    for array in (output, *final, grads["h0"], grads["c0"]):
        array += 1
    assert np.array_equal(tape["h"], kept["h"]) and np.array_equal(tape["c"], kept["c"])
    assert np.array_equal(x, before[1]) and all(map(np.array_equal, state, before[2]))
    assert all(np.array_equal(params[name], before[0][name]) for name in params)


@each_variant
@each_size
def test_float32(options, P):
    rng = np.random.default_rng(0)
    params = lstm_init(3, 4, rng=rng, proj_size=P, dtype=np.float32, **options)
    x = rng.standard_normal((20, 2, 3)).astype(np.float32)
    output, final, tape = lstm_forward(x, params, lengths=[20, 7], **options)
    grads = lstm_backward(output, final, tape)
    assert {array.dtype for array in (output, *final, *grads.values(), tape["gates"], tape["c"])} == {np.dtype(np.float32)}
    assert {s.dtype for s in lstm_step(x[0], (final[0][0], final[1][0]), params, **options)} == {np.dtype(np.float32)}
    layer = layer_of(params, 3, 4, torch.float32, proj_size=P, **options)
    answer = flat(layer(torch.from_numpy(x), lengths=[20, 7]))
    for ours, expected in zip(answer, (output, *final)):
        torch.testing.assert_close(ours.detach(), torch.from_numpy(expected))
    if not options:
        theirs, ours = pair(P=P, dtype=torch.float32)
        packed = reference(theirs, torch.from_numpy(x), None, [20, 7])
        for a, b in zip(flat(ours(torch.from_numpy(x), lengths=[20, 7])), packed):
            torch.testing.assert_close(a, b)


def test_large_pre_activations_do_not_overflow():
    params = lstm_init(3, 4, rng=np.random.default_rng(0))
    with np.errstate(all="raise", under="ignore"):
        output, final, tape = lstm_forward(np.full((3, 2, 3), 1e5), params)
        lstm_backward(output, final, tape)
        lstm_step(np.full((2, 3), -1e5), (final[0][0], final[1][0]), params)
    assert np.isfinite(output).all()


PARAMS = lstm_init(3, 4, rng=np.random.default_rng(0))
PEEPHOLES = {f"peephole_{gate}_l0": np.zeros(4) for gate in "ifo"}


@pytest.mark.parametrize("change, error, message", [
    (dict(x=np.zeros((5, 3))), ValueError, r"x: expected 3 dimensions \(T, B, I\), got \(5, 3\)"),
    (dict(x=np.zeros((5, 2, 3), int)), TypeError, r"x: expected a float array, got int64"),
    (dict(x=np.zeros((5, 2, 7))), ValueError, r"weight_ih_l0: expected \(16, 7\), got \(16, 3\)"),
    (dict(x=np.zeros((5, 2, 3), np.float32)), TypeError, r"weight_ih_l0: expected float32 like x, got float64"),
    (dict(state=(np.zeros((1, 3, 4)), np.zeros((1, 2, 4)))), ValueError, r"h0: expected \(1, 2, 4\), got \(1, 3, 4\)"),
    (dict(state=(np.zeros((1, 2, 4)), np.zeros((2, 4)))), ValueError, r"c0: expected \(1, 2, 4\), got \(2, 4\)"),
    (dict(state=(np.zeros((1, 2, 4)), np.zeros((1, 2, 4), np.float32))), TypeError, r"c0: expected float64 like x, got float32"),
    (dict(state=np.zeros((1, 2, 4))), TypeError, r"state: expected a pair \(h, c\), got ndarray"),
    (dict(state=(np.zeros((1, 2, 4)),)), TypeError, r"state: expected a pair \(h, c\), got a tuple of 1"),
    (dict(lengths=[5, 6]), ValueError, r"lengths: expected values from 0 to 5, got 6"),
    (dict(lengths=[5, -1]), ValueError, r"lengths: expected values from 0 to 5, got -1"),
    (dict(lengths=[5.0, 1.0]), TypeError, r"lengths: expected integers, got float64"),
    (dict(lengths=[5]), ValueError, r"lengths: expected \(2,\), got \(1,\)"),
    (dict(coupled=True, forget_gate=False), ValueError, r"coupled: expected False with forget_gate=False, got True"),
    (dict(coupled=True), ValueError, r"weight_ih_l0: expected \(12, 3\), got \(16, 3\)"),
    (dict(forget_gate=False), ValueError, r"weight_ih_l0: expected \(12, 3\), got \(16, 3\)"),
    (dict(peephole=True), ValueError, r"peephole_i_l0: expected \(4,\) with peephole=True, got none"),
    (dict(params=PARAMS | PEEPHOLES), ValueError, r"peephole_i_l0: expected none with peephole=False, got \(4,\)"),
    (dict(params=PARAMS | PEEPHOLES | {"peephole_o_l0": np.zeros(3)}, peephole=True), ValueError, r"peephole_o_l0: expected \(4,\), got \(3,\)"),
    (dict(params=PARAMS | {"weight_hr_l0": np.zeros((2, 4))}), ValueError, r"weight_hr_l0: expected \(4, 4\), got \(2, 4\)"),
    (dict(params=PARAMS | {"bias_hh_l0": np.zeros(4)}), ValueError, r"bias_hh_l0: expected \(16,\), got \(4,\)"),
])
def test_errors_name_the_argument(change, error, message):
    call = dict(x=np.zeros((5, 2, 3)), params=PARAMS, state=None) | change
    with pytest.raises(error, match=message):
        lstm_forward(call.pop("x"), call.pop("params"), call.pop("state"), **call)


@pytest.mark.parametrize("d_output, d_state, error, message", [
    (np.zeros((4, 2, 4)), None, ValueError, r"d_output: expected \(5, 2, 4\), got \(4, 2, 4\)"),
    (np.zeros((5, 2, 4), np.float32), None, TypeError, r"d_output: expected float64 like the states, got float32"),
    (None, np.zeros((1, 2, 4)), TypeError, r"d_state: expected a pair \(h, c\), got ndarray"),
    (None, (None, np.zeros((2, 4))), ValueError, r"d_state, c: expected \(1, 2, 4\), got \(2, 4\)"),
])
def test_backward_errors_name_the_argument(d_output, d_state, error, message):
    _, _, tape = lstm_forward(np.zeros((5, 2, 3)), PARAMS)
    with pytest.raises(error, match=message):
        lstm_backward(d_output, d_state, tape)


ZEROS = torch.zeros(1, 2, 4)


@pytest.mark.parametrize("x, state, error, message", [
    (torch.zeros(5, 3), None, ValueError, r"x: expected \(T, B, I\) with I = 3, got \(5, 3\)"),
    (torch.zeros(5, 2, 4), None, ValueError, r"x: expected \(T, B, I\) with I = 3, got \(5, 2, 4\)"),
    (torch.zeros(5, 2, 3, dtype=torch.float64), None, TypeError, r"x: expected torch.float32 like the weights"),
    (torch.zeros(5, 2, 3), ZEROS, TypeError, r"state: expected a tuple \(h0, c0\), got Tensor"),
    (torch.zeros(5, 2, 3), (ZEROS, ZEROS, ZEROS), TypeError, r"state: expected a tuple \(h0, c0\), got a tuple of 3"),
    (torch.zeros(5, 2, 3), (None, ZEROS), TypeError, r"h0: expected a tensor, got NoneType"),
    (torch.zeros(5, 2, 3), (ZEROS[:, :1], ZEROS), ValueError, r"h0: expected \(1, 2, 4\), got \(1, 1, 4\)"),
    (torch.zeros(5, 2, 3), (ZEROS, ZEROS[0]), ValueError, r"c0: expected \(1, 2, 4\), got \(2, 4\)"),
    (torch.zeros(5, 2, 3), (ZEROS, ZEROS.double()), TypeError, r"c0: expected torch.float32 like x, got torch.float64"),
])
def test_layer_errors_name_the_argument(x, state, error, message):
    with pytest.raises(error, match=message):
        LSTMLayer(3, 4)(x, state)


def test_step_wants_the_rows_of_its_options():
    with pytest.raises(ValueError, match=r"weight_ih_l0: expected \(12, 3\), got \(16, 3\)"):
        lstm_step(np.zeros((2, 3)), (np.zeros((2, 4)), np.zeros((2, 4))), PARAMS, coupled=True)


def test_every_part_of_a_state_is_checked():
    class Counting(LSTMCell):
        "Carries a third part along: how often each unit has stepped."
        state_sizes = property(lambda self: (*super().state_sizes, self.hidden_size))

        def step(self, projected, state):
            return *super().step(projected, state[:2]), state[2] + 1

    layer, x = CellLayer(Counting(3, 4)), torch.zeros(5, 2, 3)
    assert (layer(x, lengths=[5, 3])[1][2] == torch.tensor([5.0, 3.0])[None, :, None]).all()
    with pytest.raises(ValueError, match=r"state\[2\]: expected \(1, 2, 4\), got \(1, 2, 5\)"):
        layer(x, (ZEROS, ZEROS, torch.zeros(1, 2, 5)))


def test_cell_errors_name_the_argument():
    cell = LSTMCell(3, 4, proj_size=2)
    with pytest.raises(ValueError, match=r"hx, h: expected \(5, 2\), got \(5, 4\)"):
        cell(torch.zeros(5, 3), (torch.zeros(5, 4), torch.zeros(5, 4)))
    with pytest.raises(TypeError, match=r"hx: expected a pair \(h, c\), got Tensor"):
        cell(torch.zeros(5, 3), torch.zeros(5, 4))
    with pytest.raises(TypeError, match="input: expected torch.float32"):
        cell(torch.zeros(5, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="coupled: expected False"):
        LSTMCell(3, 4, coupled=True, forget_gate=False)


# ---- against ONNX Runtime's kernel, which has peepholes and coupled gates

def by_onnxruntime(params, x, state, lengths, coupled):
    "Output, h and c of ONNX Runtime's LSTM; it orders gates i, o, f, g and peepholes i, o, f, and wants all of them."
    onnx = pytest.importorskip("onnx", reason="ONNX is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    (T, B, I), H = x.shape, params["weight_hh_l0"].shape[1]
    order = "igo" if coupled else "ifgo"

    def blocks(array):
        by_gate = dict(zip(order, np.split(array, len(order))))
        return np.concatenate([by_gate.get(gate, np.zeros_like(by_gate["i"])) for gate in "iofg"])

    feed = dict(
        X=x, W=blocks(params["weight_ih_l0"])[None], R=blocks(params["weight_hh_l0"])[None],
        B=np.concatenate([blocks(params["bias_ih_l0"]), blocks(params["bias_hh_l0"])])[None], sequence_lens=np.array(lengths, np.int32),
        initial_h=state[0], initial_c=state[1], P=np.concatenate([params.get(f"peephole_{gate}_l0", np.zeros(H, np.float32)) for gate in "iof"])[None],
    )
    node = onnx.helper.make_node("LSTM", list(feed), ["Y", "Y_h", "Y_c"], hidden_size=H, input_forget=int(coupled))
    kind = onnx.helper.np_dtype_to_tensor_dtype
    given = [onnx.helper.make_tensor_value_info(name, kind(array.dtype), array.shape) for name, array in feed.items()]
    made = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in node.output]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "lstm", given, made), opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=9)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    Y, Y_h, Y_c = session.run(None, feed)
    return Y[:, 0], Y_h, Y_c


@pytest.mark.parametrize("options", [{}, dict(peephole=True), dict(coupled=True), dict(coupled=True, peephole=True)], ids=str)
def test_equals_onnxruntime(options):
    rng = np.random.default_rng(0)
    params = lstm_init(3, 5, rng=rng, dtype=np.float32, **options)
    x, state = (rng.standard_normal((9, 4, 3)).astype(np.float32), tuple(rng.standard_normal((2, 1, 4, 5)).astype(np.float32)))
    output, final, _ = lstm_forward(x, params, state, lengths=[9, 3, 5, 1], **options)
    expected = by_onnxruntime(params, x, state, [9, 3, 5, 1], options.get("coupled", False))
    assert_parity((output, *final), expected, tol=2e-6)


# ---- one layer for every cell

@pytest.mark.parametrize("lengths", [None, [5, 0, 3]])
def test_a_cell_whose_state_is_one_tensor_runs_too(lengths):
    layer = RNNLayer(3, 4, nonlinearity="sigmoid", dtype=torch.float64)
    general = CellLayer(layer.cell)
    x, (h0, _) = inputs(5, 3, H=4)
    for state in (None, h0):
        assert_parity(general(x, state, lengths=lengths), layer(x, state, lengths=lengths))
    with pytest.raises(ValueError, match=r"h0: expected \(1, 3, 4\)"):
        general(x, h0[0])


def test_a_cell_of_the_readers_own_runs_too():
    class Leaky(LSTMCell):
        "Keeps a third of h as it was."
        def step(self, projected, state):
            h, c = super().step(projected, state)
            return (2 * h + state[0]) / 3, c

    cell = Leaky(3, 4, dtype=torch.float64)
    x, state = inputs(6, 2, H=4)
    output, (h, c) = CellLayer(cell, batch_first=True)(x.transpose(0, 1), state)
    for t in range(6):
        state = tuple(s.reshape(1, 2, 4) for s in cell(x[t], tuple(s[0] for s in state)))
        assert_parity(output[:, t], state[0][0])
    assert_parity((h, c), state)


# ---- biases of the gates

def test_gate_biases():
    params = lstm_init(3, 4, rng=np.random.default_rng(0))
    new = set_gate_biases(params, f=1.0, i=np.arange(4.0))
    both = new["bias_ih_l0"] + new["bias_hh_l0"]
    assert (both[4:8] == 1).all() and (both[:4] == np.arange(4)).all()
    old = params["bias_ih_l0"] + params["bias_hh_l0"]
    assert (both[8:] == old[8:]).all() and not (old[4:8] == 1).any()  # the others stay, and so does the argument
    three = set_gate_biases(lstm_init(3, 4, rng=np.random.default_rng(0), coupled=True, proj_size=2), o=2.0)
    assert (three["bias_ih_l0"][8:] == 2).all() and three["bias_ih_l0"].shape == (12,)
    with pytest.raises(ValueError, match="gate: expected one of i, g, o, got 'f'"):
        set_gate_biases(three, f=1.0)
    with pytest.raises(ValueError, match="params: expected bias_ih_l0"):
        set_gate_biases(lstm_init(3, 4, rng=np.random.default_rng(0), bias=False), f=1.0)
    with pytest.raises(ValueError, match=r"f: expected a number or \(4,\), got \(3,\)"):
        set_gate_biases(params, f=np.ones(3))
    with pytest.raises(ValueError, match="bias_ih_l0: expected 12 entries, 4 for each gate i, g, o, got 4"):
        set_gate_biases(numpy_params(torch.nn.RNN(3, 4)), i=1.0)


@pytest.mark.parametrize("make", [lambda: LSTMCell(3, 4), lambda: LSTMLayer(3, 4), lambda: torch.nn.LSTMCell(3, 4), lambda: torch.nn.LSTM(3, 4)])
def test_gate_biases_in_pytorch(make):
    module, params = make(), lstm_init(3, 4, rng=np.random.default_rng(0))
    b = chrono_bias(4, 50, rng=np.random.default_rng(1))
    set_gate_biases_(module, f=b, i=-b)
    expected = set_gate_biases(params, f=b, i=-b)
    found = numpy_params(module)
    for name in ("bias_ih_l0", "bias_hh_l0"):
        assert_parity(found[name][:8], expected[name][:8], tol=1e-6)
    assert all(p.requires_grad and p.is_leaf for p in module.parameters())


@pytest.mark.parametrize("module, biases, message", [
    (torch.nn.GRU(3, 4), dict(i=1.0), "bias_ih_l0: expected 16 entries, 4 for each gate i, f, g, o, got 12"),
    (torch.nn.RNN(3, 4), dict(i=1.0), "bias_ih_l0: expected 16 entries"),
    (LSTMLayer(3, 4, coupled=True), dict(i=1.0, f=1.0), "gate: expected one of i, g, o, got 'f'"),
    (torch.nn.LSTM(3, 4), dict(i=1.0, f=torch.ones(3)), r"f: expected a number or \(4,\)"),
])
def test_gate_biases_that_do_not_fit_change_nothing(module, biases, message):
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=message):
        set_gate_biases_(module, **biases)
    assert all(torch.equal(p, before[name]) for name, p in module.state_dict().items())


def test_gate_biases_reach_every_layer():
    stacked = torch.nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    set_gate_biases_(stacked, f=1.0)
    assert sum(bool((p[4:8] == 1).all()) for name, p in stacked.named_parameters() if "bias_ih" in name) == 4
    with pytest.raises(ValueError, match="module: expected bias vectors"):
        set_gate_biases_(LSTMCell(3, 4, bias=False), f=1.0)


def test_chrono_bias():
    b = chrono_bias(10_000, 101, rng=np.random.default_rng(0))
    memory = 1 + np.exp(b)  # steps, 1 / (1 - sigmoid(b))
    assert b.shape == (10_000,) and 2 <= memory.min() and memory.max() <= 101
    assert abs(np.median(memory) - 51.5) < 2  # evenly spread
    with pytest.raises(ValueError, match="longest: expected more than 2"):
        chrono_bias(4, 2, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="longest: expected more than 2 steps, and finitely many, got inf"):
        chrono_bias(4, np.inf, rng=np.random.default_rng(0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@each_variant
@each_size
@pytest.mark.parametrize("lengths", [None, [7, 0, 3]])
def test_cuda_equals_numpy(options, P, lengths):
    params = lstm_init(3, 5, rng=np.random.default_rng(0), proj_size=P, **options)
    x, state = inputs(7, 3, P=P)
    layer = layer_of(params, 3, 5, proj_size=P, **options).cuda()
    leaves = [a.cuda().requires_grad_() for a in (x, *state)]
    answer = flat(layer(leaves[0], tuple(leaves[1:]), lengths=lengths))
    output, final, tape = lstm_forward(x.numpy(), params, arrays(state), lengths=lengths, **options)
    assert_parity(tuple(a.detach() for a in answer), (output, *final), tol=1e-10)
    loss_of(*answer).backward()
    grads = lstm_backward(*arriving(output, *final), tape)
    for name, leaf in zip(("x", "h0", "c0"), leaves):
        assert_parity(leaf.grad, grads[name], tol=1e-10, name=name)
    for name, p in layer.cell.named_parameters():
        assert_parity(p.grad, grads[f"{name}_l0"], tol=1e-9, name=name)
    assert_parity(layer.cell(x[0].cuda()), lstm_step(x[0].numpy(), (np.zeros((3, P or 5)), np.zeros((3, 5))), params, **options), tol=1e-10)


@pytest.mark.parametrize("proj_size", [-1, 4, 5])
def test_projection_refused(proj_size):
    for build in (lambda: lstm_init(3, 4, rng=np.random.default_rng(0), proj_size=proj_size), lambda: LSTMLayer(3, 4, proj_size=proj_size)):
        with pytest.raises(ValueError, match=f"proj_size: expected 0 to 3, got {proj_size}"): build()
