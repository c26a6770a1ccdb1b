"""Dropout, zoneout, layer normalization and label smoothing: NumPy = PyTorch, gradients, the exact cases, and cells that work in every layer."""
import copy
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from rnnbook.bidirectional import Bidirectional
from rnnbook.feedforward import softmax_cross_entropy
from rnnbook.gru import GRUCell
from rnnbook.lstm import CellLayer, LSTMCell, lstm_forward, lstm_init
from rnnbook.regularization import (
    LayerNormGRUCell, LayerNormLSTMCell, LayerNormRNNCell, RecurrentDropout, VariationalDropout, Zoneout, add_gains, dropout_mask, layer_norm_backward,
    layer_norm_forward, normalized_backward, normalized_forward, recurrent_dropout_backward, recurrent_dropout_forward, smoothed_cross_entropy,
    smoothed_cross_entropy_backward, zoneout_backward, zoneout_forward,
)
from rnnbook.rnn import RNNCell, numpy_params
from rnnbook.stacked import Stacked, recurrent_backward, recurrent_forward
from rnnbook.testing import assert_parity, gradient_check

T, B, I, H = 6, 4, 3, 5
LENGTHS = [6, 2, 0, 5]
PLAIN = {"rnn": RNNCell, "lstm": LSTMCell, "gru": GRUCell}
NORM = {"rnn": LayerNormRNNCell, "lstm": LayerNormLSTMCell, "gru": LayerNormGRUCell}
VARIANTS = {  # name -> kind of cell and options
    "rnn": ("rnn", {}), "relu": ("rnn", dict(nonlinearity="relu")), "lstm": ("lstm", {}), "peephole": ("lstm", dict(peephole=True)), "coupled": ("lstm", dict(coupled=True)),
    "projected": ("lstm", dict(proj_size=2)), "gru": ("gru", {}), "reset before": ("gru", dict(reset_after=False)),
}
each_variant = pytest.mark.parametrize("kind, options", VARIANTS.values(), ids=VARIANTS)
each_kind = pytest.mark.parametrize("kind", PLAIN)
each_lengths = pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])


def parts(state): return list(state) if isinstance(state, (tuple, list)) else [state]
def like(state, some): return tuple(some) if isinstance(state, (tuple, list)) else some[0]


def made(kind, options={}, seed=0, norm=False, dtype=torch.float64):
    "A cell, its sizes, and its parameters for NumPy; everything random, nothing symmetric."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cell = (NORM if norm else PLAIN)[kind](I, H, dtype=dtype, **options)
        if norm:
            for p in cell.parameters(): torch.nn.init.normal_(p, 0.3)
    return cell, getattr(cell, "state_sizes", (H,)), numpy_params(cell)


def masks(sizes, seed=0, T=T, B=B):
    "A mask of recurrent dropout, and one of zoneout for each part of the state."
    rng = np.random.default_rng(seed)
    return dropout_mask((B, sizes[0]), 0.4, rng=rng), [(rng.random((T, B, size)) < p).astype(float) for size, p in zip(sizes, (0.3, 0.6))]


def numpy_options(options): return {name: value for name, value in options.items() if name != "proj_size"}


def start(sizes, seed=0, T=T):
    rng = np.random.default_rng(seed + 1)
    state = [rng.standard_normal((1, B, size)) for size in sizes]
    return rng.standard_normal((T, B, I)), tuple(state) if len(sizes) > 1 else state[0]


def compare(forward, backward, params, layer, sizes, lengths, T=T):
    "NumPy's answer and gradients against PyTorch's, to 1e-12; returns what a gradient check needs."
    x, state = start(sizes, T=T)
    output, final, tape = forward(x, params, state, lengths=lengths)
    d_final = like(final, [2 * parts(final)[0], *(-np.sin(s) for s in parts(final)[1:])])
    grads = backward(np.cos(output), d_final, tape)
    leaves = [torch.tensor(a, requires_grad=True) for a in (x, *parts(state))]
    answer, state_n = layer(leaves[0], like(state, leaves[1:]), lengths=lengths)
    assert_parity(answer.detach(), output)
    assert_parity([s.detach() for s in parts(state_n)], parts(final))
    layer.zero_grad()
    (answer.sin().sum() + (parts(state_n)[0] ** 2).sum() + sum(s.cos().sum() for s in parts(state_n)[1:])).backward()
    for name, leaf in zip(("x", "h0", "c0"), leaves): assert_parity(leaf.grad, grads[name], tol=1e-11, name=name)
    names = [f"{name.split('.')[-1]}_l0" for name, _ in layer.named_parameters()]
    assert set(grads) == {"x", "h0", *(["c0"] if len(sizes) > 1 else []), *names}
    for name, p in zip(names, layer.parameters()): assert_parity(p.grad, grads[name], tol=1e-11, name=name)
    if lengths: assert all((grads["x"][n:, b] == 0).all() and (output[n:, b] == 0).all() for b, n in enumerate(lengths))
    return dict(x=x, **dict(zip(("h0", "c0"), parts(state))), **params), grads


