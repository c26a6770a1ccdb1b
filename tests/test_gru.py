"""The GRU: NumPy = PyTorch = torch.nn = ONNX Runtime in both forms, its gradients, its rules for lengths and states, and its errors."""
import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rnnbook.gru import GRUCell, GRULayer, gru_backward, gru_forward, gru_init, gru_step
from rnnbook.lstm import CellLayer, lstm_init
from rnnbook.rnn import numpy_params
from rnnbook.testing import assert_parity, gradient_check

each_form = pytest.mark.parametrize("after", [True, False], ids=["after", "before"])


def pair(bias=True, I=3, H=5, seed=0, dtype=torch.float64):
    "`torch.nn.GRU` and our layer with the same weights."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        theirs = torch.nn.GRU(I, H, bias=bias, dtype=dtype)
    return theirs, layer_of(numpy_params(theirs), I, H, bias=bias, dtype=dtype)


def layer_of(params, I, H, dtype=torch.float64, **options):
    "Our layer with these parameters."
    layer = GRULayer(I, H, dtype=dtype, **options)
    layer.cell.load_state_dict({name.removesuffix("_l0"): torch.from_numpy(p) for name, p in params.items()})
    return layer


def inputs(T, B, I=3, H=5, carried=True, seed=0):
    "x and h0 as tensors; h0 None unless carried."
    rng = np.random.default_rng(seed + T + B)
    x, h0 = (torch.from_numpy(rng.standard_normal(shape)) for shape in ((T, B, I), (1, B, H)))
    return x, h0 if carried else None


def reference(theirs, x, state, lengths):
    "What torch.nn.GRU answers, through a packed sequence where there are lengths."
    if lengths is None:
        return theirs(x, state)
    packed, final = theirs(pack_padded_sequence(x, lengths, enforce_sorted=False), state)
    return pad_packed_sequence(packed, total_length=len(x))[0], final


def array(state):
    return None if state is None else state.numpy()


GRID = [case for case in itertools.product((True, False), (1, 2, 13, 300), (1, 4), (False, True), (False, True)) if case[1] < 300 or case[2] == 4]


@pytest.mark.parametrize("bias, T, B, carried, unequal", GRID)
def test_equals_torch_with_gradients(bias, T, B, carried, unequal):
    theirs, ours = pair(bias)
    x, state = inputs(T, B, carried=carried)
    lengths = np.random.default_rng(T).integers(1, T + 1, B).tolist() if unequal else None
    params, grads = numpy_params(theirs), []
    for module in (theirs, ours):
        leaves = [a.clone().requires_grad_() for a in (x, state) if a is not None]
        h0 = leaves[1] if carried else None
        answer = reference(theirs, leaves[0], h0, lengths) if module is theirs else ours(leaves[0], h0, lengths=lengths)
        (answer[0].sin().sum() + (answer[1] ** 2).sum()).backward()
        grads.append({name: leaf.grad for name, leaf in zip(("x", "h0"), leaves)}
                     | {f"{name.removeprefix('cell.').removesuffix('_l0')}_l0": p.grad for name, p in module.named_parameters()})
        if module is theirs:
            expected = tuple(a.detach() for a in answer)
    assert_parity(tuple(a.detach() for a in answer), expected, tol=1e-12)
    output, final, tape = gru_forward(x.numpy(), params, array(state), lengths=lengths)
    assert_parity((output, final), expected, tol=1e-12)
    by_hand = gru_backward(np.cos(output), 2 * final, tape)
    assert set(by_hand) == {"x", "h0", *params}
    for name, grad in grads[0].items():
        assert_parity(grads[1][name], grad, tol=1e-9, name=name)
        assert_parity(by_hand[name], grad, tol=1e-9, name=name)


