"""Chapter 08: the n-gram against a brute-force one, both character models, and the model file."""
import base64
import itertools
import json
import math
import os
import stat
import zlib

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from rnnbook.character_model import (CharRNN, char_backward, char_bits, char_forward, char_init, char_loss, char_sample, load_model,
                                     ngram_fit, ngram_probabilities, save_model, xz_bits)
from rnnbook.feedforward import softmax_cross_entropy
from rnnbook.rnn import numpy_params
from rnnbook.sequences import Vocabulary
from rnnbook.testing import assert_parity, gradient_check

WORDS = "the network reads a letter and says which letter comes next ; it is often wrong at first , then less and less .\n".split(" ")


def some_text(length=6000, seed=0):
    "A text of known words in random order: enough structure to learn in a second."
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, length // 3))[:length]


# ---- counting


def witten_bell(text, context, c, size, order):
    "The definition, by brute force: the probability of `c` after `context` in a model of `text`, both lists of integers."
    if order < 0: return 1 / size
    shorter = witten_bell(text, context, c, size, order - 1)
    if order > len(context): return shorter
    context = context[len(context) - order:]
    follow = [text[i + order] for i in range(len(text) - order) if text[i:i + order] == context]
    if not follow: return shorter
    return (follow.count(c) + len(set(follow)) * shorter) / (len(follow) + len(set(follow)))


@pytest.mark.parametrize("size, length, seed", [(2, 60, 0), (3, 40, 1), (5, 200, 2), (7, 9, 3), (1, 12, 4)])
def test_ngram_is_witten_bell(size, length, seed):
    rng = np.random.default_rng(seed)
    text, new = rng.integers(0, size, length), rng.integers(0, size, 25)
    p = ngram_probabilities(ngram_fit(text, size), new)
    assert p.shape == (7, 25)
    for order, t in itertools.product(range(7), range(25)):
        expected = witten_bell(text.tolist(), new[:t].tolist(), new[t], size, order)
        assert abs(p[order, t] - expected) < 1e-12, (order, t)


@pytest.mark.parametrize("order", [0, 1, 6])
def test_ngram_sums_to_one_after_any_context(order):
    rng = np.random.default_rng(5)
    model = ngram_fit(rng.integers(0, 4, 300), 6, order)  # 4 and 5 never occur
    for context in ([], [0], [5], [1, 2, 3, 0, 1, 2], [4, 1, 1], rng.integers(0, 6, 30)):
        total = sum(ngram_probabilities(model, np.array([*context, c]))[:, -1] for c in range(6))
        assert_parity(total, np.ones(order + 1))


def test_ngram_needs_no_more_than_a_large_vocabulary_allows():
    "Codes of contexts stay small: with 100,000 symbols 7 in a row would not fit into 64 bits."
    rng = np.random.default_rng(0)
    ids = np.tile(rng.integers(0, 100_000, 50), 4)
    assert ngram_probabilities(ngram_fit(ids, 100_000), ids)[6, 60:].min() > 0.5  # knows the repetition by heart


@pytest.mark.parametrize("ids, error, message", [
    ([0, 1, 2], ValueError, r"N >= 7, got \(3,\)"),
    ([0] * 9 + [4], ValueError, "from 0 to 3, got 0 to 4"),
    ([-1] * 9, ValueError, "from 0 to 3"),
    ([0.5] * 9, TypeError, "expected integers, got float64"),
    ([[0] * 9] * 9, ValueError, r"expected \(N,\)"),
])
def test_ngram_names_what_is_wrong(ids, error, message):
    with pytest.raises(error, match=message): ngram_fit(ids, 4)


def test_xz_quotes_but_does_not_understand():
    text, other = some_text(20_000), some_text(2000, seed=1)
    assert xz_bits(text, text[3000:5000]) < 0.2 < 1 < xz_bits(text, other) < xz_bits("", other)
    noise = "".join(np.random.default_rng(0).choice(list("abcd"), 20_000))
    assert 2.0 <= xz_bits(noise[:10_000], noise[10_000:]) < 2.6  # 2 bits are the least that random letters of 4 cost
    with pytest.raises(ValueError, match="heldout"): xz_bits("abc", "")


# ---- the model, twice


def problem(T=6, B=3, V=7, H=5, dtype=np.float64):
    "Parameters, a batch and a state."
    rng = np.random.default_rng(T + B)
    params = {name: (p + 0.1 * rng.standard_normal(p.shape)).astype(dtype) for name, p in char_init(V, H, rng=rng).items()}  # biases are not 0
    return params, tuple(rng.integers(0, V, (2, T, B))), rng.standard_normal((1, B, H)).astype(dtype)


