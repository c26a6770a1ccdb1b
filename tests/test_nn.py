"""rnnbook.nn: torch.nn's face, answers, gradients and files, in every way in which a program may use a layer; lengths, variants, converters, errors."""
import copy
import io
import itertools
import os
import subprocess
import sys
import textwrap
import threading
import warnings

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import rnnbook.nn as nn
from rnnbook.gru import GRUCell, GRULayer
from rnnbook.lstm import LSTMCell, LSTMLayer
from rnnbook.rnn import RNNCell, RNNLayer, numpy_params
from rnnbook.stacked import recurrent_backward, recurrent_forward, recurrent_init
from rnnbook.testing import assert_parity

KINDS = ("RNN", "LSTM", "GRU")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_backend = pytest.mark.parametrize("backend", ["auto", "loop"])
VARIANTS = {
    "sigmoid": ("RNN", dict(nonlinearity="sigmoid")), "peephole": ("LSTM", dict(peephole=True)), "1997": ("LSTM", dict(forget_gate=False)),
    "coupled": ("LSTM", dict(coupled=True, peephole=True)), "projected": ("LSTM", dict(proj_size=2, peephole=True)), "2014": ("GRU", dict(reset_after=False)),
    "zoneout": ("LSTM", dict(zoneout=(0.2, 0.4))), "zoneout, GRU": ("GRU", dict(zoneout=0.3)), "recurrent dropout": ("GRU", dict(recurrent_dropout=0.3)),
    "normalized RNN": ("RNN", dict(layer_norm=True)), "normalized LSTM": ("LSTM", dict(layer_norm=True, zoneout=0.1)), "normalized GRU": ("GRU", dict(layer_norm=True)),
}
each_variant = pytest.mark.parametrize("kind, options", VARIANTS.values(), ids=VARIANTS)


def seeded(make, seed=0):
    "What `make` builds with this seed, the generator being left as it was."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def pair(kind, *args, backend="auto", dtype=torch.float64, **options):
    "torch.nn's layer and ours, made with the same seed."
    return (seeded(lambda: getattr(torch.nn, kind)(*args, dtype=dtype, **options)),
            seeded(lambda: getattr(nn, kind)(*args, dtype=dtype, **options, backend=backend)))


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def state_for(layer, B, seed=1):
    "An initial state; for B None without a batch."
    rows, sizes = layer.num_layers * (2 if layer.bidirectional else 1), [layer.proj_size or layer.hidden_size]
    if layer.mode == "LSTM":
        sizes.append(layer.hidden_size)
    parts = [drawn(rows, *([] if B is None else [B]), size, seed=seed + k) for k, size in enumerate(sizes)]
    return tuple(parts) if len(parts) == 2 else parts[0]


def parts(state):
    return state if isinstance(state, tuple) else () if state is None else (state,)


def flat(answer):
    "Output and state parts, as a flat tuple; a packed output by its data."
    output, state = answer
    return (output.data if isinstance(output, PackedSequence) else output, *parts(state))


def loss_of(answer):
    "A lopsided loss."
    return sum((k + 1) * (a.sin() * torch.arange(1, a.shape[-1] + 1, dtype=a.dtype)).sum() for k, a in enumerate(flat(answer)))


def through_packed(layer, x, state, lengths):
    "What torch.nn's layer answers for lengths."
    packed, final = layer(pack_padded_sequence(x, lengths, layer.batch_first, enforce_sorted=False), state)
    return pad_packed_sequence(packed, layer.batch_first, total_length=x.shape[1 if layer.batch_first else 0])[0], final


def assert_same(layers, calls, x, state, tol=1e-12, grad_tol=1e-9):
    "Outputs, states and all gradients of two layers agree."
    found = []
    for layer, call in zip(layers, calls, strict=True):
        leaves = [a.clone().requires_grad_() for a in (x, *parts(state))]
        given = None if state is None else tuple(leaves[1:]) if isinstance(state, tuple) else leaves[1]
        answer = call(layer, leaves[0], given)
        layer.zero_grad()
        loss_of(answer).backward()
        found.append((tuple(a.detach() for a in flat(answer)), [leaf.grad for leaf in leaves], {n: p.grad for n, p in layer.named_parameters()}))
    (expected, grads, own), (got, our_grads, our_own) = found
    assert_parity(got, expected, tol=tol)
    assert_parity(tuple(our_grads), tuple(grads), tol=grad_tol)
    assert list(own) == list(our_own)
    for name in own:
        assert_parity(our_own[name], own[name], tol=grad_tol, name=name)


# ---- Equal to torch.nn


WHOLE = [*itertools.product(KINDS, (1, 2, 3), (False, True), (True, False), (False, True), ("loop", "auto"))]


@pytest.mark.parametrize("case", WHOLE, ids=lambda case: "-".join(map(str, case)))
def test_equals_torch_with_gradients(case):
    "Layers, directions, bias and batch_first in full; T, lengths and the carried state are spread over them."
    kind, L, bidirectional, bias, batch_first, backend = case
    k = WHOLE.index(case)
    T, B = (1, 2, 7, 24)[k % 4], (1, 4, 3)[k % 3]
    layers = pair(kind, 3, 5, L, bias=bias, batch_first=batch_first, bidirectional=bidirectional, backend=backend)
    x = drawn(*((B, T) if batch_first else (T, B)), 3, seed=k)
    lengths = np.random.default_rng(k).integers(1, T + 1, B).tolist() if k % 5 < 3 else None
    for state in (None, state_for(layers[0], B)):
        theirs = (lambda layer, x, s: layer(x, s)) if lengths is None else (lambda layer, x, s: through_packed(layer, x, s, lengths))
        assert_same(layers, [theirs, lambda layer, x, s: layer(x, s, lengths=lengths)], x, state)


@each_kind
@each_backend
def test_long_sequences(kind, backend):
    layers = pair(kind, 3, 5, 2, bidirectional=True, backend=backend)
    x, lengths = drawn(300, 3, 3), [117, 300, 1]
    calls = [lambda layer, x, s: through_packed(layer, x, s, lengths), lambda layer, x, s: layer(x, s, lengths=lengths)]
    assert_same(layers, calls, x, state_for(layers[0], 3))


@each_backend
@pytest.mark.parametrize("options", [dict(proj_size=2, num_layers=2, bidirectional=True), dict(proj_size=3, bias=False)])
def test_projection(options, backend):
    layers = pair("LSTM", 3, 5, **options, backend=backend)
    lengths = [6, 2]
    calls = [lambda layer, x, s: through_packed(layer, x, s, lengths), lambda layer, x, s: layer(x, s, lengths=lengths)]
    assert_same(layers, calls, drawn(6, 2, 3), state_for(layers[0], 2))


@each_backend
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_nonlinearities(nonlinearity, backend):
    layers = pair("RNN", 3, 5, 2, nonlinearity, backend=backend)
    assert_same(layers, [lambda layer, x, s: layer(x, s)] * 2, drawn(6, 2, 3), state_for(layers[0], 2))


@each_kind
@each_backend
def test_float32_within_torchs_tolerance(kind, backend):
    layers = pair(kind, 8, 16, 2, bidirectional=True, backend=backend, dtype=torch.float32)
    x, answers, grads = drawn(50, 4, 8, dtype=torch.float32), [], []
    for layer in layers:
        answers.append(flat(layer(x)))
        grads.append(torch.autograd.grad(answers[-1][0].square().mean(), [*layer.parameters()]))
    torch.testing.assert_close(answers[1], answers[0])
    torch.testing.assert_close(grads[1], grads[0])