@each_form
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lengths", [None, [6, 2, 0, 5]])
def test_numpy_equals_pytorch_and_central_differences(after, bias, lengths):
    rng = np.random.default_rng(1)
    params = gru_init(3, 4, rng=rng, bias=bias)
    x, state = inputs(6, 4, H=4)
    point = {"x": x.numpy(), "h0": state.numpy(), **params}

    def run(at):
        return gru_forward(at["x"], {name: at[name] for name in params}, at["h0"], lengths=lengths, reset_after=after)

    def loss(at):
        output, h, _ = run(at)
        return np.sin(output).sum() + (h ** 2).sum()

    output, final, tape = run(point)
    grads = gru_backward(np.cos(output), 2 * final, tape)
    assert set(grads) == set(point)
    assert max(gradient_check(loss, point, grads, tol=1e-6).values()) < 1e-6
    layer = layer_of(params, 3, 4, bias=bias, reset_after=after)
    leaves = x.requires_grad_(), state.requires_grad_()
    answer = layer(*leaves, lengths=lengths)
    assert_parity(tuple(a.detach() for a in answer), (output, final), tol=1e-12)
    (answer[0].sin().sum() + (answer[1] ** 2).sum()).backward()
    for name, leaf in zip(("x", "h0"), leaves):
        assert_parity(leaf.grad, grads[name], tol=1e-9, name=name)
    for name, p in layer.cell.named_parameters():
        assert_parity(p.grad, grads[f"{name}_l0"], tol=1e-9, name=name)


@each_form
def test_the_equations(after):
    "One step, gate by gate, from blocks of the weights taken by hand."
    rng = np.random.default_rng(2)
    p, x, h = gru_init(3, 4, rng=rng), rng.standard_normal((2, 3)), rng.standard_normal((2, 4))
    (W_ir, W_iz, W_in), (W_hr, W_hz, W_hn) = np.split(p["weight_ih_l0"], 3), np.split(p["weight_hh_l0"], 3)
    (b_ir, b_iz, b_in), (b_hr, b_hz, b_hn) = np.split(p["bias_ih_l0"], 3), np.split(p["bias_hh_l0"], 3)
    r = 1 / (1 + np.exp(-(x @ W_ir.T + b_ir + h @ W_hr.T + b_hr)))
    z = 1 / (1 + np.exp(-(x @ W_iz.T + b_iz + h @ W_hz.T + b_hz)))
    n = np.tanh(x @ W_in.T + b_in + (r * (h @ W_hn.T + b_hn) if after else (r * h) @ W_hn.T + b_hn))
    expected = (1 - z) * n + z * h
    assert_parity(gru_step(x, h, p, reset_after=after), expected)
    assert_parity(gru_forward(x[None], p, h[None], reset_after=after)[0][0], expected)
    assert_parity(layer_of(p, 3, 4, reset_after=after).cell(torch.from_numpy(x), torch.from_numpy(h)), expected)
    assert np.abs(gru_step(x, h, p, reset_after=not after) - expected).max() > 1e-3


@each_form
def test_forward_is_the_step_repeated(after):
    params = gru_init(3, 4, rng=np.random.default_rng(3))
    x, state = inputs(7, 2, H=4)
    output, final, tape = gru_forward(x.numpy(), params, state.numpy(), reset_after=after)
    h = state[0].numpy()
    for t in range(7):
        h = gru_step(x[t].numpy(), h, params, reset_after=after)
        assert_parity(output[t], h)
    assert_parity(h, final[0])
    assert tape["h"].shape == (8, 2, 4) and tape["gates"].shape == (7, 2, 3, 4)


def test_where_the_two_forms_agree():
    "With the reset gate wide open both forms are one, and so they are where W_hn is diagonal and b_hn is 0."
    rng = np.random.default_rng(4)
    params, x = gru_init(3, 4, rng=rng), rng.standard_normal((9, 2, 3))
    both = lambda p: [gru_forward(x, p, reset_after=after)[0] for after in (True, False)]
    opened = params | {"bias_ih_l0": np.concatenate([np.full(4, 80.0), params["bias_ih_l0"][4:]])}
    assert_parity(*both(opened))
    diagonal = params | {"weight_hh_l0": params["weight_hh_l0"].copy(), "bias_hh_l0": params["bias_hh_l0"].copy()}
    diagonal["weight_hh_l0"][8:], diagonal["bias_hh_l0"][8:] = np.diag(rng.standard_normal(4)), 0
    assert_parity(*both(diagonal))
    first, second = both(params)
    assert np.abs(first - second).max() > 0.01
    no_bias = params | {"bias_hh_l0": np.zeros(12)}
    assert_parity(*(output[0] for output in both(no_bias)))  # from a state of 0 there is nothing to reset
    assert np.abs(first[0] - second[0]).max() > 1e-3         # but the bias