def check(forward, point, grads, sizes, lengths):
    "Central differences."
    def loss(at):
        state = [at[name] for name in ("h0", "c0")[:len(sizes)]]
        given = {name: p for name, p in at.items() if name.endswith("_l0")}
        output, final, _ = forward(at["x"], given, tuple(state) if len(sizes) > 1 else state[0], lengths=lengths)
        return np.sin(output).sum() + (parts(final)[0] ** 2).sum() + sum(np.cos(s).sum() for s in parts(final)[1:])
    assert max(gradient_check(loss, point, grads, tol=1e-6).values()) < 1e-6


def handed(wrapper, mask):
    "The wrapper with this mask instead of a random one."
    wrapper.draw = lambda projected: torch.from_numpy(mask).to(projected)
    return wrapper


# ---- dropout, zoneout

@each_variant
@each_lengths
def test_recurrent_dropout(kind, options, lengths):
    cell, sizes, params = made(kind, options)
    mask, _ = masks(sizes)
    forward = partial(recurrent_dropout_forward, kind, mask=mask, **numpy_options(options))
    point, grads = compare(forward, recurrent_dropout_backward, params, CellLayer(handed(RecurrentDropout(cell, 0.4), mask)), sizes, lengths)
    if kind != "rnn" or not options: check(forward, point, grads, sizes, lengths)  # a ReLU has a kink


@each_variant
@each_lengths
def test_zoneout(kind, options, lengths):
    cell, sizes, params = made(kind, options)
    _, kept = masks(sizes)
    options = numpy_options(options)
    forward = partial(zoneout_forward, kind, zoneout=tuple(kept), **options)
    point, grads = compare(forward, zoneout_backward, params, CellLayer(handed(Zoneout(cell, 0.3), np.concatenate(kept, -1))), sizes, lengths)
    if "nonlinearity" not in options: check(forward, point, grads, sizes, lengths)
    expected = (0.3, 0.6)[:len(sizes)]  # and in evaluation, the expectation
    compare(partial(zoneout_forward, kind, zoneout=expected, **options), zoneout_backward, params, CellLayer(Zoneout(cell, expected).eval()), sizes, lengths)


@each_kind
@pytest.mark.parametrize("norm", [False, True])
def test_all_together(kind, norm):
    "Zoneout around recurrent dropout around a cell, normalized or not: NumPy by nesting pairs, PyTorch by nesting cells."
    cell, sizes, params = made(kind, norm=norm)
    mask, kept = masks(sizes)
    inner = (partial(normalized_forward, kind), normalized_backward) if norm else kind
    pair = partial(recurrent_dropout_forward, inner, mask=mask), recurrent_dropout_backward
    forward = partial(zoneout_forward, pair, zoneout=tuple(kept))
    layer = CellLayer(handed(Zoneout(handed(RecurrentDropout(cell, 0.4), mask), 0.3), np.concatenate(kept, -1)))
    compare(forward, zoneout_backward, params, layer, sizes, LENGTHS)  # each by itself is checked by central differences


@each_kind
def test_the_exact_cases(kind):
    cell, sizes, params = made(kind)
    x, state = start(sizes)
    tensors = torch.from_numpy(x), like(state, [torch.from_numpy(s) for s in parts(state)])
    plain, plain_state = CellLayer(cell)(*tensors)
    for mode in (True, False):
        output, final = CellLayer(Zoneout(cell, 1)).train(mode)(*tensors)
        assert all((parts(final)[k] == parts(tensors[1])[k]).all() for k in range(len(sizes)))  # at probability 1 the state is kept exactly
        assert (output == parts(tensors[1])[0]).all()
        for untouched in (Zoneout(cell, 0), RecurrentDropout(cell, 0)):
            output, final = CellLayer(untouched).train(mode)(*tensors)
            assert torch.equal(output, plain) and all(map(torch.equal, parts(final), parts(plain_state)))
    assert torch.equal(CellLayer(RecurrentDropout(cell, 0.7)).eval()(*tensors)[0], plain)
    blind, *_ = CellLayer(RecurrentDropout(cell, 1))(*tensors)  # gates see nothing of h: no NaN, and W_hh does not matter
    without = copy.deepcopy(cell)
    torch.nn.init.zeros_(without.weight_hh)
    assert_parity(blind.detach(), CellLayer(without)(*tensors)[0].detach())
    kept = zoneout_forward(kind, x, params, state, zoneout=1)
    assert all((a == b).all() for a, b in zip(parts(kept[1]), parts(state)))