@each_kind
def test_numpy_equals_the_layer(kind):
    "The NumPy functions, on the layer's own parameters, forward and backward."
    layer = pair(kind, 3, 4, 2, bidirectional=True)[1]
    x, state, lengths = drawn(6, 3, 3), state_for(layer, 3), [4, 6, 0]
    leaves = [a.clone().requires_grad_() for a in (x, *parts(state))]
    answer = layer(leaves[0], tuple(leaves[1:]) if kind == "LSTM" else leaves[1], lengths=lengths)
    loss_of(answer).backward()
    given = tuple(s.numpy() for s in state) if kind == "LSTM" else state.numpy()
    output, final, tape = recurrent_forward(kind.lower(), x.numpy(), numpy_params(layer), given, lengths=lengths)
    finals = final if isinstance(final, tuple) else (final,)
    assert_parity(tuple(a.detach() for a in flat(answer)), (output, *finals))
    slopes = [(k + 1) * np.cos(a) * np.arange(1, a.shape[-1] + 1) for k, a in enumerate((output, *finals))]
    grads = recurrent_backward(slopes[0], tuple(slopes[1:]) if kind == "LSTM" else slopes[1], tape)
    for name, leaf in zip(("x", "h0", "c0"), leaves):
        assert_parity(grads[name], leaf.grad, tol=1e-9, name=name)
    for name, p in layer.named_parameters():
        assert_parity(grads[name], p.grad, tol=1e-9, name=name)


# ---- Lengths


@each_kind
@each_backend
def test_empty_sequences_and_no_steps(kind, backend):
    layer = pair(kind, 3, 4, 2, bidirectional=True, backend=backend)[1]
    state, x = state_for(layer, 3), drawn(5, 3, 3)
    output, *final = flat(layer(x, state, lengths=[5, 0, 2]))
    assert (output[:, 1] == 0).all() and (output[2:, 2] == 0).all()
    for got, given in zip(final, parts(state), strict=True):
        assert torch.equal(got[:, 1], given[:, 1]) and not torch.equal(got[:, 0], given[:, 0])
    alone = flat(layer(x[:2, 2:], tuple(s[:, 2:] for s in state) if kind == "LSTM" else state[:, 2:]))
    assert_parity((output[:2, 2:], *(f[:, 2:] for f in final)), alone)
    for lengths in (None, [0, 0, 0]):
        output, *final = flat(layer(x[:0], state, lengths=lengths))
        assert output.shape == (0, 3, 8) and all(map(torch.equal, final, parts(state)))
    output, *final = flat(layer(x[:, :0], lengths=None if backend == "auto" else []))
    assert output.shape == (5, 0, 8) and final[0].shape == (4, 0, 4)
    assert flat(layer(x[:, :0], lengths=[]))[0].shape == (5, 0, 8)


@each_kind
@each_backend
def test_lengths_of_every_form(kind, backend):
    layer, x = pair(kind, 3, 4, backend=backend)[1], drawn(5, 3, 3)
    expected = flat(layer(x, lengths=[2, 5, 3]))
    forms = [(2, 5, 3), np.array([2, 5, 3], np.int32), torch.tensor([2, 5, 3]), torch.tensor([2, 5, 3], dtype=torch.uint8)]
    if torch.cuda.is_available():
        forms.append(torch.tensor([2, 5, 3], device="cuda"))
    for lengths in forms:
        assert all(map(torch.equal, flat(layer(x, lengths=lengths)), expected))


@each_kind
@each_backend
@pytest.mark.parametrize("lengths", [[2, 5, 3], [0, 5, 3]])
def test_padding_changes_nothing(kind, backend, lengths):
    "Not bit for bit, not forward, not backward, even if it is NaN."
    layer, x = pair(kind, 3, 4, 2, bidirectional=True, backend=backend)[1], drawn(5, 3, 3)
    rubbish = x.clone()
    for b, n in enumerate(lengths):
        rubbish[n:, b] = torch.nan
    found = []
    for a in (x, rubbish):
        leaf = a.clone().requires_grad_()
        answer = layer(leaf, lengths=lengths)
        found.append((*flat(answer), *torch.autograd.grad(loss_of(answer), [leaf, *layer.parameters()])))
    assert all(map(torch.equal, *found))
    d_x = found[1][len(flat(answer))]
    assert all((d_x[n:, b] == 0).all() for b, n in enumerate(lengths))


@each_kind
@each_backend
def test_nan_stays_in_its_row(kind, backend):
    layer, x = pair(kind, 3, 4, 2, bidirectional=True, backend=backend)[1], drawn(5, 3, 3)
    bad = x.clone()
    bad[2, 1] = torch.nan
    leaf = bad.requires_grad_()
    output = layer(leaf)[0]
    assert torch.equal(output[:, [0, 2]], layer(x)[0][:, [0, 2]]) and output[:, 1].isnan().any()
    output.sum().backward()
    assert leaf.grad[:, [0, 2]].isfinite().all()


@each_kind
@each_backend
@pytest.mark.parametrize("sort", [True, False])
def test_packed_sequences(kind, backend, sort):
    layers = pair(kind, 3, 4, 2, bidirectional=True, backend=backend)
    packed = pack_padded_sequence(drawn(5, 3, 3), [5, 4, 1] if sort else [4, 1, 5], enforce_sorted=sort)
    for state in (None, state_for(layers[0], 3)):
        expected, got = (layer(packed, state) for layer in layers)
        assert_parity(flat(got), flat(expected))
        assert all(a is b or torch.equal(a, b) for a, b in zip(got[0][1:], expected[0][1:]))
    with pytest.raises(TypeError, match="lengths: expected None with a PackedSequence, got list"):
        layers[1](packed, lengths=[5, 4, 1])
    named = pack_sequence([drawn(2, 3), drawn(1, 3)])
    assert_parity(flat(layers[1](named)), flat(layers[0](named)))


# ---- The face


@each_kind
@each_backend
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(kind, backend, batch_first):
    layers = pair(kind, 3, 4, 2, bidirectional=True, batch_first=batch_first, backend=backend)
    x = drawn(5, 3)
    for state in (None, state_for(layers[0], None)):
        expected, got = (flat(layer(x, state)) for layer in layers)
        assert_parity(got, expected)
    assert_parity(layers[1](x, lengths=[3])[0][:3], layers[1](x[:3])[0])