def test_an_update_gate_of_1_keeps_and_of_0_replaces():
    rng = np.random.default_rng(5)
    params, x, h0 = gru_init(3, 4, rng=rng), rng.standard_normal((50, 2, 3)), rng.standard_normal((1, 2, 4))
    for bias, kept in ((100.0, True), (-100.0, False)):
        p = params | {"bias_ih_l0": np.concatenate([params["bias_ih_l0"][:4], np.full(4, bias), params["bias_ih_l0"][8:]])}
        for after in (True, False):
            output, _, tape = gru_forward(x, p, h0, reset_after=after)
            assert_parity(output[-1], h0[0] if kept else tape["gates"][-1, :, 2])
            d_h0 = gru_backward(None, np.ones((1, 2, 4)), tape)["h0"]
            if kept: assert_parity(d_h0, np.ones((1, 2, 4)))


def onnx_answer(x, params, h0, lengths, after):
    "What ONNX Runtime's GRU gives for one direction: output and final state, float32."
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    def ordered(p):  # our rows r, z, n as ONNX's z, r, h, with its leading dimension for directions
        return np.concatenate([np.split(p, 3)[k] for k in (1, 0, 2)]).astype(np.float32)[None]
    H = h0.shape[2]
    constants = {"W": ordered(params["weight_ih_l0"]), "R": ordered(params["weight_hh_l0"]),
                 "B": np.concatenate([ordered(params["bias_ih_l0"]), ordered(params["bias_hh_l0"])], axis=1)}
    given = {"X": x.astype(np.float32), "lengths": np.array(lengths, np.int32), "h0": h0.astype(np.float32)}
    node = helper.make_node("GRU", ["X", "W", "R", "B", "lengths", "h0"], ["Y", "Y_h"], hidden_size=H, linear_before_reset=int(after))
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.INT32 if name == "lengths" else TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "gru", [value(name) for name in given], [value("Y"), value("Y_h")],
                              [numpy_helper.from_array(array, name) for name, array in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    output, final = session.run(None, given)
    return output[:, 0], final


@each_form
def test_equals_onnxruntime(after):
    rng = np.random.default_rng(6)
    params, x, h0 = gru_init(3, 4, rng=rng), rng.standard_normal((20, 3, 3)), rng.standard_normal((1, 3, 4))
    lengths = [7, 20, 1]
    expected = onnx_answer(x, params, h0, lengths, after)
    assert_parity(gru_forward(x, params, h0, lengths=lengths, reset_after=after)[:2], expected, tol=1e-6)
    answer = layer_of(params, 3, 4, reset_after=after)(torch.from_numpy(x), torch.from_numpy(h0), lengths=lengths)
    assert_parity(tuple(a.detach() for a in answer), expected, tol=1e-6)
    assert np.abs(gru_forward(x, params, h0, lengths=lengths, reset_after=not after)[0] - expected[0]).max() > 1e-3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_cell_drops_in(bias, batched):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        theirs = torch.nn.GRUCell(3, 4, bias, dtype=torch.float64)
        torch.manual_seed(7)
        ours = GRUCell(3, 4, bias, dtype=torch.float64)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert repr(ours) == repr(theirs)
    x, h = (torch.linspace(-1, 1, 2 * n, dtype=torch.float64).reshape(2, n) for n in (3, 4))
    if not batched:
        x, h = x[0], h[0]
    assert_parity(ours(x, h), theirs(x, h))
    assert_parity(ours(input=x), theirs(input=x))
    assert ours(x, hx=h).shape == theirs(x, hx=h).shape
    before = GRUCell(3, 4, bias, dtype=torch.float64, reset_after=False)
    assert before(x, h).shape == h.shape


def test_same_seed_same_weights_as_torch():
    with torch.random.fork_rng():
        torch.manual_seed(11)
        ours = numpy_params(GRULayer(3, 4))
        torch.manual_seed(11)
        theirs = numpy_params(torch.nn.GRU(3, 4))
    assert list(ours) == list(theirs) and all((ours[name] == theirs[name]).all() for name in ours)


def test_repr_says_what_differs():
    assert "GRUCell(3, 4, bias=False, reset_after=False)" in repr(GRULayer(3, 4, bias=False, reset_after=False))
    assert repr(GRUCell(3, 4)) == "GRUCell(3, 4)"


def test_names_and_shapes_agree():
    params = gru_init(3, 4, 2, rng=np.random.default_rng(0))
    model = torch.nn.Module()
    model.layer, model.readout = GRULayer(3, 4), torch.nn.Linear(4, 2)
    assert {name: p.shape for name, p in numpy_params(model).items()} == {name: p.shape for name, p in params.items()}
    for p in params.values():
        assert 0.3 < np.abs(p).max() <= 0.5 or p.size < 10
    assert set(gru_init(3, 4, rng=np.random.default_rng(0), bias=False)) == {"weight_ih_l0", "weight_hh_l0"}


@each_form
def test_project_and_step_are_the_cell(after):
    "What a layer, or a wrapper around the cell, relies on."
    cell = layer_of(gru_init(3, 4, rng=np.random.default_rng(8)), 3, 4, reset_after=after).cell
    x, h = (torch.from_numpy(a) for a in np.split(np.random.default_rng(9).standard_normal((2, 7)), [3], axis=1))
    projected = cell.project(x)
    assert projected.shape == (2, 12) and torch.equal(cell.step(projected, h), cell(x, h))
    assert_parity(cell.project(x.expand(5, 2, 3)), projected.expand(5, 2, 12))
    assert_parity(cell.step(projected, h, seen=h), cell(x, h))
    masked = h * torch.tensor([0.0, 2.0, 2.0, 0.0], dtype=h.dtype)
    a = gru_step(x.numpy(), masked.numpy(), {f"{n}_l0": p.detach().numpy() for n, p in cell.named_parameters()}, reset_after=after)
    _, _, tape = gru_forward(x[None].numpy(), {f"{n}_l0": p.detach().numpy() for n, p in cell.named_parameters()}, masked[None].numpy(), reset_after=after)
    z = tape["gates"][0, :, 1]
    assert_parity(cell.step(projected, h, seen=masked), a + z * (h - masked).numpy())  # the carry is not masked


def test_batch_first():
    theirs, ours = pair()
    first = GRULayer(3, 5, batch_first=True, dtype=torch.float64)
    first.load_state_dict(ours.state_dict())
    x, state = inputs(6, 2)
    expected, answer = ours(x, state, lengths=[6, 4]), first(x.transpose(0, 1), state, lengths=[6, 4])
    assert torch.equal(answer[0].transpose(0, 1), expected[0]) and torch.equal(answer[1], expected[1])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 7), st.integers(0, 4), st.booleans(), st.data())