def test_zoneout_on_one_part():
    "A probability for each of h and c: the one at 1 stands still, the other does not."
    cell, sizes, params = made("lstm")
    x, state = start(sizes)
    given = torch.from_numpy(x), tuple(map(torch.from_numpy, state))
    for still, moving, pair in ((0, 1, (1, 0)), (1, 0, (0, 1))):
        _, final = CellLayer(Zoneout(cell, pair))(*given)
        assert torch.equal(final[still], given[1][still]) and not torch.isclose(final[moving], given[1][moving]).any()
    one = zoneout_forward("lstm", x[:1], params, state, zoneout=(0.0, 1.0))[1]
    assert_parity(one[0], lstm_forward(x[:1], params, state)[1][0])  # the new h has seen the new c, as in the paper


def test_zoneout_masks_are_new_at_every_step_and_have_the_right_share():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cell = Zoneout(LSTMCell(2, 400), (0.2, 0.7))
        output, _ = CellLayer(cell)(torch.randn(20, 3, 2))
    same = (output[1:] == output[:-1]).double()  # (T-1, B, H)
    assert abs(same.mean() - 0.2) < 0.01
    assert abs((same[1:] * same[:-1]).mean() - 0.04) < 0.01  # independent from step to step
    projected = cell.project(torch.zeros(20, 3, 2))
    assert projected.shape == (20, 3, 4 * 400 + 800) and abs(projected[..., -400:].mean() - 0.7) < 0.01


def test_recurrent_dropout_is_one_mask_per_sequence():
    cell = RecurrentDropout(LSTMCell(2, 300), 0.25)
    mask = cell.project(torch.zeros(7, 5, 2))[..., -300:]
    assert (mask == mask[:1]).all() and mask.unique().tolist() == pytest.approx([0, 4 / 3])
    assert abs((mask[0] == 0).double().mean() - 0.25) < 0.04 and not (mask[0, 0] == mask[0, 1]).all()


def test_gru_keeps_its_own_state_whole():
    "With the update gate shut, z = 1, a GRU under recurrent dropout keeps h exactly: the mask is for the gates."
    for cell in (GRUCell(I, H), LayerNormGRUCell(I, H)):
        with torch.no_grad():
            cell.weight_ih.zero_(); cell.weight_hh[H:2 * H] = 0; cell.bias_ih[H:2 * H] = 100
            if hasattr(cell, "gain_hh"): cell.gain_hh[H:2 * H] = 0
        h = torch.randn(1, B, H)
        assert_parity(CellLayer(RecurrentDropout(cell, 0.5))(torch.randn(T, B, I), h)[1].detach(), h, tol=1e-6)


@each_kind
@pytest.mark.parametrize("unequal", [False, True])
def test_wrapped_cells_turn_around_and_stack(kind, unequal):
    "In Bidirectional and Stacked, against recurrent_forward with the pair of NumPy functions; the same masks in every layer."
    lengths = LENGTHS if unequal else None
    rng = np.random.default_rng(0)
    zones = [(rng.random((T, B, H)) < 0.3).astype(float) for _ in made(kind)[1]]
    mask = dropout_mask((B, H), 0.4, rng=rng)

    def layer(size, seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            cell = NORM[kind](size, H, dtype=torch.float64)
        return CellLayer(handed(Zoneout(handed(RecurrentDropout(cell, 0.4), mask), 0.3), np.concatenate(zones, -1)))

    model = Stacked([Bidirectional(layer(I, 0), layer(I, 1)), Bidirectional(layer(2 * H, 2), layer(2 * H, 3))])
    pair = (partial(recurrent_dropout_forward, (partial(normalized_forward, kind), normalized_backward), mask=mask), recurrent_dropout_backward)
    cell = (partial(zoneout_forward, pair, zoneout=tuple(zones)), zoneout_backward)
    x = torch.tensor(rng.standard_normal((T, B, I)), requires_grad=True)
    params = numpy_params(model)
    output, state, tape = recurrent_forward(cell, x.detach().numpy(), params, lengths=lengths)
    answer, final = model(x, lengths=lengths)
    assert_parity(answer.detach(), output)
    assert_parity([s.detach() for s in parts(final)], parts(state))
    answer.sin().sum().backward()
    grads = recurrent_backward(np.cos(output), None, tape)
    assert_parity(x.grad, grads["x"], tol=1e-11)
    for name, p in model.named_parameters():
        where = "_reverse" if "reverse_layer" in name else ""
        assert_parity(p.grad, grads[f"{name.split('.')[-1]}_l{name.split('.')[1]}{where}"], tol=1e-11, name=name)


@each_kind
def test_one_step_of_a_wrapped_cell(kind):
    cell, sizes, _ = made(kind)
    wrapped = Zoneout(RecurrentDropout(cell, 0.4), 0.3).eval()
    x, state = start(sizes)
    given = like(state, [torch.from_numpy(s[0]) for s in parts(state)])
    step = wrapped(torch.from_numpy(x[0]), given)
    expected = zoneout_forward(kind, x[:1], numpy_params(cell), state, zoneout=0.3)[1]
    assert_parity([s.detach() for s in parts(step)], [s[0] for s in parts(expected)])
    single = wrapped(torch.from_numpy(x[0, 0]), like(given, [s[0] for s in parts(given)]))
    assert_parity([s.detach() for s in parts(single)], [s[0, 0] for s in parts(expected)])
    assert parts(wrapped(torch.from_numpy(x[0])))[0].shape == (B, sizes[0])
    wrapped.train()
    assert parts(wrapped(torch.from_numpy(x[0, 0])))[0].shape == (sizes[0],)


def test_wrapped_cells_copy_save_and_show():
    cell = Zoneout(RecurrentDropout(GRUCell(I, H), 0.4), 0.3)
    other = Zoneout(RecurrentDropout(GRUCell(I, H), 0.4), 0.3)
    other.load_state_dict(copy.deepcopy(cell).state_dict())
    x = torch.randn(T, B, I)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0); first = CellLayer(cell)(x)[0]
        torch.manual_seed(0); assert torch.equal(CellLayer(other)(x)[0], first)
        torch.manual_seed(1); assert not torch.equal(CellLayer(other)(x)[0], first)
    assert "probability=0.3\n" in repr(cell) and "probability=0.4\n" in repr(cell) and "GRUCell(3, 5)" in repr(cell)
    assert "probability=(0.1, 0.2)" in repr(Zoneout(LSTMCell(I, H), (0.1, 0.2)))
    assert list(numpy_params(CellLayer(cell))) == ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]


