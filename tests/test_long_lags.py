"""The tasks of 1997, each answered by an independent definition from what is read; the networks, the criteria, the stream."""
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from rnnbook import long_lags
from rnnbook.long_lags import (
    NETWORKS, PROBLEMS, SYMBOLS, Batch, Problem, adding_problem_1997, answer_errors, answer_loss, continual_reber, embedded_reber, error_free,
    long_lag, long_lag_noise, multiplication_problem, network_backward, network_forward, network_init, noisy_targets, noisy_temporal_order,
    possible_next, reber_problem, reber_strings, solve, solve_continual, two_sequences,
)
from rnnbook.lstm import LSTMLayer
from rnnbook.rnn import RNNLayer
from rnnbook.testing import assert_parity, gradient_check

# The grammar once more, as a regular expression: what leads from node 3 to the end is a loop T* V P X, then T* V and an end.
FROM_3 = "(?:T*VPX)*T*V(?:PS|V)"
REBER = f"B(?:TS*X(?:S|X{FROM_3})|P{FROM_3})E"
EMBEDDED = f"B(?:T{REBER}T|P{REBER}P)E"

seeds, sizes = st.integers(0, 10**6), st.integers(1, 6)
quick = settings(max_examples=25, deadline=None)


def rng_of(seed): return np.random.default_rng(seed)


def read(x):
    "The numbers of one-hot symbols; -1 where there is none."
    assert set(np.unique(x)) <= {0, 1} and (x.sum(-1) <= 1).all()
    return np.where(x.any(-1), x.argmax(-1), -1)


# ---- the grammar


@quick
@given(seeds)
def test_strings_are_of_the_grammar(seed):
    assert all(re.fullmatch(EMBEDDED, s) for s in reber_strings(20, rng_of(seed)))
    assert all(re.fullmatch(REBER, s) for s in reber_strings(20, rng_of(seed), embedded=False))


def test_forks_are_even_and_nothing_is_missing():
    strings = reber_strings(20_000, rng_of(0))
    assert abs(np.mean([s[1] == "T" for s in strings]) - 0.5) < 0.02
    assert abs(np.mean([s[3] == "T" for s in strings]) - 0.5) < 0.02
    lengths = np.array([len(s) for s in strings])
    assert lengths.min() == 9 and abs(lengths.mean() - 12) < 0.15  # 7 expected symbols inside B..E, with E[S*] = E[T*] = 1
    followers = {}
    for s in strings:
        for t in range(1, len(s)): followers.setdefault(s[:t], []).append(s[t])
    for prefix, seen in followers.items():
        if len(seen) < 60: continue
        allowed = {SYMBOLS[k] for k in np.flatnonzero(possible_next(prefix)[-1])}
        assert allowed == set(seen), prefix  # a way not taken in 60 tries would be a wonder


def test_possible_next_says_where_a_string_leaves_the_grammar():
    whole = reber_strings(1, rng_of(3))[0]
    assert possible_next(whole).shape == (len(whole), 7) and not possible_next(whole)[-1].any()
    assert possible_next("").shape == (0, 7)
    with pytest.raises(ValueError, match="string: expected T or P at 1, got 'X'"): possible_next("BX")
    with pytest.raises(ValueError, match="the end"): possible_next(whole + "B")
    letter = whole[1]
    other = whole[:-2] + {"T": "P", "P": "T"}[letter] + "E"
    with pytest.raises(ValueError, match=f"expected {letter} at {len(whole) - 2}"): possible_next(other)


@quick
@given(seeds, sizes)
def test_embedded_reber_batch(seed, B):
    strings = reber_strings(B, rng_of(seed))
    x, target, lengths, right = embedded_reber(strings)
    assert (lengths == [len(s) - 1 for s in strings]).all() and len(x) == lengths.max()
    for b, s in enumerate(strings):
        ids = read(x[:, b])
        assert "".join(SYMBOLS[i] for i in ids[:lengths[b]]) == s[:-1] and (ids[lengths[b]:] == -1).all()
        assert "".join(SYMBOLS[i] for i in target[:lengths[b], b]) == s[1:]
        assert right[np.arange(lengths[b]), b, target[:lengths[b], b]].all()  # what comes is always among what may come
        assert (right[:lengths[b], b] == possible_next(s)[:-1]).all()