def test_padding_state_and_empty_sequences(T, B, after, data):
    "Any lengths: each sequence comes out as if alone, forward and backward, whatever its padding holds, bit for bit."
    lengths = data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
    rng = np.random.default_rng(T * 10 + B)
    params = gru_init(2, 3, rng=rng)
    x, state = rng.standard_normal((T, B, 2)), rng.standard_normal((1, B, 3))
    rubbish = x.copy()
    for b, n in enumerate(lengths):
        rubbish[n:, b] = np.nan
    output, final, tape = gru_forward(x, params, state, lengths=lengths, reset_after=after)
    again, final_again, tape_again = gru_forward(rubbish, params, state, lengths=lengths, reset_after=after)
    assert output.shape == (T, B, 3) and final.shape == (1, B, 3)
    assert np.array_equal(output, again) and np.array_equal(final, final_again)
    d_output, d_state = np.cos(output), 2 * final
    noisy = np.where(np.arange(T)[:, None, None] < np.array(lengths, int)[None, :, None], d_output, np.nan)
    grads, grads_again = gru_backward(d_output, d_state, tape), gru_backward(noisy, d_state, tape_again)
    assert all(np.array_equal(grads[name], grads_again[name]) for name in grads)
    layer = layer_of(params, 2, 3, reset_after=after)
    clean, dirty = (layer(torch.from_numpy(a), torch.from_numpy(state), lengths=torch.tensor(lengths, dtype=torch.int64)) for a in (x, rubbish))
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert_parity(tuple(a.detach() for a in clean), (output, final))
    for b, n in enumerate(lengths):
        one = slice(b, b + 1)
        alone, alone_final, alone_tape = gru_forward(x[:n, one], params, state[:, one], reset_after=after)
        assert_parity((output[:n, one], final[:, one]), (alone, alone_final))
        assert (output[n:, b] == 0).all() and (grads["x"][n:, b] == 0).all()
        alone_grads = gru_backward(d_output[:n, one], d_state[:, one], alone_tape)
        assert_parity((grads["x"][:n, one], grads["h0"][:, one]), tuple(alone_grads[name] for name in ("x", "h0")))
        if n == 0:
            assert (final[0, b] == state[0, b]).all() and (grads["h0"][0, b] == d_state[0, b]).all()