def test_half_precision_masks_keep_the_share():
    "Masks are drawn in full precision: in bfloat16 a uniform number has 8 bits only."
    cell = Zoneout(RNNCell(2, 2000, dtype=torch.bfloat16), 0.001)
    share = cell.draw(torch.zeros(50, 4, 2000, dtype=torch.bfloat16)).float().mean()
    assert abs(share - 0.001) < 2e-4
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = CellLayer(Zoneout(RecurrentDropout(LSTMCell(I, H), 0.2), 0.1))(torch.randn(T, B, I))
    assert output.isfinite().all()


@pytest.mark.parametrize("batch_first", [False, True])
def test_variational_dropout(batch_first):
    layer, x = VariationalDropout(0.4, batch_first), torch.randn(9, 8, 50)
    y = layer(x)
    ratio = (y / x).transpose(0, 1) if batch_first else y / x  # (T, B, n)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))  # the same at all steps
    assert (ratio[0] == 0).any() and not ((ratio[0, 0] == 0) == (ratio[0, 1] == 0)).all()  # other ones in each sequence
    assert torch.equal(layer.eval()(x), x)
    assert (VariationalDropout(1.0)(x) == 0).all() and torch.equal(VariationalDropout(0.0)(x), x)
    assert layer.train()(x[:0]).shape == (0, 8, 50) and layer(x[:, :0]).shape == (9, 0, 50)
    assert repr(layer) == f"VariationalDropout(probability=0.4, batch_first={batch_first})"


def test_dropout_mask():
    mask = dropout_mask((1000, 50), 0.3, rng=np.random.default_rng(0))
    assert set(np.unique(mask)) == {0, 1 / 0.7} and abs(mask.mean() - 1) < 0.01
    assert (dropout_mask((3, 4), 1, rng=np.random.default_rng(0)) == 0).all() and (dropout_mask((3, 4), 0, rng=np.random.default_rng(0)) == 1).all()
    assert dropout_mask((2,), 0.5, rng=np.random.default_rng(0), dtype=np.float32).dtype == np.float32


# ---- layer normalization

@each_kind
@each_lengths
def test_normalized_cells(kind, lengths):
    cell, sizes, params = made(kind, norm=True)
    forward = partial(normalized_forward, kind)
    point, grads = compare(forward, normalized_backward, params, CellLayer(cell), sizes, lengths)
    check(forward, point, grads, sizes, lengths)


@each_kind
def test_normalized_cells_without_bias_and_in_long_sequences(kind):
    cell, sizes, params = made(kind, dict(bias=False), norm=True)
    assert not any(name.startswith("bias") for name in params)
    compare(partial(normalized_forward, kind), normalized_backward, params, CellLayer(cell), sizes, None, T=60)


