"""Sequences: vocabularies, one-hot vectors, streams and windows, padding, lengths and masks, and their errors."""
import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, strategies as st
from torch.nn.utils.rnn import pack_padded_sequence

from rnnbook.sequences import Vocabulary, length_mask, one_hot, pad_sequences, stream_batches, window_batches

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
sizes = st.integers(1, 7)
cuts = dict(N=st.integers(2, 200), B=sizes, T=sizes)


# ---- Vocabulary


@given(text=texts)
def test_decode_undoes_encode(text):
    vocabulary = Vocabulary.from_text(text)
    ids = vocabulary.encode(text)
    assert ids.dtype == np.int64 and ids.shape == (len(text),)
    assert vocabulary.decode(ids) == text
    assert list(vocabulary.tokens) == sorted(vocabulary.tokens) and len(vocabulary) == len(set(text))


@given(text=texts, before=texts)
def test_unknown_character_is_named_with_its_offset(text, before):
    known = Vocabulary.from_text(before)
    unknown = [(offset, c) for offset, c in enumerate(text) if c not in known.tokens]
    assume(unknown)
    with pytest.raises(ValueError) as error:
        known.encode(text)
    offset, c = unknown[0]
    assert f"{c!r} at offset {offset}" in str(error.value) and error.value.__cause__ is None


def test_vocabulary_takes_what_holds_ids():
    vocabulary = Vocabulary("abc")
    assert vocabulary.tokens == ("a", "b", "c")
    for ids in ([2, 0], (2, 0), np.array([2, 0], np.uint8), torch.tensor([2, 0]), np.array([[9, 2], [9, 0]])[:, 1]):
        assert vocabulary.decode(ids) == "ca"
    assert vocabulary.decode([]) == "" and vocabulary.encode("").shape == (0,)
    assert Vocabulary(["to", "be"]).decode(Vocabulary(["to", "be"]).encode(["be", "to"])) == "beto"
    assert hash(vocabulary) == hash(Vocabulary(["a", "b", "c"])) and vocabulary != Vocabulary("acb")


@pytest.mark.parametrize("ids, error, match", [
    ([3], ValueError, "ids: expected values from 0 to 2, got 3"), ([0, -1], ValueError, "got -1"),
    ([1.0], TypeError, "ids: expected integers, got float64"), ([True], TypeError, "got bool"), ([[0, 1]], ValueError, "1 dimension"),
])
def test_decode_refuses(ids, error, match):
    with pytest.raises(error, match=match):
        Vocabulary("abc").decode(ids)


def test_a_token_twice_is_refused():
    with pytest.raises(ValueError, match="tokens: expected each once"):
        Vocabulary("abca")


# ---- One-hot


@given(shape=st.lists(st.integers(0, 4), max_size=3), size=st.integers(1, 9), seed=st.integers(0, 99))
def test_one_hot_equals_torch_and_gathers(shape, size, seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, size, shape)
    vectors = one_hot(ids, size)
    assert vectors.shape == (*shape, size) and vectors.dtype == np.float64
    assert (vectors == torch.nn.functional.one_hot(torch.from_numpy(np.asarray(ids)), size).numpy()).all()
    W = rng.standard_normal((3, size))
    assert (vectors @ W.T == W.T[ids]).all()


def test_one_hot_dtype_and_tensor():
    assert one_hot(torch.tensor([[1, 0]]), 2, np.float32).dtype == np.float32
    assert one_hot([1], 3, bool).tolist() == [[False, True, False]]
    assert one_hot(2, 3).tolist() == [0, 0, 1]
    for wrong, error in (([3], ValueError), ([-1], ValueError), ([0.0], TypeError)):
        with pytest.raises(error, match="ids: expected"):
            one_hot(wrong, 3)


# ---- Streams and windows


@given(**cuts)
def test_streams_cover_the_text_in_order(N, B, T):
    assume(N > B)
    ids = np.arange(N) + 1000
    batches = list(stream_batches(ids, B, T, drop_last=False))
    x, y = (np.concatenate(part) for part in zip(*batches))
    length = (N - 1) // B
    assert x.dtype == y.dtype == np.int64 and all(part.flags.c_contiguous for part in batches[0])
    assert (x.T.ravel() == ids[:B * length]).all() and (y.T.ravel() == ids[1:B * length + 1]).all()
    assert all(len(x) == T for x, _ in batches[:-1]) and 1 <= len(batches[-1][0]) <= T
    if length >= T:
        whole = list(stream_batches(ids, B, T))
        assert len(whole) == length // T
        assert all((a == c).all() and (b == d).all() and a.shape == b.shape == (T, B) for (a, b), (c, d) in zip(whole, batches))


@given(**cuts, seed=st.integers(0, 99))
def test_windows_are_pieces_of_the_text(N, B, T, seed):
    assume(N > T)
    ids = np.arange(N) + 1000
    for x, y in itertools.islice(window_batches(ids, B, T, np.random.default_rng(seed)), 3):
        assert x.shape == y.shape == (T, B) and x.dtype == y.dtype == np.int64
        assert (x == x[:1] + np.arange(T)[:, None]).all() and (y == x + 1).all()
        assert 1000 <= x.min() and y.max() < 1000 + N


def test_windows_reach_both_ends_and_repeat_with_the_seed():
    x, y = (np.stack(part) for part in zip(*itertools.islice(window_batches(np.arange(8), 4, 5, np.random.default_rng(0)), 50)))
    assert set(x[:, 0].ravel()) == {0, 1, 2} and x.min() == 0 and y.max() == 7
    a, b = (next(window_batches(np.arange(99), 4, 5, rng)) for rng in (7, np.random.default_rng(7)))
    assert (a[0] == b[0]).all()