@each_form
def test_nan_stays_in_its_row(after):
    rng = np.random.default_rng(0)
    params, x = gru_init(3, 4, rng=rng), rng.standard_normal((6, 3, 3))
    bad = x.copy()
    bad[2, 1] = np.nan
    others = [0, 2]
    (clean, _, tape), (dirty, _, bad_tape) = (gru_forward(a, params, lengths=[6, 4, 5], reset_after=after) for a in (x, bad))
    assert np.array_equal(clean[:, others], dirty[:, others]) and np.isnan(dirty[2:4, 1]).all() and (dirty[4:, 1] == 0).all()
    grads, bad_grads = (gru_backward(np.ones_like(clean), None, t) for t in (tape, bad_tape))
    assert np.array_equal(grads["x"][:, others], bad_grads["x"][:, others]) and (bad_grads["x"][4:, 1] == 0).all()
    leaf = torch.from_numpy(bad).requires_grad_()
    layer_of(params, 3, 4, reset_after=after)(leaf)[0].sum().backward()
    assert torch.isfinite(leaf.grad[:, others]).all()


@each_form
def test_carrying_the_state(after):
    rng = np.random.default_rng(5)
    params, x = gru_init(3, 4, rng=rng), rng.standard_normal((9, 2, 3))
    whole, final, _ = gru_forward(x, params, reset_after=after)
    first, state, _ = gru_forward(x[:4], params, reset_after=after)
    second, end, _ = gru_forward(x[4:], params, state, reset_after=after)
    assert_parity((np.concatenate([first, second]), end), (whole, final))
    leaf = torch.zeros(1, 2, 4, dtype=torch.float64, requires_grad=True)
    layer_of(params, 3, 4, reset_after=after)(torch.from_numpy(x), leaf)[1].sum().backward()
    assert leaf.grad.abs().sum() > 0  # a state passed in is not detached


@each_form
def test_parts_of_the_gradient_add_up(after):
    rng = np.random.default_rng(6)
    params, x = gru_init(3, 4, rng=rng), rng.standard_normal((5, 2, 3))
    output, h, tape = gru_forward(x, params, lengths=[5, 3], reset_after=after)
    whole = gru_backward(output, h, tape)
    parts = [gru_backward(output, None, tape), gru_backward(None, h, tape)]
    assert_parity({name: sum(part[name] for part in parts) for name in whole}, whole)
    assert not any(g.any() for g in gru_backward(None, None, tape).values())


@each_form
def test_arguments_are_left_alone(after):
    rng = np.random.default_rng(0)
    params, x, state = gru_init(3, 4, rng=rng), rng.standard_normal((5, 2, 3)), rng.standard_normal((1, 2, 4))
    before = copy.deepcopy((params, x, state))
    output, final, tape = gru_forward(x, params, state, lengths=[5, 2], reset_after=after)
    d_output, d_state, kept = output.copy(), final.copy(), copy.deepcopy(tape)
    grads, again = (gru_backward(d_output, d_state, tape) for _ in range(2))
    assert all(np.array_equal(grads[name], again[name]) for name in grads)  # the tape can be read twice
    for result in (output, final, grads["h0"]):
        result += 1
    assert all(np.array_equal(tape[key], kept[key]) for key in ("x", "h", "gates"))
    assert np.array_equal(x, before[1]) and np.array_equal(state, before[2])
    assert all(np.array_equal(params[name], before[0][name]) for name in params)