@quick
@given(seeds, st.integers(0, 200), sizes)
def test_continual_stream_is_strings_without_a_gap(seed, T, B):
    x, target, lengths, right = continual_reber(T, B, rng_of(seed))
    assert x.shape == (T, B, 7) and (lengths == T).all() and (read(x)[1:] == target[:-1]).all()
    for b in range(B):
        text = "".join(SYMBOLS[i] for i in read(x[:, b]))
        rest, allowed = text, []
        while whole := re.match(EMBEDDED, rest):
            allowed.append(possible_next(whole[0]) | (np.arange(len(whole[0]))[:, None] == len(whole[0]) - 1) & (np.array(list(SYMBOLS)) == "B"))
            rest = rest[whole.end():]
        allowed.append(possible_next(rest))  # a beginning of the next one
        assert (np.concatenate(allowed) == right[:, b]).all() if T else True


# ---- the other tasks: the answer from x alone


@quick
@given(seeds, st.integers(2, 30), sizes, st.booleans())
def test_long_lag(seed, p, B, random):
    x, target, lengths, right = long_lag(p, B, rng_of(seed), random=random)
    ids = read(x)
    assert x.shape == (p, B, p + 1) and (lengths == p).all()
    assert (target[:-1] == ids[1:]).all() and (target[-1] == ids[0]).all() and (ids[0] >= p - 1).all() and (ids[1:] < p - 1).all()
    if not random: assert (ids[1:] == np.arange(p - 1)[:, None]).all()
    assert (right == (ids[0] if random else target)).all()


def test_long_lag_uses_all_symbols_at_all_places():
    ids = read(long_lag(5, 2000, rng_of(0), random=True).x)
    assert (np.sort(np.unique(ids[0])) == [4, 5]).all() and abs((ids[0] == 4).mean() - 0.5) < 0.05
    assert all(set(row) == {0, 1, 2, 3} for row in ids[1:])


@quick
@given(seeds, st.integers(1, 40), st.integers(1, 9), sizes)
def test_long_lag_noise(seed, q, p, B):
    x, target, lengths, _ = long_lag_noise(q, p, B, rng_of(seed))
    for b, n in enumerate(lengths):
        ids = read(x[:, b])
        assert ids[0] == p + 1 and ids[1] == p + 2 + target[b] and ids[n - 1] == p and (ids[n:] == -1).all()
        assert n - 3 >= q and ((0 <= ids[2:n - 1]) & (ids[2:n - 1] < p)).all()


def test_long_lag_noise_lengths_and_answers():
    _, target, lengths, _ = long_lag_noise(50, 1, 10_000, rng_of(0))
    assert lengths.min() == 53 and abs(lengths.mean() - 62) < 0.4 and abs(target.mean() - 0.5) < 0.02  # b, x or y, q + 9 others, e
    assert abs((lengths == 53).mean() - 0.1) < 0.01  # e comes at once with probability 1/10