def test_equations_of_the_paper():
    "One step, equations 20 to 22 and 23 to 27, written with torch.nn.functional.layer_norm."
    rng = np.random.default_rng(0)
    ln = lambda a: torch.nn.functional.layer_norm(a, a.shape[-1:])
    x, h, c = (torch.from_numpy(rng.standard_normal((B, n))) for n in (I, H, H))
    cell, _, _ = made("lstm", norm=True)
    a = cell.gain_hh * ln(h @ cell.weight_hh.T) + cell.bias_hh + cell.gain_ih * ln(x @ cell.weight_ih.T) + cell.bias_ih
    i, f, g, o = a.chunk(4, 1)
    new = f.sigmoid() * c + i.sigmoid() * g.tanh()
    assert_parity([s.detach() for s in cell(x, (h, c))], [(o.sigmoid() * (cell.gain_c * ln(new) + cell.shift_c).tanh()).detach(), new.detach()])
    cell, _, _ = made("gru", norm=True)
    (W, Wn), (U, Un) = (w.split([2 * H, H]) for w in (cell.weight_ih, cell.weight_hh))
    gate = cell.gain_ih[:2 * H] * ln(x @ W.T) + cell.bias_ih[:2 * H] + cell.gain_hh[:2 * H] * ln(h @ U.T) + cell.bias_hh[:2 * H]
    r, z = gate.sigmoid().chunk(2, 1)
    n = (cell.gain_ih[2 * H:] * ln(x @ Wn.T) + cell.bias_ih[2 * H:] + r * (cell.gain_hh[2 * H:] * ln(h @ Un.T) + cell.bias_hh[2 * H:])).tanh()
    assert_parity(cell(x, h).detach(), ((1 - z) * n + z * h).detach())


@pytest.mark.parametrize("gain, shift", [(True, True), (True, False), (False, False)])
def test_layer_norm_equals_torch(gain, shift):
    rng = np.random.default_rng(0)
    point = {"x": 5 + 3 * rng.standard_normal((2, 3, 7))} | ({"gain": rng.standard_normal(7)} if gain else {}) | ({"shift": rng.standard_normal(7)} if shift else {})
    leaves = {name: torch.tensor(a, requires_grad=True) for name, a in point.items()}
    theirs = torch.nn.functional.layer_norm(leaves["x"], (7,), leaves.get("gain"), leaves.get("shift"))
    y, tape = layer_norm_forward(**point)
    assert_parity(y, theirs.detach())
    theirs.sin().sum().backward()
    grads = layer_norm_backward(np.cos(y), tape)
    assert_parity(grads, {name: leaf.grad for name, leaf in leaves.items()})
    gradient_check(lambda at: np.sin(layer_norm_forward(**at)[0]).sum(), point, grads)


@each_kind
def test_scaling_the_weights_changes_nothing_in_a_normalized_cell(kind):
    _, sizes, params = made(kind, norm=True)
    x, state = start(sizes)
    scaled = params | {"weight_ih_l0": 1e3 * params["weight_ih_l0"], "weight_hh_l0": 1e3 * params["weight_hh_l0"]}
    (a, *_), (b, *_) = (normalized_forward(kind, 10 * x, p, state) for p in (params, scaled))
    assert_parity(a, b, tol=1e-3)  # up to eps


@each_kind
def test_gains_and_drawing(kind):
    "The weights are those of the plain cell with the same seed, gains 1; the names are those of add_gains."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3); plain = numpy_params(PLAIN[kind](I, H))
        torch.manual_seed(3); norm = numpy_params(NORM[kind](I, H))
    expected = add_gains(plain)
    assert set(expected) == set(norm) and all(np.array_equal(norm[name], expected[name]) for name in norm)
    stacked = add_gains({"weight_hh_l0": np.zeros((4 * H, H)), "weight_hh_l1_reverse": np.zeros((4 * H, H), np.float32)})
    assert stacked["gain_c_l0"].shape == (H,) and stacked["gain_ih_l1_reverse"].dtype == np.float32 and len(stacked) == 10


# ---- rules for lengths, NaN and errors