def test_batches_leave_the_text_alone():
    ids = np.arange(21)
    for batches in (stream_batches(ids, 1, 5), stream_batches(ids, 4, 5), window_batches(ids, 1, 20, 0)):
        x, y = next(iter(batches))
        x[:], y[:] = -1, -1
    assert (ids == np.arange(21)).all()
    state = np.random.get_state()[1].copy()
    next(window_batches(ids, 2, 3, 0))
    assert (np.random.get_state()[1] == state).all()


@pytest.mark.parametrize("cut", [lambda ids, B, T: stream_batches(ids, B, T), lambda ids, B, T: window_batches(ids, B, T, 0)])
@pytest.mark.parametrize("ids, B, T, error, match", [
    (np.arange(3), 2, 9, ValueError, "ids: expected at least"), (np.zeros((4, 4), int), 1, 1, ValueError, "ids: expected 1 dimension"),
    (np.zeros(9), 1, 1, TypeError, "ids: expected integers, got float64"), (np.arange(9), 0, 1, ValueError, "batch_size: expected at least 1, got 0"),
    (np.arange(9), 1, 0, ValueError, "steps: expected at least 1, got 0"), ([], 1, 1, ValueError, "ids: expected at least 2"),
])
def test_cuts_refuse_at_the_call(cut, ids, B, T, error, match):
    with pytest.raises(error, match=match):
        cut(ids, B, T)


@given(B=sizes, T=sizes)
def test_the_shortest_text_that_will_do(B, T):
    assert len(list(stream_batches(np.arange(B * T + 1), B, T))) == 1
    assert next(window_batches(np.arange(T + 1), B, T, 0))[1].shape == (T, B)
    with pytest.raises(ValueError, match=f"at least {B * T + 1} .* got {B * T}"):
        stream_batches(np.arange(B * T), B, T)
    with pytest.raises(ValueError, match=f"at least {T + 1} .* got {T}"):
        window_batches(np.arange(T), B, T, 0)


# ---- Padding, lengths, masks


@given(lengths=st.lists(st.integers(0, 6), max_size=6), width=st.integers(0, 2), value=st.sampled_from([0, -1, 7]))
def test_pad_and_mask(lengths, width, value):
    rng = np.random.default_rng(sum(lengths))
    rows = [rng.integers(10, 99, (n, *[3] * width)) for n in lengths]
    padded, found = pad_sequences(rows, value)
    assert found.dtype == np.int64 and found.tolist() == lengths
    assert padded.shape[:2] == (max(lengths, default=0), len(lengths))
    mask = length_mask(found, len(padded))
    assert mask.shape == padded.shape[:2] and mask.dtype == bool and mask.sum() == sum(lengths)
    assert (padded[~mask] == value).all()
    assert all((padded[:n, b] == row).all() for b, (n, row) in enumerate(zip(lengths, rows)))
    assert (np.diff(mask.astype(int), axis=0) <= 0).all()  # once past its end, a sequence stays there


def test_padding_keeps_the_type():
    assert pad_sequences([[1, 2], []])[0].dtype == np.int64
    assert pad_sequences([np.zeros((2, 3), np.float32), []])[0].shape == (2, 2, 3)
    assert pad_sequences([np.zeros(2, np.float32)], value=-1.5)[0].dtype == np.float32
    assert np.isnan(pad_sequences([[0.5], [0.5, 1.0]], value=np.nan)[0][1, 0])
    assert pad_sequences([torch.tensor([1, 2]), torch.tensor([3])])[0].tolist() == [[1, 3], [2, 0]]
    assert pad_sequences([])[0].shape == (0, 0) and pad_sequences([[], []])[0].shape == (0, 2)


@pytest.mark.parametrize("sequences, value, error, match", [
    ([[1, 2]], 0.5, TypeError, "value: expected int64 like the sequences, got 0.5"),
    ([[1], np.zeros((2, 3))], 0, ValueError, r"sequences\[1\]"), ([1, 2], 0, ValueError, "sequences: expected a list of sequences"),
])
def test_padding_refuses(sequences, value, error, match):
    with pytest.raises(error, match=match):
        pad_sequences(sequences, value)


@pytest.mark.parametrize("lengths, error, match", [
    ([5], ValueError, "lengths: expected values from 0 to 4, got 5"), ([-1], ValueError, "got -1"),
    ([1.0], TypeError, "lengths: expected integers"), ([[1]], ValueError, "lengths: expected 1 dimension"), (3, ValueError, "1 dimension"),
])
def test_mask_refuses(lengths, error, match):
    with pytest.raises(error, match=match):
        length_mask(lengths, 4)


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_mask_is_torchs_packing(lengths):
    x = np.random.default_rng(0).standard_normal((6, len(lengths), 2))
    order = np.argsort(-np.array(lengths), kind="stable")
    mask = length_mask(torch.tensor(lengths), 6)
    packed = pack_padded_sequence(torch.from_numpy(x), torch.tensor(lengths), enforce_sorted=False)
    assert packed.batch_sizes.tolist() == [n for n in mask.sum(1) if n]
    # torch breaks ties among equal lengths in its own way, so its order is used for the contents
    order = packed.sorted_indices.numpy()
    assert (packed.data.numpy() == x[:, order][mask[:, order]]).all()
