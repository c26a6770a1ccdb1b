"""The recurrence: NumPy = PyTorch = torch.nn, its rules for lengths and states, and its errors."""
import copy
import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rnnbook.rnn import RNNCell, RNNLayer, numpy_params, rnn_forward, rnn_init, rnn_step
from rnnbook.testing import assert_parity


def pair(nonlinearity="tanh", bias=True, I=3, H=5, seed=0):
    "`torch.nn.RNN` and our layer with the same weights, float64."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        theirs = torch.nn.RNN(I, H, bias=bias, nonlinearity=nonlinearity, dtype=torch.float64)
    ours = RNNLayer(I, H, bias=bias, nonlinearity=nonlinearity, dtype=torch.float64)
    ours.cell.load_state_dict({name.removesuffix("_l0"): p for name, p in theirs.state_dict().items()})
    return theirs, ours


def reference(theirs, x, h0, lengths):
    "What torch.nn.RNN answers, through a packed sequence where there are lengths."
    if lengths is None:
        return theirs(x, h0)
    packed, state = theirs(pack_padded_sequence(x, lengths, enforce_sorted=False), h0)
    return pad_packed_sequence(packed, total_length=len(x))[0], state


GRID = list(itertools.product(("tanh", "relu"), (True, False), (1, 2, 13, 200), (1, 4), (False, True), (False, True)))


@pytest.mark.parametrize("nonlinearity, bias, T, B, carried, unequal", GRID)
def test_forward_equals_torch(nonlinearity, bias, T, B, carried, unequal):
    theirs, ours = pair(nonlinearity, bias)
    rng = np.random.default_rng(T + B)
    x = torch.from_numpy(rng.standard_normal((T, B, 3)))
    h0 = torch.from_numpy(rng.standard_normal((1, B, 5))) if carried else None
    lengths = rng.integers(1, T + 1, B).tolist() if unequal else None
    expected = reference(theirs, x, h0, lengths)
    state = None if h0 is None else h0.numpy()
    assert_parity(rnn_forward(x.numpy(), numpy_params(theirs), state, lengths=lengths, nonlinearity=nonlinearity)[:2], expected, tol=1e-12)
    assert_parity(ours(x, h0, lengths=lengths), expected, tol=1e-12)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("lengths", [None, [4, 7, 1]])
def test_layer_gradients_equal_torch(nonlinearity, lengths):
    theirs, ours = pair(nonlinearity)
    rng = np.random.default_rng(3)
    grads = []
    for module in (theirs, ours):
        x = torch.from_numpy(np.random.default_rng(4).standard_normal((7, 3, 3))).requires_grad_()
        h0 = torch.from_numpy(np.random.default_rng(5).standard_normal((1, 3, 5))).requires_grad_()
        output, state = reference(theirs, x, h0, lengths) if module is theirs else ours(x, h0, lengths=lengths)
        (output.sin().sum() + (state ** 2).sum()).backward()
        grads.append([x.grad, h0.grad, *(p.grad for p in module.parameters())])
    assert_parity(tuple(grads[1]), tuple(grads[0]), tol=1e-9)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "sigmoid"])
def test_forward_is_the_step_repeated(nonlinearity):
    rng = np.random.default_rng(0)
    params, x, h = rnn_init(3, 4, rng=rng), rng.standard_normal((6, 2, 3)), rng.standard_normal((1, 2, 4))
    output, state, tape = rnn_forward(x, params, h, nonlinearity=nonlinearity)
    layer = RNNLayer(3, 4, nonlinearity=nonlinearity, dtype=torch.float64)
    layer.cell.load_state_dict({name.removesuffix("_l0"): torch.from_numpy(p) for name, p in params.items()})
    assert_parity(layer(torch.from_numpy(x), torch.from_numpy(h)), (output, state))
    h = h[0]
    for t in range(6):
        h = rnn_step(x[t], h, params, nonlinearity=nonlinearity)
        assert_parity(output[t], h)
    assert_parity(state[0], h)
    assert tape["h"].shape == (7, 2, 4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("batched", [True, False])
def test_cell_drops_in(bias, nonlinearity, batched):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        theirs = torch.nn.RNNCell(3, 4, bias, nonlinearity, dtype=torch.float64)
        torch.manual_seed(7)
        ours = RNNCell(3, 4, bias, nonlinearity, dtype=torch.float64)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert repr(ours) == repr(theirs)
    x = torch.arange(6, dtype=torch.float64).reshape(2, 3) / 6
    h = torch.full((2, 4), 0.3, dtype=torch.float64)
    if not batched:
        x, h = x[0], h[0]
    assert_parity(ours(x, h), theirs(x, h))
    assert_parity(ours(input=x), theirs(input=x))


def test_same_seed_same_weights_as_torch():
    with torch.random.fork_rng():
        torch.manual_seed(11)
        ours = RNNLayer(3, 4)
        torch.manual_seed(11)
        theirs = torch.nn.RNN(3, 4)
    ours, theirs = numpy_params(ours), numpy_params(theirs)
    assert list(ours) == list(theirs) and all((ours[name] == theirs[name]).all() for name in ours)


def test_numpy_params_names_a_readout():
    model = torch.nn.Module()
    model.layer, model.readout = RNNLayer(3, 4), torch.nn.Linear(4, 2)
    params = numpy_params(model)
    assert set(params) == {"weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "weight_ho", "bias_ho"}
    params["weight_ho"][:] = 7  # a copy: the module keeps its weights
    assert not (model.readout.weight == 7).any()


def test_batch_first():
    _, ours = pair()
    first = RNNLayer(3, 5, batch_first=True, dtype=torch.float64)
    first.load_state_dict(ours.state_dict())
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((6, 2, 3)))
    output, state = ours(x, lengths=[6, 4])
    output_first, state_first = first(x.transpose(0, 1), lengths=[6, 4])
    assert torch.equal(output_first.transpose(0, 1), output) and torch.equal(state_first, state)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 8), st.integers(0, 4), st.data())