@quick
@given(seeds, st.integers(20, 60), sizes, st.integers(1, 4))
def test_two_sequences(seed, T, B, N):
    x, target, lengths, _ = two_sequences(T, B, rng_of(seed), informative=N)
    assert ((T <= lengths) & (lengths <= T + T // 10)).all()
    assert (np.abs(x[:N]) == 1).all() and (x[:N, :, 0] == 2 * target - 1).all()
    for b, n in enumerate(lengths): assert (x[n:, b] == 0).all() and (x[N:n, b] != 0).all()
    x, target, _, right = noisy_targets(T, B, rng_of(seed), informative=N)
    assert np.allclose(right[:, 0], np.where(x[0, :, 0] > 0, 0.2, 0.8)) and target.shape == (B, 1)


def test_noise_has_the_published_variances():
    x = two_sequences(100, 2000, rng_of(0), noise=0.2)
    assert abs(x.x[3:100].var() - 0.2) < 0.005 and abs((x.x[:3, :, 0] - (2 * x.target - 1)).var() - 0.2) < 0.01
    _, target, _, right = noisy_targets(100, 20_000, rng_of(0))
    assert abs((target - right).var() - 0.1) < 0.004 and abs((target - right).mean()) < 0.01


@quick
@given(seeds, st.sampled_from([20, 50, 100]), sizes, st.sampled_from([adding_problem_1997, multiplication_problem]))
def test_marked_numbers(seed, T, B, task):
    x, target, lengths, _ = task(T, B, rng_of(seed))
    low = -1 if task is adding_problem_1997 else 0
    for b, n in enumerate(lengths):
        numbers, marks = x[:n, b].T
        assert T <= n <= T + T // 10 and (x[n:, b] == 0).all() and (numbers >= low).all() and (numbers <= 1).all()
        assert marks[0] == marks[-1] == -1
        at = np.flatnonzero(marks == 1)
        assert len(at) in (1, 2) and at[0] < max(10, T // 2) and at[-1] < T // 2 and (marks[1:-1] >= 0).all()
        if len(at) == 2: assert at[0] < 10
        chosen = numbers[at]
        answer = 0.5 + chosen.sum() / 4 if task is adding_problem_1997 else chosen.prod()
        assert np.isclose(target[b, 0], answer)
        if len(at) == 1: assert numbers[0] == (0 if task is adding_problem_1997 else 1)  # the first pair was drawn


def test_first_pair_is_drawn_as_often_as_published():
    x = adding_problem_1997(100, 20_000, rng_of(0)).x
    once = (x[..., 1] == 1).sum(0) == 1
    assert abs(once.mean() - (0.1 + 0.9 / 49)) < 0.01 and (x[0, ~once, 0] != 0).all()


@quick
@given(seeds, st.sampled_from([2, 3]), sizes)
def test_noisy_temporal_order(seed, signals, B):
    x, target, lengths, _ = noisy_temporal_order(signals, B, rng_of(seed))
    spans = {2: [(10, 20), (50, 60)], 3: [(10, 20), (33, 43), (66, 76)]}[signals]
    for b, n in enumerate(lengths):
        text = "".join("XYabcdEB"[i] for i in read(x[:, b])[:n])
        assert 100 <= n <= 110 and text[0] == "E" and text[-1] == "B" and set(text[1:-1]) <= set("XYabcd")
        at = [t for t, s in enumerate(text) if s in "XY"]
        assert len(at) == signals and all(low <= t <= high for t, (low, high) in zip(at, spans))
        word = "".join(text[t] for t in at)
        assert target[b] == ["XX", "XY", "YX", "YY", "XXX", "XXY", "XYX", "XYY", "YXX", "YXY", "YYX", "YYY"].index(word) - (4 if signals == 3 else 0)


def test_every_place_and_class_comes():
    x, target, lengths, _ = noisy_temporal_order(3, 5000, rng_of(0))
    assert set(target) == set(range(8)) and set(lengths) == set(range(100, 111))
    assert set(np.flatnonzero(x[:, :, :2].any((1, 2)))) == {*range(10, 21), *range(33, 44), *range(66, 77)}


@pytest.mark.parametrize("task, message", [
    (lambda: reber_strings(-1, rng_of(0)), "count"), (lambda: continual_reber(5, 2.0, rng_of(0)), "batch_size"),
    (lambda: long_lag(1, 2, rng_of(0)), "lag: expected a whole number of at least 2"), (lambda: long_lag_noise(0, 5, 2, rng_of(0)), "lag"),
    (lambda: two_sequences(19, 2, rng_of(0)), "steps"), (lambda: adding_problem_1997(100, 0, rng_of(0)), "batch_size"),
    (lambda: noisy_temporal_order(4, 2, rng_of(0)), "signals: expected 2 or 3, got 4"),
    (lambda: two_sequences(20, 2, rng_of(0), informative=0), "informative: expected a whole number of at least 1, got 0"),
    (lambda: noisy_targets(20, 2, rng_of(0), informative=21), "informative: expected at most 20, got 21"),
    (lambda: two_sequences(20, 2, rng_of(0), noise=-0.1), "noise: expected a variance of at least 0, got -0.1"),
    (lambda: solve(PROBLEMS["2c"], "LSTM", rng=rng_of(0), most=19), "most: expected a whole number of at least 20, got 19"),
    (lambda: solve_continual("LSTM", rng=rng_of(0), most=999), "most: expected a whole number of at least 1000, got 999"),
])
def test_tasks_refuse_what_makes_no_sense(task, message):
    with pytest.raises(ValueError, match=message): task()


@pytest.mark.parametrize("task", [lambda r: reber_strings(1, r), lambda r: continual_reber(5, 1, r), lambda r: long_lag(5, 1, r), lambda r: long_lag_noise(5, 5, 1, r),
                                  lambda r: noisy_targets(20, 1, r), lambda r: multiplication_problem(20, 1, r), lambda r: noisy_temporal_order(2, 1, r)])
def test_tasks_take_a_generator_and_repeat_themselves(task):
    with pytest.raises(TypeError, match="rng: expected a numpy.random.Generator, got int"): task(0)
    before = np.random.get_state()[1].copy()
    first, second = task(rng_of(5)), task(rng_of(5))
    for a, b in zip(first, second): assert np.array_equal(a, b)
    assert (np.random.get_state()[1] == before).all()


# ---- the networks


def batch_for(every, seed=0):
    rng = rng_of(seed)
    lengths = np.array([4, 7, 1])
    x = rng.standard_normal((7, 3, 5))
    target = rng.integers(0, 3, (7, 3) if every else 3)
    return Batch(x, target, lengths, target)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("numbers", [False, True])
def test_gradients(network, every, numbers):
    batch = batch_for(every)
    if numbers: batch = batch._replace(target=rng_of(1).standard_normal((7, 3, 3) if every else (3, 3)))
    params = network_init(network, 5, 4, 3, longest=9, rng=rng_of(2), shortcut=every)
    if every: params["weight_xo"] = rng_of(3).standard_normal((3, 5))
    def loss(arrays):
        y, _, _ = network_forward(network, arrays["x"], arrays, lengths=batch.lengths, every=every)
        return answer_loss(y, batch)[0]
    y, _, tape = network_forward(network, batch.x, params, lengths=batch.lengths, every=every)
    grads = network_backward(answer_loss(y, batch)[1], tape)
    gradient_check(loss, {**params, "x": batch.x}, grads, tol=1e-6)


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_equal_pytorch(network):
    params = network_init(network, 5, 4, 3, longest=9, rng=rng_of(2), shortcut=True)
    params["weight_xo"] = rng_of(3).standard_normal((3, 5))
    layer = RNNLayer(5, 4, dtype=torch.float64) if network == "RNN" else LSTMLayer(5, 4, dtype=torch.float64, **NETWORKS[network][1])
    layer.cell.load_state_dict({name.removesuffix("_l0"): torch.from_numpy(p) for name, p in params.items() if name.endswith("_l0")})
    batch = batch_for(True)
    output, _ = layer(torch.from_numpy(batch.x), lengths=batch.lengths)
    expected = output.detach().numpy() @ params["weight_ho"].T + params["bias_ho"] + batch.x @ params["weight_xo"].T
    y, _, _ = network_forward(network, batch.x, params, lengths=batch.lengths, every=True)
    inside = np.arange(7)[:, None] < batch.lengths
    assert_parity(y[inside], expected[inside], tol=1e-12)
    end, _, _ = network_forward(network, batch.x, {k: v for k, v in params.items() if k != "weight_xo"}, lengths=batch.lengths)
    for b, n in enumerate(batch.lengths): assert_parity(end[b], output[n - 1, b].detach().numpy() @ params["weight_ho"].T + params["bias_ho"], tol=1e-12)


def test_shortcut_needs_an_answer_at_every_step():
    params = network_init("LSTM", 5, 4, 3, longest=9, rng=rng_of(0), shortcut=True)
    with pytest.raises(ValueError, match="weight_xo: expected none unless every=True, got \\(3, 5\\)"): network_forward("LSTM", batch_for(False).x, params)
    with pytest.raises(ValueError, match="network: expected one of 'RNN', .* got 'lstm'"): network_init("lstm", 5, 4, 3, longest=9, rng=rng_of(0))
    with pytest.raises(ValueError, match="network"): network_forward("lstm", batch_for(True).x, params, every=True)


def test_starts_that_remember():
    params = network_init("RNN", 2, 6, 1, longest=9, rng=rng_of(0))
    assert_parity(params["weight_hh_l0"] @ params["weight_hh_l0"].T, np.eye(6), tol=1e-12)
    bias = network_init("LSTM", 2, 400, 1, longest=100, rng=rng_of(0))["bias_ih_l0"]
    memory = 1 + np.exp(bias[400:800])  # steps: 1 / (1 - f)
    assert 2 <= memory.min() < 5 and 90 < memory.max() <= 100 and (bias[:400] == -bias[400:800]).all()
    bias = network_init("LSTM without forget gate", 2, 400, 1, longest=100, rng=rng_of(0))["bias_ih_l0"]
    assert len(bias) == 1200 and bias[:400].max() <= 0 and np.abs(bias[400:]).max() <= 0.05


# ---- criteria


def test_errors_of_classes_numbers_and_ranks():
    y = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]))
    batch = Batch(None, None, None, np.array([0, 1]))
    assert_parity(answer_errors(y, batch), np.array([0.3, 0.9]), tol=1e-12)
    both = np.stack([y, y[::-1]])  # (T, B, O)
    assert_parity(answer_errors(both, batch._replace(right=np.array([[0, 2], [2, 0]]))), np.array([0.3, 0.3]), tol=1e-12)
    assert_parity(answer_errors(both, batch), np.array([0.9, 0.8]), tol=1e-12)  # one class each: the last step alone
    assert_parity(answer_errors(np.array([[1.0], [2.0]]), batch._replace(right=np.array([[1.5], [2.0]]))), np.array([0.5, 0.0]))
    right = np.zeros((2, 2, 3), bool)
    right[0, :, 0] = right[1, :, 2] = True
    ranks = Batch(None, None, np.array([2, 1]), right)
    assert (answer_errors(both, ranks) == [0, 1]).all()
    tied = np.zeros((2, 2, 3))
    assert (answer_errors(tied, ranks) == [1, 1]).all()  # as active is not more active
    assert (answer_errors(both, ranks._replace(lengths=np.array([0, 0]))) == 0).all()  # nothing to be judged