@each_kind
def test_constructor_takes_torchs_arguments_in_torchs_order(kind):
    positional = (3, 4, 2, *(["relu"] if kind == "RNN" else []), False, True, 0.25, True)
    theirs, ours = getattr(torch.nn, kind)(*positional), getattr(nn, kind)(*positional)
    assert repr(ours) == repr(theirs)
    for name in ("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size"):
        assert getattr(ours, name) == getattr(theirs, name) and type(getattr(ours, name)) is type(getattr(theirs, name)), name
    named = getattr(nn, kind)(input_size=3, hidden_size=4, num_layers=2, bias=False, batch_first=True, dropout=0.25, bidirectional=True, device="cpu", dtype=torch.float64)
    assert {n: p.shape for n, p in named.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    assert repr(getattr(nn, kind)(3, 4)) == repr(getattr(torch.nn, kind)(3, 4)) == f"{kind}(3, 4)"
    assert ours(input=torch.zeros(1, 2, 3), hx=None)[0].shape == (1, 2, 8)


def test_repr_says_what_differs():
    assert repr(nn.LSTM(3, 4, proj_size=2, peephole=True, zoneout=0.1)) == "LSTM(3, 4, proj_size=2, peephole=True, zoneout=0.1)"
    assert repr(nn.GRU(3, 4, 2, dropout=0.5, reset_after=False)) == "GRU(3, 4, num_layers=2, dropout=0.5, reset_after=False)"
    assert repr(nn.RNN(3, 4, nonlinearity="sigmoid", backend="loop")) == "RNN(3, 4, backend=loop, nonlinearity=sigmoid)"
    assert repr(nn.RNN(3, 4, nonlinearity="relu")) == repr(torch.nn.RNN(3, 4, nonlinearity="relu"))


def test_everything_else_is_torchs():
    assert nn.Linear is torch.nn.Linear and nn.functional is torch.nn.functional and nn.utils.rnn.pack_sequence is pack_sequence
    assert (nn.RNNCell, nn.LSTMCell, nn.GRUCell) == (RNNCell, LSTMCell, GRUCell)
    assert {"LSTM", "Linear", "Module"} <= set(dir(nn)) and not set(dir(torch.nn)) - set(dir(nn))
    with pytest.raises(AttributeError, match="LTSM"):
        nn.LTSM
    assert isinstance(nn.LSTM(1, 1), nn.RNNBase) and isinstance(nn.LSTM(1, 1), torch.nn.Module)


def test_a_script_runs_with_one_import_changed():
    script = textwrap.dedent("""
        import {package} as nn
        import torch, torch.nn.functional as F
        torch.manual_seed(0)
        class Tagger(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.rnn = nn.Embedding(9, 4), nn.LSTM(4, 6, num_layers=2, batch_first=True, bidirectional=True, dropout=0.1)
                self.out, self.cell = nn.Linear(12, 3), nn.GRUCell(12, 5)
            def forward(self, ids, lengths):
                x = nn.utils.rnn.pack_padded_sequence(self.embed(ids), lengths, batch_first=True, enforce_sorted=False)
                y, (h, c) = self.rnn(x)
                y, _ = nn.utils.rnn.pad_packed_sequence(y, batch_first=True)
                return self.out(y), self.cell(y[:, 0])
        model = Tagger()
        for m in model.modules():
            if isinstance(m, nn.RNNBase): m.flatten_parameters()
        optimizer, ids = torch.optim.SGD(model.parameters(), 0.1), torch.randint(9, (4, 7))
        for _ in range(3):
            y, h = model(ids, torch.tensor([7, 3, 5, 1]))
            loss = F.cross_entropy(y.flatten(0, 1), ids.flatten() % 3) + h.square().mean()
            optimizer.zero_grad(); loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        answer = loss.item(), list(model.state_dict()), repr(model)
    """)
    answers = []
    for package in ("torch.nn", "rnnbook.nn"):
        names = {}
        seeded(lambda: exec(script.format(package=package), names))
        answers.append(names["answer"])
    assert answers[0][0] == pytest.approx(answers[1][0], rel=1e-6) and answers[0][1:] == answers[1][1:]


@each_kind
@pytest.mark.parametrize("options", [dict(), dict(num_layers=2, bidirectional=True), dict(bias=False, num_layers=3)])
def test_same_seed_same_weights(kind, options):
    theirs, ours = pair(kind, 3, 4, **options, dtype=torch.float32)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert all(map(torch.equal, theirs.parameters(), ours.parameters()))
    after = seeded(lambda: [getattr(nn, kind)(3, 4, **options), torch.rand(1)][1])
    assert after == seeded(lambda: [getattr(torch.nn, kind)(3, 4, **options), torch.rand(1)][1])  # as many numbers drawn
    for layer in (theirs, ours):
        seeded(layer.reset_parameters, 5)
    assert all(map(torch.equal, theirs.parameters(), ours.parameters()))


def test_variants_keep_the_weights_of_the_seed():
    theirs, ours = pair("LSTM", 3, 4, 2, bidirectional=True)
    ours = seeded(lambda: nn.LSTM(3, 4, 2, bidirectional=True, dtype=torch.float64, zoneout=0.2, recurrent_dropout=0.1))
    assert all(map(torch.equal, theirs.parameters(), ours.parameters()))


@each_kind
@each_backend
def test_state_dict_both_ways(kind, backend):
    theirs, ours = pair(kind, 3, 4, 2, bidirectional=True, backend=backend)
    x = drawn(5, 2, 3)
    params = recurrent_init(kind.lower(), 3, 4, num_layers=2, bidirectional=True, rng=np.random.default_rng(0))
    ours.load_state_dict({name: torch.from_numpy(p) for name, p in params.items()})
    theirs.load_state_dict(ours.state_dict())
    expected = recurrent_forward(kind.lower(), x.numpy(), params)[0]
    assert_parity(ours(x)[0], expected)
    assert_parity(theirs(x)[0], expected)
    assert list(numpy_params(ours)) == list(params) and all((numpy_params(ours)[name] == p).all() for name, p in params.items())
    theirs.reset_parameters()
    ours.load_state_dict(theirs.state_dict())
    assert_parity(ours(x)[0], theirs(x)[0])
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()), assign=True)
    assert_parity(ours(x)[0], theirs(x)[0])
    with pytest.raises(RuntimeError, match="size mismatch"):
        ours.load_state_dict(getattr(nn, kind)(3, 5, 2, bidirectional=True).state_dict())


@each_kind
@each_backend
def test_devices_and_dtypes(kind, backend):
    theirs, ours = pair(kind, 3, 4, 2, bidirectional=True, backend=backend)
    x = drawn(3, 2, 3)
    for change in ("float", "half", "bfloat16", "double"):
        for layer in (theirs, ours):
            getattr(layer, change)()
        expected, got = (flat(layer(x.to(layer.weight_ih_l0.dtype))) for layer in (theirs, ours))
        assert [a.dtype for a in got] == [a.dtype for a in expected] and all(p.dtype == got[0].dtype for p in ours.parameters())
        torch.testing.assert_close(got, expected, atol=1e-2, rtol=1e-2)
    meta = getattr(nn, kind)(3, 4, 2, bidirectional=True, backend=backend, device="meta")
    assert all(p.is_meta for p in meta.parameters()) and meta(torch.empty(3, 2, 3, device="meta"))[0].shape == (3, 2, 8)
    meta.to_empty(device="cpu")
    for layer in (theirs.float(), meta):
        seeded(layer.reset_parameters)
    assert all(map(torch.equal, theirs.parameters(), meta.parameters()))
    assert_parity(meta(x.float())[0], theirs(x.float())[0], tol=1e-6)
    with torch.device("meta"):
        assert getattr(nn, kind)(3, 4).weight_ih_l0.is_meta
    assert meta.to(torch.float64).weight_hh_l1.dtype == torch.float64


@each_kind
@each_backend
def test_cuda(kind, backend):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    theirs, ours = pair(kind, 3, 4, 2, bidirectional=True, backend=backend)
    params, x, state, lengths = numpy_params(theirs), drawn(7, 3, 3), state_for(theirs, 3), [3, 7, 1]
    given = tuple(s.numpy() for s in state) if kind == "LSTM" else state.numpy()
    output, final, tape = recurrent_forward(kind.lower(), x.numpy(), params, given, lengths=lengths)
    ours.cuda()
    leaf = x.cuda().requires_grad_()
    on_gpu = tuple(s.cuda() for s in state) if kind == "LSTM" else state.cuda()
    answer = ours(leaf, on_gpu, lengths=torch.tensor(lengths, device="cuda"))
    assert_parity(tuple(a.detach() for a in flat(answer)), (output, *(final if kind == "LSTM" else (final,))), tol=1e-10)
    answer[0].sum().backward()
    grads = recurrent_backward(np.ones_like(output), None, tape)
    assert_parity(leaf.grad, grads["x"], tol=1e-10)
    for name, p in ours.named_parameters():
        assert_parity(p.grad, grads[name], tol=1e-10, name=name)