def test_padding_state_and_empty_sequences(T, B, data):
    "Any lengths: each sequence comes out as if alone, whatever its padding holds, bit for bit."
    lengths = data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
    rng = np.random.default_rng(T * 10 + B)
    params, x, h0 = rnn_init(2, 3, rng=rng), rng.standard_normal((T, B, 2)), rng.standard_normal((1, B, 3))
    rubbish = x.copy()
    for b, n in enumerate(lengths):
        rubbish[n:, b] = np.nan
    layer = RNNLayer(2, 3, dtype=torch.float64)
    layer.cell.load_state_dict({name.removesuffix("_l0"): torch.from_numpy(p) for name, p in params.items()})
    output, state, _ = rnn_forward(x, params, h0, lengths=lengths)
    again, state_again, _ = rnn_forward(rubbish, params, h0, lengths=lengths)
    assert output.shape == (T, B, 3) and state.shape == (1, B, 3)
    assert np.array_equal(output, again) and np.array_equal(state, state_again)
    clean = layer(torch.from_numpy(x), torch.from_numpy(h0), lengths=lengths)
    dirty = layer(torch.from_numpy(rubbish), torch.from_numpy(h0), lengths=torch.tensor(lengths, dtype=torch.int64))
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert_parity(clean, (output, state))
    for b, n in enumerate(lengths):
        alone, alone_state, _ = rnn_forward(x[:n, b:b + 1], params, h0[:, b:b + 1])
        assert_parity(output[:n, b:b + 1], alone)
        assert_parity(state[:, b:b + 1], alone_state)
        assert (output[n:, b] == 0).all()


def test_nan_stays_in_its_row():
    rng = np.random.default_rng(0)
    params, x = rnn_init(3, 4, rng=rng), rng.standard_normal((6, 3, 3))
    bad = x.copy()
    bad[2, 1] = np.nan
    clean, dirty = rnn_forward(x, params)[0], rnn_forward(bad, params)[0]
    assert np.array_equal(clean[:, [0, 2]], dirty[:, [0, 2]]) and np.isnan(dirty[2:, 1]).all()
    layer = RNNLayer(3, 4, dtype=torch.float64)
    assert torch.isfinite(layer(torch.from_numpy(bad))[0][:, [0, 2]]).all()
    leaf = torch.from_numpy(bad).requires_grad_()
    layer(leaf)[0].sum().backward()
    assert torch.isfinite(leaf.grad[:, [0, 2]]).all()


def test_arguments_are_left_alone():
    rng = np.random.default_rng(0)
    params, x, h0 = rnn_init(3, 4, rng=rng), rng.standard_normal((5, 2, 3)), rng.standard_normal((1, 2, 4))
    before = copy.deepcopy((params, x, h0))
    output, state, _ = rnn_forward(x, params, h0, lengths=[5, 2])
    output += 1
    state += 1
    assert np.array_equal(x, before[1]) and np.array_equal(h0, before[2])
    assert all(np.array_equal(params[name], before[0][name]) for name in params)


def test_float32_stays_float32():
    params = rnn_init(3, 4, rng=np.random.default_rng(0), dtype=np.float32)
    x = np.ones((5, 2, 3), np.float32)
    output, state, tape = rnn_forward(x, params, lengths=[5, 3])
    assert output.dtype == state.dtype == tape["h"].dtype == np.float32


def test_a_state_passed_in_is_not_detached():
    _, ours = pair()
    h0 = torch.zeros(1, 2, 5, dtype=torch.float64, requires_grad=True)
    ours(torch.ones(3, 2, 3, dtype=torch.float64), h0)[1].sum().backward()
    assert h0.grad.abs().sum() > 0


PARAMS = rnn_init(3, 4, rng=np.random.default_rng(0))