def test_passed_counts_mistakes_and_looks_at_the_mean():
    problem = Problem(None, 1, 1, tolerance=0.2, recent=4, mistakes=1, mean_error=0.15)
    assert problem.passed([0.0, 0.1, 0.1, 0.3]) and not problem.passed([0.0, 0.0, 0.2, 0.2])
    assert not problem.passed([0.19, 0.19, 0.19, 0.19]) and not problem.passed([np.nan] * 4)


EASY = Problem(lambda B, rng: long_lag_noise(2, 2, B, rng), 2, 20, 0.2, 40, test=lambda rng: [long_lag_noise(2, 2, 50, rng)])


def test_solve_ends_when_the_criterion_is_met_and_gives_up_otherwise():
    first = solve(EASY, "LSTM", rng=rng_of(0), most=4000, units=8, progress=False)
    again = solve(EASY, "LSTM", rng=rng_of(0), most=4000, units=8, progress=False)
    assert first[0] == again[0] and 40 <= first[0] < 4000 and first[0] == 20 * len(first[2]["step"])
    assert all(np.array_equal(first[1][name], again[1][name]) for name in first[1])
    fresh = EASY.draw(500, rng_of(1))
    y, _, _ = network_forward("LSTM", fresh.x.astype(np.float32), first[1], lengths=fresh.lengths)
    assert (answer_errors(y, fresh) < 0.2).mean() > 0.97
    never, _, history = solve(EASY._replace(tolerance=0.0), "RNN", rng=rng_of(0), most=200, units=4, progress=False)
    assert never is None and len(history["step"]) == 10