PAIRS = {
    "dropout": lambda kind, T, B: (partial(recurrent_dropout_forward, kind, mask=masks((3,), T=T, B=B)[0]), recurrent_dropout_backward),
    "zoneout": lambda kind, T, B: (partial(zoneout_forward, kind, zoneout=masks((3,), T=T, B=B)[1][0]), zoneout_backward),
    "normalized": lambda kind, T, B: (partial(normalized_forward, kind), normalized_backward),
}


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=12)
@given(st.integers(0, 5), st.integers(0, 3), st.sampled_from(list(PLAIN)), st.data())
def test_padding_and_empty_sequences(name, T, B, kind, data):
    "Whatever the padding holds, nothing changes, bit for bit; each sequence's state stands still past its end."
    lengths = data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
    rng = np.random.default_rng(T * 10 + B)
    G = {"rnn": 1, "lstm": 4, "gru": 3}[kind] * 3
    params = add_gains({"weight_ih_l0": rng.standard_normal((G, 2)), "weight_hh_l0": rng.standard_normal((G, 3)), "bias_ih_l0": rng.standard_normal(G), "bias_hh_l0": rng.standard_normal(G)})
    forward, backward = PAIRS[name](kind, T, B)
    if name != "normalized": params = {key: p for key, p in params.items() if key.startswith(("weight", "bias"))}
    x, states = rng.standard_normal((T, B, 2)), [rng.standard_normal((1, B, 3)) for _ in range(2 if kind == "lstm" else 1)]
    state = tuple(states) if kind == "lstm" else states[0]
    rubbish = x.copy()
    for b, n in enumerate(lengths): rubbish[n:, b] = np.nan
    answers = [forward(a, params, state, lengths=np.array(lengths, int)) for a in (x, rubbish)]
    (output, final, _), (again, final_again, _) = answers
    assert output.shape == (T, B, 3) and np.array_equal(output, again) and all(map(np.array_equal, parts(final), parts(final_again)))
    d_output = np.cos(output)
    noisy = np.where(np.arange(T)[:, None, None] < np.array(lengths, int)[None, :, None], d_output, np.nan)
    clean, dirty = (backward(d, final, tape) for d, (_, _, tape) in zip((d_output, noisy), answers))
    assert all(np.array_equal(clean[key], dirty[key]) for key in clean)
    for b, n in enumerate(lengths):
        assert (output[n:, b] == 0).all() and (clean["x"][n:, b] == 0).all()
        if n: assert_parity(output[n - 1, b], parts(final)[0][0, b])
        else: assert all((f[0, b] == s[0, b]).all() for f, s in zip(parts(final), states)) and (clean["h0"][0, b] == parts(final)[0][0, b]).all()


@pytest.mark.parametrize("name", PAIRS)
@each_kind
def test_nan_stays_in_its_row(name, kind):
    _, sizes, params = made(kind, norm=name == "normalized")
    forward, backward = {"dropout": (partial(recurrent_dropout_forward, kind, mask=masks(sizes)[0]), recurrent_dropout_backward),
                         "zoneout": (partial(zoneout_forward, kind, zoneout=tuple(masks(sizes)[1])), zoneout_backward),
                         "normalized": PAIRS["normalized"](kind, T, B)}[name]
    x, state = start(sizes)
    bad = x.copy()
    bad[2, 1] = np.nan
    (a, _, tape), (b, _, bad_tape) = forward(x, params, state), forward(bad, params, state)
    others = [0, 2, 3]
    assert np.array_equal(a[:, others], b[:, others]) and np.isnan(b[-1, 1]).any()
    assert np.array_equal(backward(np.cos(a), None, tape)["x"][:, others], backward(np.cos(a), None, bad_tape)["x"][:, others])


@each_kind
@each_lengths
def test_single_precision_stays_single(kind, lengths):
    "Masks are drawn in float64, or are booleans; the numbers of the layer keep their own type."
    _, sizes, params = made(kind, dtype=torch.float32)
    x = start(sizes)[0].astype(np.float32)
    mask, kept = masks(sizes)
    runs = [(recurrent_dropout_forward, recurrent_dropout_backward, dict(mask=m)) for m in (mask, mask > 0)]
    runs += [(zoneout_forward, zoneout_backward, dict(zoneout=z)) for z in (0.3, np.float64(0.3), tuple(kept), tuple(z > 0 for z in kept))]
    for forward, backward, options in runs:
        output, final, tape = forward(kind, x, params, lengths=lengths, **options)
        grads = backward(np.cos(output), None, tape)
        assert {a.dtype for a in (output, *parts(final), *grads.values())} == {np.dtype(np.float32)}


X, P = np.zeros((T, B, I)), lstm_init(I, H, rng=np.random.default_rng(0))