@each_variant
def test_cuda_variants(kind, options):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    layer = getattr(nn, kind)(3, 4, 2, bidirectional=True, dtype=torch.float64, **options).eval()
    x, lengths = drawn(5, 2, 3), [2, 5]
    expected = tuple(a.detach() for a in flat(layer(x, lengths=lengths)))
    assert_parity(flat(layer.cuda()(x.cuda(), lengths=lengths)), expected, tol=1e-10)


# ---- What a program may do with a layer


@each_kind
@each_backend
def test_hooks(kind, backend):
    layer, seen = pair(kind, 3, 4, backend=backend)[1], []
    layer.register_forward_pre_hook(lambda module, args: seen.append("before") or (args[0] * 2, *args[1:]))
    layer.register_forward_hook(lambda module, args, output: seen.append("after") or (output[0] + 1, output[1]))
    layer.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append("backward"))
    layer.weight_hh_l0.register_hook(lambda grad: seen.append("weight") or grad * 0)
    x = drawn(4, 2, 3).requires_grad_()
    output = layer(x)[0]
    assert_parity(output.detach(), layer.forward(2 * x)[0].detach() + 1)
    output.sum().backward()
    assert seen == ["before", "after", "weight", "backward"] or seen == ["before", "after", "backward", "weight"]
    assert (layer.weight_hh_l0.grad == 0).all()


@each_kind
@each_backend
def test_tied_and_frozen_weights(kind, backend):
    theirs, ours = pair(kind, 4, 4, 2, backend=backend)
    for layer in (theirs, ours):
        layer.weight_hh_l1 = layer.weight_hh_l0
        layer.weight_ih_l0.requires_grad_(False)
    assert len([*ours.parameters()]) == len([*theirs.parameters()]) == 7
    for layer in (theirs, ours):
        layer(drawn(5, 2, 4))[0].square().sum().backward()
    assert ours.weight_ih_l0.grad is None
    assert_parity(ours.weight_hh_l0.grad, theirs.weight_hh_l0.grad, tol=1e-9)
    ours.weight_hh_l1 = torch.nn.Parameter(torch.zeros_like(ours.weight_hh_l1))
    theirs.weight_hh_l1 = ours.weight_hh_l1
    assert_parity(ours(drawn(5, 2, 4))[0], theirs(drawn(5, 2, 4))[0])
    first = getattr(nn, kind)(4, 4, dtype=torch.float64)
    first.weight_ih_l0 = ours.weight_ih_l0  # between two modules
    assert first.weight_ih_l0 is ours.weight_ih_l0 and first(drawn(2, 1, 4))[0].shape == (2, 1, 4)


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


@each_kind
@each_backend
@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, parametrizations.weight_norm, parametrizations.orthogonal,
                                  lambda module, name: parametrize.register_parametrization(module, name, Doubled())],
                         ids=["spectral_norm", "weight_norm", "orthogonal", "own"])
def test_parametrized_weights(kind, backend, wrap):
    theirs, ours = pair(kind, 3, 4, 2, backend=backend)
    for layer in (theirs, ours):
        seeded(lambda: wrap(layer, "weight_hh_l1"))
        layer.eval()
        layer(drawn(5, 2, 3))[0].square().sum().backward()
    assert_parity(ours(drawn(5, 2, 3))[0].detach(), theirs(drawn(5, 2, 3))[0].detach())
    own, theirs_own = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert set(own) == set(theirs_own) and "weight_hh_l1" not in own and len(own) > 7
    for name in own:
        assert_parity(own[name].grad, theirs_own[name].grad, tol=1e-9, name=name)
    twin = copy.deepcopy(ours)
    assert_parity(twin(drawn(5, 2, 3))[0].detach(), ours(drawn(5, 2, 3))[0].detach())


def test_weight_norm_of_old():
    theirs, ours = pair("LSTM", 3, 4, backend="loop")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for layer in (theirs, ours):
            torch.nn.utils.weight_norm(layer, "weight_hh_l0")
    with torch.no_grad():
        for layer in (theirs, ours):
            layer.weight_hh_l0_g.mul_(2)
    assert_parity(ours(drawn(5, 2, 3))[0].detach(), theirs(drawn(5, 2, 3))[0].detach())


@each_kind
@each_backend
def test_functional_call(kind, backend):
    theirs, ours = pair(kind, 3, 4, 2, bidirectional=True, backend=backend)
    other = {name: 2 * p.detach() for name, p in ours.named_parameters()}
    x = drawn(5, 2, 3)
    before = ours(x)[0].detach()
    expected, got = (torch.func.functional_call(layer, other, (x,))[0] for layer in (theirs, ours))
    assert_parity(got, expected)
    assert_parity(ours(x)[0].detach(), before)
    grads = torch.func.grad(lambda params: torch.func.functional_call(ours, params, (x,))[0].sum())(other)
    leaves = {name: p.clone().requires_grad_() for name, p in other.items()}
    torch.func.functional_call(theirs, leaves, (x,))[0].sum().backward()
    for name, leaf in leaves.items():
        assert_parity(grads[name].detach(), leaf.grad, tol=1e-9, name=name)


@each_kind
def test_vmap_and_forward_mode(kind):
    "What torch.nn's layers refuse: an ensemble in one call, and derivatives in forward mode."
    models = [getattr(nn, kind)(3, 4, backend="loop", dtype=torch.float64) for _ in range(3)]
    x = drawn(5, 2, 3)
    params, buffers = torch.func.stack_module_state(models)
    together = torch.func.vmap(lambda p: torch.func.functional_call(models[0], (p, buffers), (x,))[0])(params)
    assert_parity(together.detach(), torch.stack([model(x)[0] for model in models]).detach())
    _, slope = torch.func.jvp(lambda x: models[0](x)[0], (x,), (torch.ones_like(x),))
    eps = 1e-6
    assert_parity(slope.detach(), ((models[0](x + eps)[0] - models[0](x - eps)[0]) / (2 * eps)).detach(), tol=1e-8)


@each_kind
@each_backend
def test_copies_and_files(kind, backend, tmp_path):
    layer = pair(kind, 3, 4, 2, bidirectional=True, backend=backend)[1].eval()
    x = drawn(5, 2, 3)
    expected = layer(x)[0].detach()
    torch.save(layer, tmp_path / "layer.pt")
    for twin in (copy.deepcopy(layer), torch.load(tmp_path / "layer.pt", weights_only=False)):
        assert torch.equal(twin(x)[0].detach(), expected) and not twin.training and twin.backend == backend
        with torch.no_grad():
            twin.weight_hh_l1.zero_()
        assert not torch.equal(twin(x)[0].detach(), expected) and torch.equal(layer(x)[0].detach(), expected)
    shallow = copy.copy(layer)
    assert shallow.weight_ih_l0 is layer.weight_ih_l0 and torch.equal(shallow(x)[0].detach(), expected)
    replica = layer._replicate_for_data_parallel()
    replica._parameters = {name: 2 * p.detach() for name, p in layer._parameters.items()}
    assert not torch.equal(replica(x)[0], expected) and torch.equal(layer(x)[0].detach(), expected)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    getattr(torch.nn, kind)(3, 4, 2, bidirectional=True, dtype=torch.float64).load_state_dict(torch.load(buffer))
    in_a_model = copy.deepcopy(torch.nn.ModuleList([layer, layer]))
    assert in_a_model[0] is in_a_model[1]