def test_a_failed_test_starts_the_count_anew():
    tests = []
    def failing(rng):
        tests.append(1)
        return [EASY.draw(5, rng)._replace(right=np.full((5, 2), 9.0))]  # no answer is near 9
    lenient = EASY._replace(tolerance=1.1, test=failing)
    assert solve(lenient, "RNN", rng=rng_of(0), most=400, units=2, progress=False)[0] is None
    assert len(tests) == 10  # 40 sequences, two updates, are gathered before each test
    assert solve(lenient._replace(test=None), "RNN", rng=rng_of(0), most=400, units=2, progress=False)[0] == 40


def test_only_the_shortcut_learns_at_first():
    problem = PROBLEMS["2a"]._replace(draw=lambda B, rng: long_lag(6, B, rng), outputs=7, longest=6, alone=60)
    rng = rng_of(0)
    params = solve(problem, "LSTM", rng=rng, most=60, units=4, progress=False)[1]
    start = network_init("LSTM", 7, 4, 7, longest=6, rng=_after_one_draw(problem), shortcut=True, dtype=np.float32)
    assert all(np.array_equal(params[name], start[name]) == (name not in ("weight_xo", "bias_ho")) for name in params)
    later = solve(problem, "LSTM", rng=rng_of(0), most=80, units=4, progress=False)[1]
    assert not np.array_equal(later["weight_hh_l0"], start["weight_hh_l0"])