@pytest.mark.parametrize("call, error, message", [
    (lambda: dropout_mask((2,), 1.5, rng=np.random.default_rng(0)), ValueError, "probability: expected a probability from 0 to 1, got 1.5"),
    (lambda: Zoneout(LSTMCell(I, H), -0.1), ValueError, "probability: expected a probability from 0 to 1, got -0.1"),
    (lambda: Zoneout(LSTMCell(I, H), (0.1, 0.2, 0.3)), ValueError, "probability: expected one or 2, got 3"),
    (lambda: Zoneout(RNNCell(I, H), (0.1, 0.2)), ValueError, "probability: expected one or 1, got 2"),
    (lambda: VariationalDropout(float("nan")), ValueError, "probability: expected a probability from 0 to 1, got nan"),
    (lambda: RecurrentDropout(Zoneout(LSTMCell(I, H), 0.1), 0.1), TypeError, "cell: expected one without masks, got Zoneout; put RecurrentDropout inside"),
    (lambda: VariationalDropout()(torch.zeros(2, 3)), ValueError, r"x: expected 3 dimensions, got \(2, 3\)"),
    (lambda: recurrent_dropout_forward("lstm", X, P, mask=np.ones((B, H + 1))), ValueError, r"mask: expected \(4, 5\), got \(4, 6\)"),
    (lambda: recurrent_dropout_forward("mgu", X, P, mask=np.ones((B, H))), ValueError, "cell: expected one of 'rnn', 'lstm', 'gru'"),
    (lambda: zoneout_forward("lstm", X, P, zoneout=np.ones((B, H))), ValueError, r"zoneout: expected \(6, 4, 5\), got \(4, 5\)"),
    (lambda: zoneout_forward("lstm", X, P, zoneout=2.0), ValueError, "zoneout: expected a probability from 0 to 1, got 2.0"),
    (lambda: dropout_mask((2,), "0.1", rng=np.random.default_rng(0)), ValueError, "probability: expected a probability from 0 to 1, got '0.1'"),
    (lambda: Zoneout(LSTMCell(I, H), None), ValueError, "probability: expected a probability from 0 to 1, got None"),
    (lambda: Zoneout(torch.nn.LSTM(I, H), 0.1), TypeError, "cell: expected one with `project` and `step`, such as LSTMCell, got torch.nn.modules.rnn.LSTM"),
    (lambda: RecurrentDropout(torch.nn.GRUCell(I, H), 0.1), TypeError, "cell: expected one with `project` and `step`, such as LSTMCell, got torch.nn.modules.rnn.GRUCell"),
    (lambda: recurrent_dropout_forward("lstm", X, P, (np.zeros((1, B + 1, H)),) * 2, mask=np.ones((B, H))), ValueError, r"h0: expected \(1, 4, 5\), got \(1, 5, 5\)"),
    (lambda: zoneout_forward("lstm", X, P, zoneout=1.25 * np.ones((T, B, H))), ValueError, "zoneout: expected values from 0 to 1, got 1.25"),
    (lambda: normalized_forward("lstm", X, add_gains(lstm_init(I, H, rng=np.random.default_rng(0), peephole=True))), ValueError, "peephole_i.*: no parameter of a normalized 'lstm'"),
    (lambda: layer_norm_forward(X, np.ones(I + 1)), ValueError, r"gain: expected \(3,\), got \(4,\)"),
    (lambda: layer_norm_backward(np.ones((B, I)), layer_norm_forward(X)[1]), ValueError, r"d_y: expected \(6, 4, 3\), got \(4, 3\)"),
    (lambda: zoneout_forward("lstm", X, P, zoneout=(0.1,)), ValueError, "zoneout: expected one entry or 2, got 1"),
    (lambda: zoneout_forward("lstm", X, P, zoneout=0.1, lengths=[7, 1, 1, 1]), ValueError, "lengths: expected values from 0 to 6, got 7"),
    (lambda: normalized_forward("lstm", X, P), ValueError, r"gain_ih_l0: expected \(20,\), got none; see `add_gains`"),
    (lambda: normalized_forward("mgu", X, P), ValueError, "kind: expected one of 'rnn', 'lstm', 'gru', got 'mgu'"),
    (lambda: normalized_forward("gru", X, add_gains(P)), ValueError, r"weight_ih_l0: expected \(15, 3\), got \(20, 3\)"),
    (lambda: normalized_forward("lstm", X, add_gains(P), np.zeros((1, B, H))), TypeError, r"state: expected a pair \(h, c\), got ndarray"),
    (lambda: normalized_forward("lstm", X[0], add_gains(P)), ValueError, r"x: expected 3 dimensions \(T, B, I\), got \(4, 3\)"),
    (lambda: smoothed_cross_entropy(np.zeros((2, 3)), np.array([0, 1]), smoothing=1.2), ValueError, "smoothing: expected a probability from 0 to 1, got 1.2"),
    (lambda: Zoneout(LSTMCell(I, H), 0.1)(torch.zeros(2, I + 1)), ValueError, r"input: expected \(B, I\) or \(I,\) with I = 3, got \(2, 4\)"),
    (lambda: CellLayer(Zoneout(LSTMCell(I, H), 0.1))(torch.zeros(2, 3, I), torch.zeros(1, 3, H)), TypeError, r"state: expected a tuple \(h0, c0\), got Tensor"),
])
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message): call()