def test_gradients_by_central_differences():
    params, batch, state = problem()
    _, grads, _ = char_loss(params, batch, state)
    errors = gradient_check(lambda moved: char_loss(moved, batch, state)[0], params, {name: grads[name] for name in params})
    assert errors.keys() == params.keys()


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("T, B", [(1, 1), (6, 3), (40, 2)])
def test_numpy_and_torch_agree(T, B, carried):
    params, batch, state = problem(T, B)
    state = state if carried else None
    loss, grads, final = char_loss(params, batch, state)
    module = CharRNN.from_numpy(params)
    torch_loss, torch_final = module.loss([torch.from_numpy(a) for a in batch], None if state is None else torch.from_numpy(state))
    torch_loss.backward()
    assert_parity((torch_loss, torch_final), (np.array(loss), final), tol=1e-12)
    for name, p in zip(params, module.parameters(), strict=True): assert_parity(p.grad, grads[name], tol=1e-9, name=name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none")
def test_cuda_agrees_with_numpy():
    params, batch, state = problem(20, 4)
    loss, grads, final = char_loss(params, batch, state)
    module = CharRNN.from_numpy(params).cuda()
    torch_loss, torch_final = module.loss([torch.from_numpy(a).cuda() for a in batch], torch.from_numpy(state).cuda())
    torch_loss.backward()
    assert_parity((torch_loss, torch_final), (np.array(loss), final), tol=1e-10)
    for name, p in zip(params, module.parameters(), strict=True): assert_parity(p.grad, grads[name], tol=1e-10, name=name)


def test_state_carries_over_batches():
    params, (x, y), state = problem(8)
    logits, final, _ = char_forward(x, params, state)
    first, middle, _ = char_forward(x[:3], params, state)
    second, end, _ = char_forward(x[3:], params, middle)
    assert_parity((np.concatenate([first, second]), end), (logits, final))


def test_nothing_is_written_into():
    params, batch, state = problem()
    copies = {name: p.copy() for name, p in params.items()}, state.copy()
    char_loss(params, batch, state)
    assert all((params[name] == copies[0][name]).all() for name in params) and (state == copies[1]).all()


def test_module_draws_torch_weights_and_from_numpy_none():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, after = CharRNN(7, 5), torch.get_rng_state()
        torch.manual_seed(0)
        theirs, readout = torch.nn.RNN(7, 5), torch.nn.Linear(5, 7)
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), [*theirs.parameters(), *readout.parameters()], strict=True))
        CharRNN.from_numpy(numpy_params(module))
        assert torch.equal(torch.get_rng_state(), after)


def test_from_numpy_copies():
    params, *_ = problem()
    module = CharRNN.from_numpy(params)
    with torch.no_grad(): module.layer.cell.weight_hh.zero_()
    assert params["weight_hh_l0"].any()


@pytest.mark.parametrize("steps", [1, 7, 99, 1000])
def test_bits_do_not_depend_on_the_chunks(steps):
    params, *_ = problem()
    ids = np.random.default_rng(0).integers(0, 7, 100)
    loss, _, _ = char_loss(params, (ids[:-1, None], ids[1:, None]))
    assert_parity(char_bits(params, ids, steps), loss / math.log(2))
    with pytest.raises(ValueError, match="at least 2, got 1"): char_bits(params, ids[:1])


def test_sample_follows_the_softmax():
    params, *_ = problem(V=3)
    vocabulary = Vocabulary("abc")
    logits, _, _ = char_forward(vocabulary.encode("ab")[:, None], params)
    p = np.exp(logits[-1, 0] / 0.8) / np.exp(logits[-1, 0] / 0.8).sum()
    rng = np.random.default_rng(0)
    drawn = "".join(char_sample(params, vocabulary, "ab", 1, temperature=0.8, rng=rng) for _ in range(3000))
    assert np.abs(np.array([drawn.count(c) / 3000 for c in "abc"]) - p).max() < 0.04


def test_sample_feeds_back_what_it_wrote():
    params, *_ = problem(V=3)
    vocabulary, rng = Vocabulary("abc"), np.random.default_rng(0)
    written = char_sample(params, vocabulary, "a", 12, temperature=0, rng=rng)
    for n in range(12):
        logits, _, _ = char_forward(vocabulary.encode("a" + written[:n])[:, None], params)
        assert written[n] == "abc"[logits[-1, 0].argmax()]


def test_another_model_is_measured_and_writes():
    params, *_ = problem(V=3)
    vocabulary, ids = Vocabulary("abc"), np.random.default_rng(0).integers(0, 3, 50)
    asked = []
    def deaf(ids, params, state):
        asked.append(state)
        return np.zeros((*np.shape(ids), 3)), (state or 0) + 1, None
    assert_parity(char_bits(params, ids, 20, forward=deaf), math.log2(3))
    assert asked == [None, 1, 2]  # it gets its own state back
    assert char_sample(params, vocabulary, "ab", 4, temperature=0, rng=np.random.default_rng(0), forward=deaf) == "aaaa"