def test_a_layer_dies_with_its_last_reference():
    import gc
    import weakref
    gc.disable()
    try:
        layer = nn.LSTM(3, 4, backend="loop")
        layer(torch.zeros(2, 1, 3))
        dead = weakref.ref(layer)
        del layer
        assert dead() is None
    finally:
        gc.enable()


def test_the_network_inside_is_hidden():
    layer = nn.LSTM(3, 4, 2, bidirectional=True, zoneout=0.1)
    assert [*layer.modules()] == [layer] and not [*layer.children()] and not [*layer.buffers()]
    assert all(name.startswith(("weight", "bias")) for name in layer.state_dict())


def test_threads_share_a_layer():
    layer, found = nn.LSTM(3, 4, backend="loop").eval(), {}
    xs = [torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(k)) for k in range(4)]
    expected = [layer(x)[0].detach() for x in xs]

    def run(k):
        for _ in range(20):
            found[k] = layer(xs[k])[0].detach()
    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[k], expected[k]) for k in range(4))


def test_flatten_parameters_and_all_weights():
    theirs, ours = pair("LSTM", 3, 4, 2, bidirectional=True, proj_size=2)
    assert ours.flatten_parameters() is None
    assert [[p.shape for p in weights] for weights in ours.all_weights] == [[p.shape for p in weights] for weights in theirs.all_weights]
    assert ours.all_weights[3][4] is ours.weight_hr_l1_reverse
    nn.GRU(3, 4, reset_after=False).flatten_parameters()


@each_kind
@each_backend
def test_double_backward(kind, backend):
    layer = pair(kind, 2, 3, backend=backend)[1]
    x = drawn(3, 2, 2).requires_grad_()
    weights = [p.detach().requires_grad_() for p in layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *weights):
        return flat(torch.func.functional_call(layer, dict(zip(names, weights)), (x,)))[0]
    assert torch.autograd.gradcheck(run, (x, *weights), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, *weights), fast_mode=True)


@each_kind
@each_backend
def test_deterministic_algorithms(kind, backend):
    layer, x = pair(kind, 3, 4, 2, bidirectional=True, backend=backend)[1], drawn(5, 2, 3).requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        for _ in range(2):
            answer = layer(x, lengths=[5, 2])
            found.append((*flat(answer), *torch.autograd.grad(loss_of(answer), [x, *layer.parameters()])))
        assert all(map(torch.equal, *found))
    finally:
        torch.use_deterministic_algorithms(False)


@each_kind
@each_backend
def test_autocast(kind, backend):
    theirs, ours = pair(kind, 3, 4, 2, bidirectional=True, dtype=torch.float32, backend=backend)
    for x in (drawn(5, 2, 3, dtype=torch.float32), drawn(5, 2, 3, dtype=torch.bfloat16)):
        for state in (None, state_for(theirs, 2)):
            state = tuple(s.float() for s in state) if isinstance(state, tuple) else None if state is None else state.float()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                expected, got = (flat(layer(x, state)) for layer in (theirs, ours))
                by_length = flat(ours(x, state, lengths=[5, 5]))
            assert [a.dtype for a in got] == [a.dtype for a in by_length] == [a.dtype for a in expected]
            torch.testing.assert_close(got, expected, atol=0.03, rtol=0.03)
    loss = got[0].float().square().sum()
    loss.backward()
    assert ours.weight_ih_l0.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.float16):
        assert ours(drawn(5, 2, 3, dtype=torch.float32))[0].isfinite().all()  # torch.nn.LSTM raises on most CPUs


@pytest.mark.parametrize("kind", ["RNN", "LSTM"])
def test_compile_the_loop_whole(kind):
    "In one graph, which torch.compile refuses for torch.nn's layers."
    torch._dynamo.reset()
    theirs, ours = pair(kind, 3, 4, backend="loop")
    compiled, x = torch.compile(ours, backend="aot_eager", fullgraph=True), drawn(2, 2, 3).requires_grad_()
    output = compiled(x)[0]
    assert_parity(output.detach(), theirs(x)[0].detach())
    got = torch.autograd.grad(output.sin().sum(), [x, *ours.parameters()])
    expected = torch.autograd.grad(theirs(x)[0].sin().sum(), [x, *theirs.parameters()])
    for a, b in zip(got, expected, strict=True):
        assert_parity(a, b, tol=1e-9)


@pytest.mark.parametrize("options", [{}, dict(peephole=True, zoneout=0.1)])
def test_compile_a_model(options):
    "Lengths and kernels run between the compiled pieces, as torch.nn's layers do."
    torch._dynamo.reset()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.readout = nn.LSTM(3, 4, **options), torch.nn.Linear(4, 2)

        def forward(self, x, lengths):
            return self.readout(self.rnn(x * 2, lengths=lengths)[0])
    model, x = Model().eval(), drawn(2, 2, 3, dtype=torch.float32)
    compiled = torch.compile(model, backend="aot_eager")
    for lengths in (None, torch.tensor([2, 1])):
        torch.testing.assert_close(compiled(x, lengths), model(x, lengths))
    compiled(x, None).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind, backend, strict", [("RNN", "auto", False), ("LSTM", "loop", False), ("LSTM", "auto", True), ("GRU", "loop", True)])
def test_export(kind, backend, strict):
    layer, x = pair(kind, 3, 4, backend=backend)[1].eval(), drawn(3, 2, 3)
    program = torch.export.export(layer, (x,), strict=strict)
    assert_parity(program.module()(x)[0].detach(), layer(x)[0].detach())
    assert set(program.state_dict) == set(layer.state_dict())