@pytest.mark.parametrize("change, error, message", [
    (dict(x=np.zeros((5, 3))), ValueError, r"x: expected 3 dimensions"),
    (dict(x=np.zeros((5, 2, 3), int)), TypeError, r"x: expected a float array, got int64"),
    (dict(x=np.zeros((5, 2, 7))), ValueError, r"weight_ih_l0: expected \(4, 7\), got \(4, 3\)"),
    (dict(x=np.zeros((5, 2, 3), np.float32)), TypeError, r"weight_ih_l0: expected float32 like x, got float64"),
    (dict(state=np.zeros((1, 3, 4))), ValueError, r"h0: expected \(1, 2, 4\), got \(1, 3, 4\)"),
    (dict(lengths=[5, 6]), ValueError, r"lengths: expected values from 0 to 5, got 6"),
    (dict(lengths=[5, -1]), ValueError, r"lengths: expected values from 0 to 5, got -1"),
    (dict(lengths=[5.0, 1.0]), TypeError, r"lengths: expected integers, got float64"),
    (dict(lengths=[5]), ValueError, r"lengths: expected \(2,\), got \(1,\)"),
    (dict(nonlinearity="gelu"), ValueError, r"nonlinearity: expected one of 'tanh', 'relu', 'sigmoid', got 'gelu'"),
])
def test_errors_name_the_argument(change, error, message):
    call = dict(x=np.zeros((5, 2, 3)), state=None, lengths=None, nonlinearity="tanh") | change
    with pytest.raises(error, match=message):
        rnn_forward(call.pop("x"), PARAMS, call.pop("state"), **call)


@pytest.mark.parametrize("x, state, error, message", [
    (torch.zeros(5, 3), None, ValueError, r"x: expected \(T, B, I\) with I = 3, got \(5, 3\)"),
    (torch.zeros(5, 2, 4), None, ValueError, r"x: expected \(T, B, I\) with I = 3, got \(5, 2, 4\)"),
    (torch.zeros(5, 2, 3, dtype=torch.float64), None, TypeError, r"x: expected torch.float32 like the weights"),
    (torch.zeros(5, 2, 3), torch.zeros(1, 1, 4), ValueError, r"h0: expected \(1, 2, 4\), got \(1, 1, 4\)"),
])
def test_layer_errors_name_the_argument(x, state, error, message):
    with pytest.raises(error, match=message):
        RNNLayer(3, 4)(x, state)


def test_lengths_from_any_container():
    x = np.ones((3, 2, 3))
    answers = [rnn_forward(x, PARAMS, lengths=lengths)[0]
               for lengths in ([2, 0], np.array([2, 0], np.int32), torch.tensor([2, 0]))]
    assert all(np.array_equal(answers[0], answer) for answer in answers)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("lengths", [None, [7, 0, 3]])
def test_cuda_equals_numpy(lengths):
    rng = np.random.default_rng(0)
    x, h0 = rng.standard_normal((7, 3, 3)), rng.standard_normal((1, 3, 5))
    layer = RNNLayer(3, 5, device="cuda", dtype=torch.float64)
    answer = layer(torch.from_numpy(x).cuda(), torch.from_numpy(h0).cuda(), lengths=lengths)
    assert_parity(answer, rnn_forward(x, numpy_params(layer), h0, lengths=lengths)[:2], tol=1e-10)
    assert_parity(layer.cell(torch.from_numpy(x[0]).cuda()), rnn_step(x[0], np.zeros((3, 5)), numpy_params(layer)), tol=1e-10)


def test_names_of_nested_layers():
    "Where a layer stands in a stack and which way it reads is told by its name."
    nest = torch.nn.Module()
    nest.layers = torch.nn.ModuleList([RNNLayer(3, 4), torch.nn.Module()])
    nest.layers[1].forward_layer, nest.layers[1].reverse_layer = RNNLayer(4, 4), RNNLayer(4, 4)
    nest.readout = torch.nn.Linear(4, 2)
    cell = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    expected = [f"{name}_{end}" for end in ("l0", "l1", "l1_reverse") for name in cell] + ["weight_ho", "bias_ho"]
    params = numpy_params(nest)
    assert list(params) == expected
    assert (params["weight_hh_l1_reverse"] == nest.layers[1].reverse_layer.cell.weight_hh.detach().numpy()).all()


@pytest.mark.parametrize("state, error, message", [
    (np.zeros((1, 5, 4)), TypeError, "h0: expected a tensor, got ndarray"),
    (torch.zeros(1, 5, 3), ValueError, "h0: expected (1, 5, 4), got (1, 5, 3)"),
    (torch.zeros(1, 5, 4, dtype=torch.float64), TypeError, "h0: expected torch.float32 like x, got torch.float64"),
])
def test_state_refused(state, error, message):
    with pytest.raises(error, match=re.escape(message)): RNNLayer(3, 4)(torch.zeros(7, 5, 3), state)


@pytest.mark.parametrize("x, state, message", [
    ([[[0.0]]], None, "x: expected an array, got list"),
    (torch.zeros(2, 1, 3), None, "x: expected an array, got Tensor"),
    (np.zeros((2, 1, 3)), (np.zeros((1, 1, 4)),) * 2, "h0: expected an array, got tuple"),
])
def test_what_is_no_array_is_refused(x, state, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        rnn_forward(x, rnn_init(3, 4, rng=np.random.default_rng(0)), state)