@pytest.mark.parametrize("options, message", [
    (dict(prompt=""), "prompt"), (dict(prompt="ax"), "'x' at offset 1"), (dict(temperature=-1.0), "temperature"), (dict(temperature=math.nan), "temperature"),
])
def test_sample_names_what_is_wrong(options, message):
    params, *_ = problem(V=3)
    with pytest.raises(ValueError, match=message):
        char_sample(params, Vocabulary("abc"), **{"prompt": "a", "length": 3, "rng": np.random.default_rng(0), **options})


# ---- the model file


def saved(path, V=4):
    "A model file; what is in it."
    params, vocabulary = char_init(V, 3, rng=np.random.default_rng(0)), Vocabulary("\nabäc"[:V])
    save_model(path, params, vocabulary, {"seed": 3})
    return params, vocabulary


def test_saved_is_loaded(tmp_path):
    params, vocabulary = saved(tmp_path / "m")
    loaded, same, options = load_model(tmp_path / "m")
    assert same == vocabulary and options == {"seed": 3} and loaded.keys() == params.keys()
    assert all(loaded[name].dtype == p.dtype and (loaded[name] == p).all() for name, p in params.items())
    assert os.listdir(tmp_path) == ["m"]  # nothing is left beside it


def test_equal_models_are_equal_files(tmp_path):
    saved(tmp_path / "a"), saved(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="permissions of a POSIX system")
def test_a_saved_file_has_usual_permissions(tmp_path):
    saved(tmp_path / "m")
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    saved(tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space"): saved(tmp_path / "m", V=3)
    assert (tmp_path / "m").read_bytes() == before and os.listdir(tmp_path) == ["m"]


BEFORE = (  # a file as rnnbook-text wrote it before it used `write_whole`, compressed
    "c-oaxL2AP=5EMQ28D`H*kmL|jU*c0g5gApsmCDqyjHR>$W60C`v`Q|7K;4EeEX=MnGrK~M4`hxJq&#Y`YUP!bkc}{OU1{yxsxoR&mDhtj+FG}e!6@L}R;oO;YB&qXlDz;W022X1oG8^#0*"
    "YAK-Z!>$@k-!0ulpIN@vI#pq$|p%2_}THQBE2oTN=%4f9`d#dQLeYIHO{<X9dDMpgkO%_Aaz2u8S+%{!ZmTscU5X%5DDb%s8@5<bUYq)%d%!<C4Y(Ila~RYl9^LPLXeK1n#YY3-7?Un1)5B"
    "BnBa$J3^A2ke85`fJw}N^Zfg#Ty|fi#HaB")


def test_a_model_saved_before_is_loaded(tmp_path):
    (tmp_path / "m").write_bytes(zlib.decompress(base64.b85decode(BEFORE)))
    params, vocabulary, options = load_model(tmp_path / "m")
    assert vocabulary.tokens == Vocabulary("aé").tokens and options == {"steps": 3, "lr": 0.01}
    assert {name: p.tolist() for name, p in params.items()} == {
        "weight_ih_l0": [[0.0, 1.0]], "weight_hh_l0": [[0.5]], "bias_ih_l0": [1.0], "bias_hh_l0": [1.5], "weight_ho": [[2.0], [3.0]], "bias_ho": [2.5, 3.5]}
    save_model(tmp_path / "n", params, vocabulary, options)
    assert (tmp_path / "n").read_bytes() == (tmp_path / "m").read_bytes()


def test_the_shapes_are_the_callers(tmp_path):
    params, vocabulary = saved(tmp_path / "m")
    asked = []
    def shapes(params, size, options):
        asked.append((sorted(params), size, options))
        return {name: p.shape for name, p in params.items()} | {"bias_ho": (9,)}
    with pytest.raises(ValueError, match=r"bias_ho: expected \(9,\), got \(4,\)"): load_model(tmp_path / "m", shapes)
    assert asked == [(sorted(params), 4, {"seed": 3})]


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x80\x04N.", None, "cut", "flipped header"])
def test_another_file_is_no_model(tmp_path, content):
    path = tmp_path / "m"
    saved(path)
    whole = path.read_bytes()
    path.write_bytes({None: os.urandom(300), "cut": whole[:-9], "flipped header": whole[:20] + b"!" + whole[21:]}.get(content, content))
    with pytest.raises(ValueError, match="expected a model saved by rnnbook-text"): load_model(path)


def test_other_weights_are_no_model(tmp_path):
    path, params = tmp_path / "m", char_init(4, 3, rng=np.random.default_rng(0))
    save_file(params, path)
    with pytest.raises(ValueError, match="weights of something else"): load_model(path)
    words = {"rnnbook.character_model": json.dumps({"vocabulary": list("abc"), "options": {}})}
    save_file(params, path, metadata=words)
    with pytest.raises(ValueError, match=r"weight_ih_l0: expected \(3, 3\), got \(3, 4\)"): load_model(path)
    del params["bias_ho"]
    save_file(params, path, metadata=words)
    with pytest.raises(ValueError, match="bias_ho"): load_model(path)