DISTRIBUTED = """
import sys, torch, torch.distributed as dist
import rnnbook.nn as nn
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore(folder + "/store", 2), rank=rank, world_size=2)
torch.manual_seed(rank)  # DDP hands the weights of process 0 to all
model = torch.nn.parallel.DistributedDataParallel(nn.LSTM(3, 4, 2, bidirectional=True, peephole=True, dtype=torch.float64))
x = torch.load(folder + "/x.pt")
model(x[:, 2 * rank:2 * rank + 2])[0].square().sum().backward()
torch.save({name: (p.detach(), p.grad) for name, p in model.module.named_parameters()}, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_distributed_data_parallel(tmp_path):
    "Two processes with half a batch each get the gradients of one process with all of it."
    x = drawn(5, 4, 3)
    torch.save(x, tmp_path / "x.pt")
    workers = [subprocess.Popen([sys.executable, "-c", DISTRIBUTED, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    try:
        errors = [worker.communicate(timeout=120)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], errors
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    layer = seeded(lambda: nn.LSTM(3, 4, 2, bidirectional=True, peephole=True, dtype=torch.float64))
    layer(x)[0].square().sum().div(2).backward()
    for name, p in layer.named_parameters():
        assert torch.equal(first[name][0], second[name][0]) and torch.equal(first[name][0], p.detach())
        assert torch.equal(first[name][1], second[name][1])
        assert_parity(first[name][1], p.grad, tol=1e-9, name=name)


# ---- Dropout, modes


@each_kind
def test_dropout_between_layers(kind):
    for package in (torch.nn, nn):
        with pytest.warns(UserWarning, match="num_layers=1") as caught:
            getattr(package, kind)(3, 4, dropout=0.5)
    assert caught[0].filename == __file__
    theirs, auto = pair(kind, 3, 4, 2, dropout=0.5)
    loop = pair(kind, 3, 4, 2, dropout=0.5, backend="loop")[1]
    x = drawn(6, 2, 3)
    for layer in (auto, loop):
        assert not torch.equal(layer(x)[0], layer(x)[0])
        assert_parity(seeded(lambda: layer(x))[0].detach(), seeded(lambda: layer(x))[0].detach(), tol=0)
        assert_parity(layer.eval()(x)[0], theirs.eval()(x)[0])
    assert_parity(seeded(lambda: auto.train()(x))[0], seeded(lambda: theirs.train()(x))[0])
    loop.train().dropout = 1.0  # may be changed, as in torch.nn; now the upper layer sees only zeros
    only = getattr(nn, kind)(4, 4, dtype=torch.float64)
    only.load_state_dict({name.replace("_l1", "_l0"): p for name, p in loop.state_dict().items() if "_l1" in name})
    assert_parity(loop(x)[0].detach(), only(torch.zeros(6, 2, 4, dtype=torch.float64))[0].detach())
    loop.training = False
    assert torch.equal(loop(x)[0], loop(x)[0])


# ---- Variants: each is its readable layer


def readable(kind, options):
    "The readable layer with these options, and its cell."
    layers = dict(RNN=RNNLayer, LSTM=LSTMLayer, GRU=GRULayer)
    layer = layers[kind](3, 4, dtype=torch.float64, **options)
    return layer


@pytest.mark.parametrize("name", ["sigmoid", "peephole", "1997", "coupled", "projected", "2014"])
def test_variants_are_the_readable_layers(name):
    kind, options = VARIANTS[name]
    layer, expected = getattr(nn, kind)(3, 4, dtype=torch.float64, **options), readable(kind, options)
    expected.cell.load_state_dict({n.removesuffix("_l0"): p for n, p in layer.state_dict().items()})
    x, lengths = drawn(5, 3, 3), [2, 5, 0]
    assert all(map(torch.equal, flat(layer(x, lengths=lengths)), flat(expected(x, lengths=lengths))))


@each_variant
@pytest.mark.parametrize("bidirectional", [False, True])
def test_variants_in_every_form(kind, options, bidirectional):
    "Stacked, both directions: batch_first, packed, unbatched, lengths and files agree; all parameters get gradients."
    layer = getattr(nn, kind)(3, 4, 2, bidirectional=bidirectional, dtype=torch.float64, **options).eval()
    first = getattr(nn, kind)(3, 4, 2, batch_first=True, bidirectional=bidirectional, dtype=torch.float64, **options).eval()
    first.load_state_dict(layer.state_dict())
    x, lengths, state = drawn(5, 3, 3), [2, 5, 3], state_for(layer, 3)
    output, *final = expected = flat(layer(x, state, lengths=lengths))
    turned = flat(first(x.transpose(0, 1), state, lengths=lengths))
    assert_parity((turned[0].transpose(0, 1), *turned[1:]), expected)
    packed, packed_final = layer(pack_padded_sequence(x, lengths, enforce_sorted=False), state)
    assert_parity((pad_packed_sequence(packed)[0], *parts(packed_final)), expected)
    one = flat(layer(x[:2, 0], tuple(s[:, 0] for s in state) if kind == "LSTM" else state[:, 0]))
    assert_parity(one, (output[:2, 0], *(s[:, 0] for s in final)))
    assert torch.equal(copy.deepcopy(layer)(x, state)[0], layer(x, state)[0])
    assert (output[2:, 0] == 0).all() and layer(x[:0], state)[0].shape[0] == 0
    layer.train()
    loss_of(layer(x, state, lengths=lengths)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    assert (first.train()(x.transpose(0, 1))[0] != 0).any()


def test_zoneout_at_its_ends():
    x, state = drawn(6, 2, 3), (drawn(1, 2, 4, seed=1), drawn(1, 2, 4, seed=2))
    frozen = nn.LSTM(3, 4, zoneout=1.0, dtype=torch.float64)
    for mode in (True, False):
        output, final = frozen.train(mode)(x, state)
        assert all(map(torch.equal, final, state)) and torch.equal(output, state[0].expand(6, 2, 4))
    theirs, ours = pair("LSTM", 3, 4)
    assert nn.LSTM(3, 4, zoneout=0.0)._standard and not frozen._standard
    only_c = nn.LSTM(3, 4, zoneout=(0.0, 1.0), dtype=torch.float64)
    output, (h, c) = only_c(x, state)
    assert torch.equal(c, state[1]) and not torch.equal(h, state[0])


def test_masks_come_from_torchs_generator():
    layer, x = nn.GRU(3, 4, zoneout=0.3, recurrent_dropout=0.2), torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    first, second, other = (seeded(lambda: layer(x)[0].detach(), seed) for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_normalized_layers_start_with_gain_one():
    layer = nn.LSTM(3, 4, 2, layer_norm=True)
    for _ in range(2):
        assert (layer.gain_hh_l1 == 1).all() and (layer.gain_c_l0 == 1).all() and (layer.shift_c_l0 == 0).all()
        with torch.no_grad():
            for p in layer.parameters():
                p.fill_(7)
        layer.reset_parameters()


# ---- Errors


@pytest.mark.parametrize("kind, arguments, error, message", [
    ("LSTM", dict(input_size=0), ValueError, "input_size: expected an integer above 0, got 0"),
    ("LSTM", dict(hidden_size=2.5), TypeError, "hidden_size: expected an integer above 0, got 2.5"),
    ("GRU", dict(num_layers=0), ValueError, "num_layers: expected an integer above 0, got 0"),
    ("GRU", dict(bias=1), TypeError, "bias: expected True or False, got 1"),
    ("RNN", dict(batch_first="no"), TypeError, "batch_first: expected True or False, got 'no'"),
    ("LSTM", dict(dropout=1.5), ValueError, "dropout: expected a probability from 0 to 1, got 1.5"),
    ("LSTM", dict(dropout=True), TypeError, "dropout: expected a probability from 0 to 1, got True"),
    ("LSTM", dict(dropout=float("nan")), ValueError, "dropout: expected a probability from 0 to 1, got nan"),
    ("LSTM", dict(zoneout=-0.1), ValueError, "zoneout: expected a probability from 0 to 1, got -0.1"),
    ("LSTM", dict(zoneout=(0.1, 2)), ValueError, "zoneout: expected a probability from 0 to 1, got 2"),
    ("GRU", dict(zoneout=(0.1, 0.2)), TypeError, r"zoneout: expected a probability from 0 to 1, got \(0.1, 0.2\)"),
    ("GRU", dict(recurrent_dropout="much"), TypeError, "recurrent_dropout: expected a probability from 0 to 1, got 'much'"),
    ("LSTM", dict(proj_size=4), ValueError, "proj_size: expected 0 to 3, got 4"),
    ("LSTM", dict(proj_size=-1), ValueError, "proj_size: expected 0 to 3, got -1"),
    ("GRU", dict(proj_size=2), ValueError, "proj_size: expected 0, got 2"),
    ("RNN", dict(nonlinearity="softmax"), ValueError, "nonlinearity: expected one of 'tanh', 'relu', 'sigmoid', got 'softmax'"),
    ("LSTM", dict(coupled=True, forget_gate=False), ValueError, "coupled: expected False with forget_gate=False, got True"),
    ("LSTM", dict(layer_norm=True, peephole=True), ValueError, "layer_norm: expected False with peephole=True, got True"),
    ("LSTM", dict(layer_norm=True, proj_size=2), ValueError, "layer_norm: expected False with proj_size=2, got True"),
    ("GRU", dict(layer_norm=True, reset_after=False), ValueError, "layer_norm: expected False with reset_after=False, got True"),
    ("RNN", dict(backend="fast"), ValueError, "backend: expected 'auto' or 'loop', got 'fast'"),
    ("RNN", dict(peephole=True), TypeError, "unexpected keyword argument 'peephole'"),
])
def test_errors_of_the_constructor(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(nn, kind)(**dict(input_size=3, hidden_size=4) | arguments)


X = torch.zeros(5, 2, 3)
H = torch.zeros(1, 2, 4)


@each_backend
@pytest.mark.parametrize("kind, call, error, message", [
    ("LSTM", dict(input=[1.0]), TypeError, "input: expected a tensor or a PackedSequence, got list"),
    ("LSTM", dict(input=X[..., :2]), ValueError, r"input: expected \(T, B, I\) or \(T, I\) with I = 3, got \(5, 2, 2\)"),
    ("GRU", dict(input=X[None]), ValueError, r"input: expected \(T, B, I\) or \(T, I\) with I = 3, got \(1, 5, 2, 3\)"),
    ("GRU", dict(input=X.double()), TypeError, "input: expected torch.float32 like the weights, got torch.float64"),
    ("GRU", dict(input=X.long()), TypeError, "input: expected torch.float32 like the weights, got torch.int64"),
    ("RNN", dict(input=X.to("meta")), ValueError, "input: expected a tensor on cpu, got one on meta"),
    ("RNN", dict(hx=H.to("meta")), ValueError, "hx: expected a tensor on cpu, got one on meta"),
    ("LSTM", dict(hx=H), TypeError, r"hx: expected a pair \(h, c\), got Tensor"),
    ("LSTM", dict(hx=(H,)), TypeError, r"hx: expected a pair \(h, c\), got a tuple of 1"),
    ("LSTM", dict(hx=(H, H[:, :1])), ValueError, r"hx, c: expected \(1, 2, 4\), got \(1, 1, 4\)"),
    ("LSTM", dict(hx=(H.double(), H)), TypeError, "hx, h: expected torch.float32 like x, got torch.float64"),
    ("GRU", dict(hx=(H,)), TypeError, "hx: expected a tensor, got tuple"),
    ("GRU", dict(hx=H[0]), ValueError, r"hx: expected \(1, 2, 4\), got \(2, 4\)"),
    ("GRU", dict(input=X[:, 0], hx=H), ValueError, r"hx: expected \(1, 4\), got \(1, 2, 4\)"),
    ("GRU", dict(lengths=[5, 6]), ValueError, "lengths: expected values from 0 to 5, got 6"),
    ("GRU", dict(lengths=[5, -1]), ValueError, "lengths: expected values from 0 to 5, got -1"),
    ("GRU", dict(lengths=[5.0, 1.0]), TypeError, "lengths: expected integers, got float64"),
    ("GRU", dict(lengths=[5]), ValueError, r"lengths: expected \(2,\), got \(1,\)"),
    ("GRU", dict(input=pack_padded_sequence(X[..., :2], [5, 4])), ValueError, r"input.data: expected \(N, I\) with I = 3, got \(9, 2\)"),
    ("GRU", dict(input=pack_padded_sequence(X, [5, 4]), hx=H[:, :1]), ValueError, r"hx: expected \(1, 2, 4\), got \(1, 1, 4\)"),
])
def test_errors_of_the_call(backend, kind, call, error, message):
    with pytest.raises(error, match=message):
        getattr(nn, kind)(3, 4, backend=backend)(**dict(input=X) | call)


def test_batch_first_is_in_the_message():
    with pytest.raises(ValueError, match=r"input: expected \(B, T, I\) or \(T, I\) with I = 3"):
        nn.LSTM(3, 4, batch_first=True)(X[..., :2])


# ---- Converters


def onnx_run(kind, arrays, x, state=None, lengths=None, **attributes):
    "Y, Y_h (and Y_c) of a one-node model, by ONNX's own kernels."
    onnx = pytest.importorskip("onnx", reason="ONNX is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    D, H = arrays["W"].shape[0], arrays["R"].shape[-1]
    feed = {"X": x.numpy(), "W": arrays["W"], "R": arrays["R"]}
    inputs = ["X", "W", "R", "", "", "", "", ""]
    extras = {3: ("B", arrays.get("B")), 4: ("sequence_lens", None if lengths is None else np.array(lengths, np.int32)),
              5: ("initial_h", None if state is None else parts(state)[0].numpy())}
    if kind == "LSTM":
        extras |= {6: ("initial_c", None if state is None else state[1].numpy()), 7: ("P", arrays.get("P"))}
    for k, (name, array) in extras.items():
        if array is not None:
            inputs[k], feed[name] = name, array
    while inputs[-1] == "":
        inputs.pop()
    outputs = ["Y", "Y_h", "Y_c"][:3 if kind == "LSTM" else 2]
    node = onnx.helper.make_node(kind, inputs, outputs, hidden_size=H, direction="bidirectional" if D == 2 else "forward", **attributes)
    as_onnx = onnx.helper.np_dtype_to_tensor_dtype
    given = [onnx.helper.make_tensor_value_info(name, as_onnx(a.dtype), a.shape) for name, a in feed.items()]
    made = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "one", given, made), opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=9)
    answers = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)
    y = answers[0]  # (T, D, B, H)
    return y.transpose(0, 2, 1, 3).reshape(y.shape[0], y.shape[2], -1), *answers[1:]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind, options, attributes, torchs", [
    ("RNN", {}, {}, {}), ("RNN", dict(nonlinearity="relu"), "Relu", {}), ("LSTM", {}, {}, {}), ("LSTM", dict(peephole=True), {}, {}),
    ("LSTM", dict(coupled=True), dict(input_forget=1), dict(coupled=True)), ("LSTM", dict(coupled=True, peephole=True), dict(input_forget=1), dict(coupled=True)),
    ("GRU", {}, dict(linear_before_reset=1), {}), ("GRU", dict(reset_after=False), dict(linear_before_reset=0), {}),
])
def test_onnx(kind, options, attributes, torchs, bias, bidirectional):
    "What onnxruntime's kernels make of our weights is what we make of them; and back again, exactly."
    if attributes == "Relu":
        attributes = dict(activations=["Relu"] * (2 if bidirectional else 1))
    layer = seeded(lambda: getattr(nn, kind)(3, 4, bias=bias, bidirectional=bidirectional, **options)).eval()
    params, x, state = numpy_params(layer), drawn(6, 3, 3, dtype=torch.float32), state_for(layer, 3)
    state = tuple(s.float() for s in state) if kind == "LSTM" else state.float()
    arrays = nn.to_onnx(kind.lower(), params, **torchs)
    assert ("B" in arrays) == bias and ("P" in arrays) == bool(options.get("peephole"))
    expected = onnx_run(kind, arrays, x, state, [6, 2, 4], **attributes)
    assert_parity(tuple(a.detach() for a in flat(layer(x, state, lengths=[6, 2, 4]))), expected, tol=1e-5)
    back = nn.from_onnx(kind.lower(), **arrays, **torchs)
    assert set(back) == set(params) and all(np.array_equal(back[name], params[name]) for name in params)
    assert not any(np.shares_memory(back[name], array) for name in back for array in arrays.values())


def keras_reference(kind, weights, x, reset_after=True):
    "Keras's documented equations for one direction: x (T, B, I), weights as get_weights() lists them; the output (T, B, H)."
    W, U, *bias = weights
    H = U.shape[0]
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    b_in, b_rec = (0, 0) if not bias else bias[0] if bias[0].ndim == 2 else (bias[0], np.zeros_like(bias[0]))
    h = c = np.zeros((x.shape[1], H))
    outputs = []
    for x_t in x:
        if kind == "rnn":
            h = np.tanh(x_t @ W + b_in + h @ U)
        elif kind == "lstm":  # i, f, c, o
            i, f, g, o = np.split(x_t @ W + h @ U + b_in, 4, axis=1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        else:  # z, r, h
            x_z, x_r, x_h = np.split(x_t @ W + b_in, 3, axis=1)
            if reset_after:
                r_z, r_r, r_h = np.split(h @ U + b_rec, 3, axis=1)
                z, r = sigmoid(x_z + r_z), sigmoid(x_r + r_r)
                candidate = np.tanh(x_h + r * r_h)
            else:
                z, r = sigmoid(x_z + h @ U[:, :H]), sigmoid(x_r + h @ U[:, H:2 * H])
                candidate = np.tanh(x_h + (r * h) @ U[:, 2 * H:])
            h = z * h + (1 - z) * candidate
        outputs.append(h)
    return np.stack(outputs)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind, reset_after", [("rnn", True), ("lstm", True), ("gru", True), ("gru", False)])
def test_keras(kind, reset_after, bias, bidirectional):
    rng, D = np.random.default_rng(3), 2 if bidirectional else 1
    G = dict(rnn=1, lstm=4, gru=3)[kind] * 4
    b_shape = (2, G) if kind == "gru" and reset_after else (G,)
    weights = [rng.standard_normal(shape) for _ in range(D) for shape in ((3, G), (4, G), *([b_shape] if bias else []))]
    x, n = rng.standard_normal((6, 2, 3)), len(weights) // D
    expected = keras_reference(kind, weights[:n], x, reset_after)
    if bidirectional:
        reverse = keras_reference(kind, weights[n:], x[::-1], reset_after)[::-1]
        expected = np.concatenate([expected, reverse], axis=-1)
    params = nn.from_keras(kind, weights)
    options = {} if reset_after else dict(reset_after=False)
    layer = getattr(nn, kind.upper())(3, 4, bias=bias, bidirectional=bidirectional, dtype=torch.float64, **options)
    layer.load_state_dict({name: torch.from_numpy(p) for name, p in params.items()})
    assert_parity(layer(torch.from_numpy(x))[0].detach(), expected)
    assert_parity(recurrent_forward(kind, x, params, **options)[0], expected)
    back = nn.to_keras(kind, params, **options)
    assert len(back) == len(weights)
    assert_parity(tuple(back), tuple(weights), tol=0)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind, reset_after", [("rnn", True), ("lstm", True), ("gru", True), ("gru", False)])
def test_keras_itself(kind, reset_after, bidirectional, monkeypatch):
    "Both ways, wherever Keras 3 is installed; in float32, to which its PyTorch backend rounds in places."
    monkeypatch.setenv("KERAS_BACKEND", os.environ.get("KERAS_BACKEND", "torch"))
    keras = pytest.importorskip("keras", reason="Keras is not installed")
    options = {} if reset_after else dict(reset_after=False)
    theirs = getattr(keras.layers, dict(rnn="SimpleRNN", lstm="LSTM", gru="GRU")[kind])(4, return_sequences=True, **options)
    theirs = keras.layers.Bidirectional(theirs) if bidirectional else theirs
    theirs.build((2, 6, 3))
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 6, 3)).astype(np.float32)
    theirs.set_weights([rng.standard_normal(w.shape).astype(np.float32) for w in theirs.get_weights()])
    ours = getattr(nn, kind.upper())(3, 4, bidirectional=bidirectional, batch_first=True, **options)
    for _ in range(2):
        ours.load_state_dict({name: torch.from_numpy(p) for name, p in nn.from_keras(kind, theirs.get_weights()).items()})
        assert_parity(ours(torch.from_numpy(x))[0].detach(), keras.ops.convert_to_numpy(theirs(x)), tol=1e-5)
        ours.reset_parameters()
        theirs.set_weights(nn.to_keras(kind, numpy_params(ours), **options))


@pytest.mark.parametrize("library", ["keras", "onnx"])
@each_kind
def test_layers_of_a_stack(kind, library):
    params = numpy_params(pair(kind, 3, 4, 2, bidirectional=True)[1])
    kind = kind.lower()
    if library == "onnx":
        back = nn.from_onnx(kind, **nn.to_onnx(kind, params)) | nn.from_onnx(kind, **nn.to_onnx(kind, params, layer=1), layer=1)
        assert all(np.array_equal(back[name], params[name]) for name in params)
        return
    back = nn.from_keras(kind, nn.to_keras(kind, params)) | nn.from_keras(kind, nn.to_keras(kind, params, layer=1), layer=1)
    x = drawn(5, 2, 3).numpy()
    assert_parity(recurrent_forward(kind, x, back)[0], recurrent_forward(kind, x, params)[0])  # an LSTM's two biases are one in Keras


LSTM_PARAMS = recurrent_init("lstm", 3, 4, rng=np.random.default_rng(0))


@pytest.mark.parametrize("call, message", [
    (lambda: nn.from_keras("mgu", []), "kind: expected one of 'rnn', 'lstm', 'gru', got 'mgu'"),
    (lambda: nn.from_keras("lstm", [np.zeros((3, 16))]), "weights: expected 2 or 3 arrays for each direction, got 1"),
    (lambda: nn.from_keras("lstm", [np.zeros((3, 12)), np.zeros((4, 12))]), r"weights: expected \(I, 16\) and \(4, 16\), got \(3, 12\) and \(4, 12\)"),
    (lambda: nn.to_keras("lstm", LSTM_PARAMS, layer=1), "params: expected weight_ih_l1, got weight_ih_l0"),
    (lambda: nn.to_keras("lstm", LSTM_PARAMS | {"peephole_i_l0": np.zeros(4)}), "all that Keras has, got peephole_i"),
    (lambda: nn.to_onnx("lstm", LSTM_PARAMS | {"weight_hr_l0": np.zeros((2, 4))}), "all that ONNX has, got weight_hr"),
    (lambda: nn.to_onnx("lstm", recurrent_init("lstm", 3, 4, rng=np.random.default_rng(0), forget_gate=False)), r"weight_hh: expected \(16, 4\), got \(12, 4\)"),
    (lambda: nn.from_onnx("lstm", np.zeros((1, 12, 3)), np.zeros((1, 12, 4))), r"W: expected \(1, 16, 3\), got \(1, 12, 3\)"),
    (lambda: nn.from_onnx("gru", np.zeros((3, 12, 3)), np.zeros((3, 12, 4))), r"W: expected \(2, 12, 3\), got \(3, 12, 3\)"),
])
def test_errors_of_the_converters(call, message):
    with pytest.raises(ValueError, match=message):
        call()