def _after_one_draw(problem):
    rng = rng_of(0)
    problem.draw(1, rng)
    return rng


def test_reber_problem_keeps_training_and_test_apart():
    problem = reber_problem(rng_of(0), count=30)
    (tested,) = problem.test(None)
    assert len(tested.lengths) == 60
    text = ["".join(SYMBOLS[i] for i in read(tested.x[:n, b])) for b, n in enumerate(tested.lengths)]
    assert not set(text[:30]) & set(text[30:])
    drawn = problem.draw(200, rng_of(1))
    assert {"".join(SYMBOLS[i] for i in read(drawn.x[:n, b])) for b, n in enumerate(drawn.lengths)} <= set(text[:30])


def test_problems_are_those_of_the_paper():
    assert list(PROBLEMS) == ["2a", "2b", "2c", "3a", "3b", "3c", "4", "5, rough", "5, fine", "6a", "6b"]
    for name, problem in PROBLEMS.items():
        batch = problem.draw(3, rng_of(0))
        assert problem.every == (batch.target.ndim == 2 and batch.target.dtype.kind == "i"), name
        assert batch.lengths.max() <= problem.longest + 60 and 50 < batch.lengths.min()
        if problem.every or batch.target.ndim == 1: assert batch.target.max() < problem.outputs
        else: assert problem.outputs == 1
    assert len(PROBLEMS["2c"].test(rng_of(0))) == 10 and len(PROBLEMS["3a"].test(rng_of(0))[0].lengths) == 256
    assert long_lags.PROBLEMS["3b"].draw(2000, rng_of(0)).x[0].std() > 1.05  # with noise on the signal


# ---- the stream


def perfect(monkeypatch, spoil=lambda y, start: y):
    "A network that answers as the grammar does."
    def forward(network, x, params, state=None, *, lengths=None, every=False):
        start = 0 if state is None else state
        right = params["right"][start:start + len(x)]
        return spoil(np.where(right, 0.0, -9.0), start), start + len(x), None
    monkeypatch.setattr(long_lags, "network_forward", forward)


def test_error_free_counts_up_to_the_first_mistake(monkeypatch):
    right = continual_reber(2500, 3, rng_of(4)).right
    perfect(monkeypatch)
    assert (error_free("LSTM", {"right": right}, rng_of(4), streams=3, symbols=2500) == 2500).all()
    def spoil(y, start):
        for b, t in ((0, 1700), (0, 2100), (2, 3)):
            if start <= t < start + len(y): y[t - start, b] = y[t - start, b] * -1
        return y
    perfect(monkeypatch, spoil)
    assert (error_free("LSTM", {"right": right}, rng_of(4), streams=3, symbols=2500) == [1700, 2500, 3]).all()
    perfect(monkeypatch, lambda y, start: y * 0.01)  # the right ones on top, but by a hair: their error is too large
    assert (error_free("LSTM", {"right": right}, rng_of(4), streams=3, symbols=2500) < 10).all()


def test_streams_carry_on_and_begin_anew():
    pieces = long_lags._streams(2, 100, 50, rng_of(0))
    (a, new_a), (b, new_b), (c, new_c) = next(pieces), next(pieces), next(pieces)
    assert (new_a, new_b, new_c) == (True, False, True) and a.x.dtype == np.float32
    assert (read(b.x)[0] == a.target[-1]).all()
    assert (read(c.x)[0] == SYMBOLS.index("B")).all() and (read(a.x)[0] == SYMBOLS.index("B")).all()


def test_the_state_is_carried_through_a_stream_and_no_further(monkeypatch):
    states, forward = [], long_lags.network_forward
    def spy(network, x, params, state=None, **options):
        states.append(state)
        return forward(network, x, params, state, **options)
    monkeypatch.setattr(long_lags, "network_forward", spy)
    solve_continual("LSTM", rng=rng_of(0), most=2200, units=4, batch_size=1, progress=False)
    assert len(states) == 44 and [k for k, state in enumerate(states) if state is None] == [0, 20, 40]  # 20 pieces of 50 a stream
    assert all(np.abs(state[0]).max() > 0 for state in states if state is not None)


def test_solve_continual_gives_up():
    symbols, params = solve_continual("LSTM", rng=rng_of(0), most=3000, units=4, batch_size=2, progress=False)
    assert symbols is None and params["weight_hh_l0"].shape == (16, 4) and params["weight_xo"].any()