@each_form
def test_float32(after):
    rng = np.random.default_rng(0)
    params = gru_init(3, 4, rng=rng, dtype=np.float32)
    x = rng.standard_normal((20, 2, 3)).astype(np.float32)
    output, final, tape = gru_forward(x, params, lengths=[20, 7], reset_after=after)
    grads = gru_backward(output, final, tape)
    kept = [tape["gates"], tape["h"], gru_step(x[0], final[0], params, reset_after=after)]
    assert {a.dtype for a in (output, final, *grads.values(), *kept)} == {np.dtype(np.float32)}
    layer = layer_of(params, 3, 4, torch.float32, reset_after=after)
    for ours, expected in zip(layer(torch.from_numpy(x), lengths=[20, 7]), (output, final)):
        torch.testing.assert_close(ours.detach(), torch.from_numpy(expected))
    theirs, ours = pair(dtype=torch.float32)
    for a, b in zip(ours(torch.from_numpy(x), lengths=[20, 7]), reference(theirs, torch.from_numpy(x), None, [20, 7])):
        torch.testing.assert_close(a, b)


@each_form
def test_large_pre_activations_do_not_overflow(after):
    params = gru_init(3, 4, rng=np.random.default_rng(0))
    with np.errstate(all="raise", under="ignore"):
        output, final, tape = gru_forward(np.full((3, 2, 3), 1e5), params, reset_after=after)
        gru_backward(output, final, tape)
        gru_step(np.full((2, 3), -1e5), final[0], params, reset_after=after)
    assert np.isfinite(output).all()


PARAMS = gru_init(3, 4, rng=np.random.default_rng(0))


@pytest.mark.parametrize("change, error, message", [
    (dict(x=np.zeros((5, 3))), ValueError, r"x: expected 3 dimensions \(T, B, I\), got \(5, 3\)"),
    (dict(x=np.zeros((5, 2, 3), int)), TypeError, r"x: expected a float array, got int64"),
    (dict(x=np.zeros((5, 2, 7))), ValueError, r"weight_ih_l0: expected \(12, 7\), got \(12, 3\)"),
    (dict(x=np.zeros((5, 2, 3), np.float32)), TypeError, r"weight_ih_l0: expected float32 like x, got float64"),
    (dict(state=np.zeros((1, 3, 4))), ValueError, r"h0: expected \(1, 2, 4\), got \(1, 3, 4\)"),
    (dict(state=np.zeros((2, 4))), ValueError, r"h0: expected \(1, 2, 4\), got \(2, 4\)"),
    (dict(state=np.zeros((1, 2, 4), np.float32)), TypeError, r"h0: expected float64 like x, got float32"),
    (dict(lengths=[5, 6]), ValueError, r"lengths: expected values from 0 to 5, got 6"),
    (dict(lengths=[5, -1]), ValueError, r"lengths: expected values from 0 to 5, got -1"),
    (dict(lengths=[5.0, 1.0]), TypeError, r"lengths: expected integers, got float64"),
    (dict(lengths=[5]), ValueError, r"lengths: expected \(2,\), got \(1,\)"),
    (dict(params=PARAMS | {"bias_hh_l0": np.zeros(4)}), ValueError, r"bias_hh_l0: expected \(12,\), got \(4,\)"),
    (dict(params=PARAMS | {"weight_hh_l0": np.zeros((16, 4))}), ValueError, r"weight_hh_l0: expected \(12, 4\), got \(16, 4\)"),
])
def test_errors_name_the_argument(change, error, message):
    call = dict(x=np.zeros((5, 2, 3)), params=PARAMS, state=None) | change
    with pytest.raises(error, match=message):
        gru_forward(call.pop("x"), call.pop("params"), call.pop("state"), **call)


@pytest.mark.parametrize("d_output, d_state, error, message", [
    (np.zeros((4, 2, 4)), None, ValueError, r"d_output: expected \(5, 2, 4\), got \(4, 2, 4\)"),
    (np.zeros((5, 2, 4), np.float32), None, TypeError, r"d_output: expected float64 like the states, got float32"),
    (None, np.zeros((2, 4)), ValueError, r"d_state: expected \(1, 2, 4\), got \(2, 4\)"),
])
def test_backward_errors_name_the_argument(d_output, d_state, error, message):
    _, _, tape = gru_forward(np.zeros((5, 2, 3)), PARAMS)
    with pytest.raises(error, match=message):
        gru_backward(d_output, d_state, tape)