@pytest.mark.parametrize("name", PAIRS)
def test_backward_errors_name_the_argument(name):
    forward, backward = PAIRS[name]("rnn", T, B)
    params = add_gains({"weight_ih_l0": np.ones((3, 2)), "weight_hh_l0": np.ones((3, 3)), "bias_ih_l0": np.ones(3), "bias_hh_l0": np.ones(3)})
    *_, tape = forward(np.zeros((T, B, 2)), params if name == "normalized" else {key: params[key] for key in ("weight_ih_l0", "weight_hh_l0")})
    for wrong in ((T + 1, B, 3), (T, B + 1, 3)):
        with pytest.raises(ValueError, match="d_output: expected"): backward(np.zeros(wrong), None, tape)
    with pytest.raises(ValueError, match="d_state"): backward(None, np.zeros((1, B + 1, 3)), tape)
    with pytest.raises(ValueError, match="d_state"): backward(None, np.zeros((1, B, 4)), tape)


# ---- label smoothing

@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_label_smoothing_equals_torch(smoothing, masked):
    rng = np.random.default_rng(0)
    logits, targets = 4 * rng.standard_normal((5, 3, 7)), rng.integers(0, 7, (5, 3))
    mask = rng.random((5, 3)) < 0.6 if masked else np.ones((5, 3), bool)
    leaf = torch.tensor(logits, requires_grad=True)
    theirs = torch.nn.functional.cross_entropy(leaf[mask], torch.from_numpy(targets[mask]), label_smoothing=smoothing)
    (3 * theirs).backward()
    loss, tape = smoothed_cross_entropy(logits, targets, smoothing=smoothing, mask=mask if masked else None)
    assert_parity(np.array(loss), theirs.detach())
    grads = smoothed_cross_entropy_backward(tape, 3.0)
    assert_parity(grads, leaf.grad)
    gradient_check(lambda at: 3 * smoothed_cross_entropy(at["logits"], targets, smoothing=smoothing, mask=mask)[0], dict(logits=logits), dict(logits=grads))
    if smoothing == 0: assert loss == softmax_cross_entropy(logits, targets, mask=mask if masked else None)[0]


def test_label_smoothing_is_safe():
    logits = np.array([[1e4, -1e4, 0.0]])
    with np.errstate(all="raise", under="ignore"):
        loss, tape = smoothed_cross_entropy(logits, np.array([0]), smoothing=0.3)
    assert loss == pytest.approx(0.1 * 2e4 + 0.1 * 1e4)
    rubbish = np.array([[1.0, 2.0], [np.nan, np.inf]])
    loss, tape = smoothed_cross_entropy(rubbish, np.array([0, 99]), mask=np.array([True, False]))
    assert np.isfinite(loss) and (smoothed_cross_entropy_backward(tape)[1] == 0).all()
    assert smoothed_cross_entropy(np.zeros((0, 3)), np.zeros(0, int))[0] == 0
    never = np.array([[1.0, 2.0, -np.inf]])  # an answer that is ruled out: without smoothing the loss is finite
    assert smoothed_cross_entropy(never, np.array([0]), smoothing=0)[0] == softmax_cross_entropy(never, np.array([0]))[0]


# ---- CUDA

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@each_kind
@pytest.mark.parametrize("norm", [False, True])
@each_lengths
def test_cuda_equals_numpy(kind, norm, lengths):
    cell, sizes, params = made(kind, norm=norm)
    mask, kept = masks(sizes)
    layer = CellLayer(handed(Zoneout(handed(RecurrentDropout(cell, 0.4), mask), 0.3), np.concatenate(kept, -1))).cuda()
    inner = (partial(normalized_forward, kind), normalized_backward) if norm else kind
    pair = partial(recurrent_dropout_forward, inner, mask=mask), recurrent_dropout_backward
    x, state = start(sizes)
    output, final, tape = zoneout_forward(pair, x, params, state, zoneout=tuple(kept), lengths=lengths)
    leaves = [torch.tensor(a, device="cuda", requires_grad=True) for a in (x, *parts(state))]
    answer, state_n = layer(leaves[0], like(state, leaves[1:]), lengths=lengths)
    assert_parity(answer.detach(), output, tol=1e-10)
    assert_parity([s.detach() for s in parts(state_n)], parts(final), tol=1e-10)
    answer.sin().sum().backward()
    grads = zoneout_backward(np.cos(output), None, tape)
    for name, leaf in zip(("x", "h0", "c0"), leaves): assert_parity(leaf.grad, grads[name], tol=1e-10, name=name)
    for name, p in layer.named_parameters(): assert_parity(p.grad, grads[f"{name.split('.')[-1]}_l0"], tol=1e-9, name=name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_draws_on_the_device():
    x = torch.randn(T, B, I, device="cuda")
    output, _ = CellLayer(Zoneout(RecurrentDropout(LSTMCell(I, H, device="cuda"), 0.4), 0.3))(x)
    assert output.is_cuda and VariationalDropout(0.5)(output).is_cuda