@pytest.mark.parametrize("x, state, error, message", [
    (torch.zeros(5, 3), None, ValueError, r"x: expected \(T, B, I\) with I = 3, got \(5, 3\)"),
    (torch.zeros(5, 2, 4), None, ValueError, r"x: expected \(T, B, I\) with I = 3, got \(5, 2, 4\)"),
    (torch.zeros(5, 2, 3, dtype=torch.float64), None, TypeError, r"x: expected torch.float32 like the weights"),
    (torch.zeros(5, 2, 3), torch.zeros(1, 1, 4), ValueError, r"h0: expected \(1, 2, 4\), got \(1, 1, 4\)"),
    (torch.zeros(5, 2, 3), torch.zeros(1, 2, 4, dtype=torch.float64), TypeError, r"h0: expected torch.float32 like x"),
])
def test_layer_errors_name_the_argument(x, state, error, message):
    with pytest.raises(error, match=message):
        GRULayer(3, 4)(x, state)


@pytest.mark.parametrize("x, h, params, message", [
    (np.zeros((2, 5)), np.zeros((2, 4)), PARAMS, r"weight_ih_l0: expected \(12, 5\), got \(12, 3\)"),
    (np.zeros((2, 3)), np.zeros((1, 4)), PARAMS, r"h: expected \(2, 4\), got \(1, 4\)"),
    (np.zeros((2, 3)), np.zeros((2, 5)), PARAMS, r"h: expected \(2, 4\), got \(2, 5\)"),
    (np.zeros((2, 3)), np.zeros((2, 4)), lstm_init(3, 4, rng=np.random.default_rng(0)), r"weight_ih_l0: expected \(12, 3\), got \(16, 3\)"),
])
def test_step_errors_name_the_argument(x, h, params, message):
    with pytest.raises(ValueError, match=message):
        gru_step(x, h, params)


def test_cell_errors_name_the_argument():
    cell = GRUCell(3, 4)
    with pytest.raises(ValueError, match=r"input: expected \(B, I\) or \(I,\) with I = 3, got \(2, 5\)"):
        cell(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"hx: expected \(2, 4\), got \(1, 4\)"):
        cell(torch.zeros(2, 3), torch.zeros(1, 4))
    with pytest.raises(TypeError, match=r"hx: expected torch.float32 like x"):
        cell(torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.float64))


@each_form
def test_second_derivatives(after):
    layer = GRULayer(2, 3, dtype=torch.float64, reset_after=after)
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 2, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], (x,))


@each_form
def test_compiled_under_autocast_and_as_functional_call(after):
    layer, x = GRULayer(3, 4, reset_after=after), torch.linspace(-1, 1, 24).reshape(4, 2, 3)
    doubled = {name: 2 * p for name, p in layer.named_parameters()}
    twice = copy.deepcopy(layer)
    twice.load_state_dict(doubled)
    assert_parity(torch.func.functional_call(layer, doubled, (x,))[0], twice(x)[0], tol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, h = layer(x)
        assert output.dtype == torch.nn.GRUCell(3, 4)(x[0], x.new_zeros(2, 4)).dtype
    assert_parity(output, layer(x)[0], tol=0.03)


def test_any_cell_runs_in_the_layer():
    cell = GRUCell(3, 4, reset_after=False)
    assert torch.equal(CellLayer(cell)(torch.ones(3, 2, 3))[0], layer_of(numpy_params(cell), 3, 4, torch.float32, reset_after=False)(torch.ones(3, 2, 3))[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_form
def test_cuda_equals_numpy(after):
    params = gru_init(3, 5, rng=np.random.default_rng(0))
    layer = layer_of(params, 3, 5, reset_after=after).cuda()
    x, state = inputs(20, 4)
    lengths = torch.tensor([20, 0, 7, 13], device="cuda")
    leaf = x.cuda().requires_grad_()
    output, final = layer(leaf, state.cuda(), lengths=lengths)
    expected, expected_final, tape = gru_forward(x.numpy(), params, state.numpy(), lengths=lengths.tolist(), reset_after=after)
    assert_parity((output.detach().cpu(), final.detach().cpu()), (expected, expected_final), tol=1e-10)
    output.sin().sum().backward()
    grads = gru_backward(np.cos(expected), None, tape)
    assert_parity(leaf.grad.cpu(), grads["x"], tol=1e-10)
    for name, p in layer.cell.named_parameters():
        assert_parity(p.grad.cpu(), grads[f"{name}_l0"], tol=1e-10, name=name)
