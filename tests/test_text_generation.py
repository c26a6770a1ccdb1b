"""Chapter 40: open brackets against `tokenize`, the text model in NumPy and PyTorch, its files, and the command `rnnbook-text`."""
import io
import math
import os
import signal
import subprocess
import sys
import time
import tokenize
from pathlib import Path

import numpy as np
import pytest
import torch
from test_character_model import some_text

from rnnbook.character_model import char_init, char_loss, load_model, ngram_fit, ngram_probabilities, save_model
from rnnbook.datasets import python_source
from rnnbook.rnn import numpy_params
from rnnbook.sequences import Vocabulary
from rnnbook.testing import assert_parity, gradient_check
from rnnbook.text_generation import _check_learned, DROPOUT, TextModel, bracket_depth, main, text_forward, text_init, text_loss

CELLS = "rnn", "lstm", "gru"


# ---- the brackets


def test_brackets_are_those_of_tokenize():
    source = python_source()[1]
    lines = np.cumsum([0, *map(len, source.splitlines(keepends=True))])
    steps = np.zeros(len(source), np.int64)
    for kind, words, (row, column), *_ in tokenize.generate_tokens(io.StringIO(source).readline):
        if kind == tokenize.OP and words in "()[]{}": steps[lines[row - 1] + column] += 1 if words in "([{" else -1
    depth, _ = bracket_depth(source)
    assert (np.diff(depth, prepend=0) != 0).sum() > 2000
    assert (np.diff(depth, prepend=0) != steps).sum() <= 20  # since Python 3.12 brackets inside f-strings are tokens of their own


@pytest.mark.parametrize("source, depths, distances", [
    ("", "", ""), ("(a)", "110", "010"), ("f([])", "01210", "00020"), (")(", "01", "00"), ("('(')", "11110", "01230"), ('("\\")")', "1111110", "0123450"),
    ("#(\n(", "0001", "0000"), ("\"\"\"(\n\"(\"\"\"(", "00000000001", "00000000000"), ("('(\n)", "11221", "01014"),
])
def test_brackets_by_hand(source, depths, distances):
    depth, since = bracket_depth(source)
    assert depth.dtype == since.dtype == np.int64
    assert "".join(map(str, depth)) == depths and "".join(map(str, since)) == distances


# ---- the model


def problem(cell, layers=1, T=6, B=3, V=7, H=5, seed=0):
    "Parameters, a batch and a state of a small text model in float64."
    rng = np.random.default_rng([seed, layers])
    params = text_init(cell, V, H, num_layers=layers, rng=rng, dtype=np.float64)
    state = [rng.standard_normal((layers, B, H)) for _ in range(2 if cell == "lstm" else 1)]
    return params, rng.integers(0, V, (2, T, B)), tuple(state) if cell == "lstm" else state[0]


def tensors(tree): return tuple(map(tensors, tree)) if isinstance(tree, tuple) else torch.from_numpy(tree)


def model_of(params, **options): return TextModel.from_numpy(params, Vocabulary("abcdefgh"[:len(params["bias_ho"])]), **options)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layers, zoneout", [(1, 0.0), (3, 0.0), (2, 0.3)])
def test_numpy_and_torch_agree(cell, layers, zoneout):
    params, batch, state = problem(cell, layers)
    loss, grads, final = text_loss(params, batch, state, cell=cell, zoneout=zoneout)
    model = model_of(params, cell=cell, zoneout=zoneout).eval()  # where zoneout is an expectation
    torch_loss, torch_final = model.loss(tensors(tuple(batch)), tensors(state))
    torch_loss.backward()
    assert_parity((torch_loss, torch_final), (np.array(loss), final), tol=1e-12)
    for name, p in zip(numpy_params(model), model.parameters(), strict=True): assert_parity(p.grad, grads[name], tol=1e-9, name=name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none")
@pytest.mark.parametrize("cell", CELLS)
def test_cuda_agrees_with_numpy(cell):
    params, batch, state = problem(cell, 2, 20, 4)
    loss, grads, final = text_loss(params, batch, state, cell=cell)
    model = model_of(params, cell=cell).cuda()
    move = lambda tree: tuple(map(move, tree)) if isinstance(tree, tuple) else tree.cuda()
    torch_loss, torch_final = model.loss(move(tensors(tuple(batch))), move(tensors(state)))
    torch_loss.backward()
    assert_parity((torch_loss, torch_final), (np.array(loss), final), tol=1e-10)
    for name, p in zip(numpy_params(model), model.parameters(), strict=True): assert_parity(p.grad, grads[name], tol=1e-10, name=name)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("chances", [{}, dict(dropout=0.4), dict(zoneout=0.5), dict(dropout=0.2, zoneout=0.2)])
def test_gradients_under_masks(cell, chances):
    params, batch, state = problem(cell, 2, T=4, B=2, H=3)
    def loss(params): return text_loss(params, batch, state, cell=cell, rng=np.random.default_rng(4), **chances)
    gradient_check(lambda at: loss(at)[0], params, {name: g for name, g in loss(params)[1].items() if name in params})


def test_one_layer_of_the_simple_cell_is_the_character_model():
    params, one = char_init(7, 5, rng=np.random.default_rng(1), dtype=np.float64), text_init("rnn", 7, 5, rng=np.random.default_rng(1), dtype=np.float64)
    _, batch, state = problem("rnn")
    assert all((params[name] == one[name]).all() for name in params)
    loss, grads, final = text_loss(one, batch, state, cell="rnn")
    old_loss, old_grads, old_final = char_loss(params, batch, state)
    assert_parity((np.array(loss), final, grads), (np.array(old_loss), old_final, {name: old_grads[name] for name in grads}))


def test_dropout_leaves_the_state_alone():
    params, (x, _), state = problem("lstm")
    plain, final, _ = text_forward(x, params, state)
    dropped, same, _ = text_forward(x, params, state, dropout=0.5, rng=np.random.default_rng(0))
    assert_parity(same, final)
    assert np.abs(plain - dropped).max() > 0.01
    assert_parity(text_forward(x, params, state, dropout=0.5)[0], plain)  # without a generator nothing is dropped
    mean = np.mean([text_forward(x, params, state, dropout=0.5, rng=np.random.default_rng(k))[0] for k in range(2000)], 0)
    assert np.abs(mean - plain).max() < 0.1 * np.abs(plain).max()


def test_zoneout_keeps_the_share_it_says():
    params, (x, _), state = problem("lstm", T=1, B=200, H=50)
    _, final, _ = text_forward(x, params, state, zoneout=0.3, rng=np.random.default_rng(0))
    for new, old in zip(final, state): assert 0.27 < (new == old).mean() < 0.33
    assert ((final[0] == state[0]) & (final[1] == state[1])).mean() < 0.12  # h and c are drawn each for itself


def test_initial_weights():
    params = text_init("lstm", 40, 30, num_layers=2, rng=np.random.default_rng(0))
    for k in (0, 1):
        for gate in np.split(params[f"weight_hh_l{k}"].astype(np.float64), 4): assert_parity(gate @ gate.T, np.eye(30), tol=1e-5)
        bias = params[f"bias_ih_l{k}"] + params[f"bias_hh_l{k}"]
        assert (bias[30:60] == 1).all() and bias.sum() == 30
    assert 1.9 < params["weight_ih_l0"].std() < 2.1 and params["weight_ih_l1"].std() < 0.2
    assert all(p.dtype == np.float32 for p in params.values())


def test_no_random_numbers_are_drawn_and_nothing_is_shared():
    params, *_ = problem("gru")
    before = torch.get_rng_state()
    model = model_of(params, cell="gru")
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad(): model.layer.weight_hh_l0.zero_()
    assert params["weight_hh_l0"].any()


def test_an_unknown_cell_is_named():
    with pytest.raises(ValueError, match="cell: expected one of rnn, lstm, gru, got 'elman'"): TextModel(Vocabulary("ab"), 3, cell="elman")


def test_what_does_not_fit_is_named():
    params, few = text_init("gru", 7, 5, rng=np.random.default_rng(0)), Vocabulary("abcdefg")
    model = model_of(params, cell="gru")
    with pytest.raises(ValueError, match=r"weight_ih_l0: expected \(20, 7\), got \(15, 7\)"): TextModel.from_numpy(params, few, cell="lstm")
    with pytest.raises(ValueError, match=r"bias_ho: expected \(7,\), got none"): model.load_numpy_({k: p for k, p in params.items() if k != "bias_ho"})
    with pytest.raises(ValueError, match="zoneout: expected a probability from 0 to 1, got 1.5"):
        text_forward(np.zeros((3, 2), int), params, cell="gru", zoneout=1.5, rng=np.random.default_rng(0))


@pytest.mark.parametrize("cell, zoneout", [("rnn", 0.0), ("lstm", 0.0), ("gru", 0.2)])
def test_bits_and_writing_are_those_of_the_module(cell, zoneout):
    params, *_ = problem(cell, 2)
    model = model_of(params, cell=cell, zoneout=zoneout, dropout=0.3).eval()
    text = "abcdefgabcagfe"
    ids = torch.from_numpy(model.vocabulary.encode(text))[:, None]
    with torch.no_grad(): nats, _ = model.loss((ids[:-1], ids[1:]))
    assert_parity(model.train().bits(text), nats.item() / math.log(2), tol=1e-12)  # as in evaluation, in any mode
    model.eval()
    written = model.write("ab", 9, temperature=0, rng=np.random.default_rng(0))
    for n in range(9):
        with torch.no_grad(): logits, _ = model(torch.from_numpy(model.vocabulary.encode("ab" + written[:n]))[:, None])
        assert written[n] == model.vocabulary.decode([int(logits[-1, 0].argmax())])


# ---- its files


@pytest.mark.parametrize("cell", CELLS)
def test_saved_is_loaded(tmp_path, cell):
    params, *_ = problem(cell, 2)
    model_of(params, cell=cell, dropout=0.1, zoneout=0.2).save(tmp_path / "m", seed=3)
    loaded = TextModel.load(tmp_path / "m")
    assert loaded.options == {"cell": cell, "dropout": 0.1, "zoneout": 0.2} and loaded.about == loaded.options | {"seed": 3}
    assert loaded.layer.num_layers == 2 and loaded.vocabulary.tokens == Vocabulary("abcdefg").tokens
    assert all((numpy_params(loaded)[name] == p).all() for name, p in params.items())


BEFORE = Path(__file__).parent / "data" / "rnnbook-text-0.1.model"  # as `rnnbook-text train` wrote it before it knew of cells


def test_a_model_saved_before_is_loaded_and_writes(tmp_path, capsys):
    model = TextModel.load(BEFORE)
    assert model.options == {"cell": "rnn", "dropout": 0.0, "zoneout": 0.0} and model.layer.num_layers == 1
    assert model.about == {"hidden": 8, "lr": 0.01, "seed": 0, "backend": "torch", "steps": 300}
    assert main(["sample", str(BEFORE), "--prompt", "the n", "--length", "60", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "the next les and les and les and les and les and les and les and \n"  # what it wrote then
    assert round(model.bits(some_text()[-600:]), 3) < 1.9
    model.save(tmp_path / "again")
    assert TextModel.load(tmp_path / "again").options == model.options


def test_a_character_model_is_loaded_as_a_simple_cell(tmp_path):
    params = char_init(3, 4, rng=np.random.default_rng(0))
    save_model(tmp_path / "m", params, Vocabulary("abc"), {})
    assert TextModel.load(tmp_path / "m").options["cell"] == "rnn"
    TextModel.from_numpy(text_init("gru", 3, 4, rng=np.random.default_rng(0)), Vocabulary("abc"), cell="gru").save(tmp_path / "g")
    with pytest.raises(ValueError, match=r"weight_hh_l0: expected \(12, 12\), got \(12, 4\)"): load_model(tmp_path / "g")


@pytest.mark.parametrize("options, remove, message", [
    ({"cell": "elman"}, None, "cell: expected one of rnn, lstm, gru, got 'elman'"),
    ({"cell": "gru"}, None, "weight_ho: expected"),
    ({"cell": "lstm"}, "bias_ih_l1", "bias_ih_l1"),
    ({}, None, "weight_ho: expected"),
])
def test_weights_that_do_not_fit_are_no_model(tmp_path, options, remove, message):
    params = text_init("lstm", 3, 4, num_layers=2, rng=np.random.default_rng(0))
    params.pop(remove, None)
    save_model(tmp_path / "m", params, Vocabulary("abc"), options)
    with pytest.raises(ValueError, match=message): TextModel.load(tmp_path / "m")


# ---- the command


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A folder of its own with a text in it."
    (tmp_path / "text.txt").write_text(some_text(), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SMALL = "--hidden 24 --steps 40 --device cpu".split()


def command(line, *more): return main([*line.split(), *more])


@pytest.mark.parametrize("kind", ["--cell rnn", "--cell lstm --backend numpy", "--cell gru --layers 2 --dropout 0.1", "--zoneout 0.1 --backend numpy", "--zoneout 0.1"])
def test_train_and_sample(folder, capsys, kind):
    assert command(f"train text.txt --out m --lr 0.02 --hidden 24 --steps 80 --device cpu {kind}") == 0
    printed = capsys.readouterr()
    assert "6,000 characters" in printed.out and "the last 600 are held out" in printed.out and "80 steps" in printed.out
    assert "80/80" in printed.err  # the progress bar
    bits = [float(line.split(":")[1].split()[0]) for line in printed.out.splitlines()[-2:]]
    model = TextModel.load("m")
    ids = model.vocabulary.encode(some_text())
    assert bits[0] == round(model.bits(some_text()[-600:]), 3) < math.log2(len(model.vocabulary)) - 0.7
    assert bits[1] == round((-np.log2(ngram_probabilities(ngram_fit(ids[:-600], len(model.vocabulary)), ids[-600:])[:, 1:])).mean(1).min(), 3)
    told = dict(zip(*[iter(kind.replace("--", "").split())] * 2))
    expected = dict(cell="lstm", layers=1, dropout=DROPOUT, zoneout=0.0, backend="torch") | {
        name: type(dict(layers=1, dropout=0.0, zoneout=0.0).get(name, ""))(word) for name, word in told.items()}
    assert model.about == expected | {"hidden": 24, "lr": 0.02, "seed": 0, "steps": 80}
    assert command("sample m --length 60 --prompt", "the n") == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("the n") and len(printed.out) == 5 + 60 + 1 and not printed.err


def test_same_seed_same_model(folder):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)): assert command(f"train text.txt --out {out} --seed {seed}", *SMALL) == 0
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes() != (folder / "c").read_bytes()


@pytest.mark.parametrize("cell", CELLS)
def test_both_backends_train_the_same_model(folder, cell):
    for backend in ("torch", "numpy"): assert command(f"train text.txt --out {backend} --cell {cell} --dropout 0 --backend {backend}", *SMALL) == 0
    assert_parity(*(numpy_params(TextModel.load(backend)) for backend in ("torch", "numpy")), tol=5e-3)  # 40 steps in float32


def test_sample_has_a_seed_and_a_temperature(folder, capsys):
    command("train text.txt --out m", *SMALL)
    capsys.readouterr()
    def written(options):
        assert command("sample m --length 50 " + options) == 0
        return capsys.readouterr().out
    assert written("--seed 1") == written("--seed 1") != written("--seed 2")
    assert written("--seed 1 --temperature 0") == written("--seed 2 --temperature 0")


def test_seconds_end_a_run(folder, capsys):
    start = time.perf_counter()
    assert command("train text.txt --out m --seconds 0.3 --hidden 16 --device cpu") == 0
    assert time.perf_counter() - start < 30 and TextModel.load("m").about["steps"] > 1


def test_force_replaces(folder):
    (folder / "m").write_text("precious")
    assert command("train text.txt --out m --force", *SMALL) == 0
    TextModel.load("m")


@pytest.mark.parametrize("line, message", [
    ("train absent.txt --out m", "absent.txt: there is no such file"),
    ("train . --out m", "there is no such file"),
    ("train latin.txt --out m", "latin.txt: expected UTF-8"),
    ("train short.txt --out m", "short.txt: expected at least 1000 characters, got 999"),
    ("train text.txt --out there", "--out there: this file exists; choose another name, or add --force"),
    ("train text.txt --out no/m", "--out no/m: expected a file's name, in a folder that exists"),
    ("train text.txt --out . --force", "--out .: expected a file's name"),
    ("train text.txt --out m --device nowhere", "--device nowhere: there is no such device here; --device cpu always works"),
    ("train text.txt --out m --device cuda --backend numpy", "--backend numpy trains on the cpu only"),
    ("sample absent", "absent: there is no such file"),
    ("sample text.txt", "text.txt: expected a model saved by rnnbook-text"),
    ("sample model --prompt xay", "--prompt: the model has never seen 'x', 'y'; it knows '\\nabä'"),
])
def test_errors_say_what_to_do(folder, capsys, line, message):
    (folder / "latin.txt").write_bytes(("ä" * 2000).encode("latin-1"))
    (folder / "short.txt").write_text("a" * 999)
    (folder / "there").write_text("precious")
    save_model("model", char_init(4, 3, rng=np.random.default_rng(0)), Vocabulary("\nabä"), {})
    files = sorted(os.listdir())
    assert command(line) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("rnnbook-text: ") and message in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert sorted(os.listdir()) == files and (folder / "there").read_text() == "precious"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_cuda_says_what_to_do(folder, capsys):
    assert command("train text.txt --out m --device cuda") == 1
    assert "--device cpu always works" in capsys.readouterr().err


@pytest.mark.parametrize("line", [
    "", "train", "train text.txt", "write m", "train text.txt --out m --steps 0", "train text.txt --out m --steps 1.5", "train text.txt --out m --seconds inf",
    "train text.txt --out m --hidden -3", "train text.txt --out m --backend jax", "train text.txt --out m --cell elman", "train text.txt --out m --layers 0",
    "train text.txt --out m --dropout 1", "train text.txt --out m --zoneout -0.1", "train text.txt --out m --zoneout x", "sample m --temperature -1", "sample m --temperature nan", "sample m --length x",
])
def test_wrong_options_exit_with_2(folder, capsys, line):
    with pytest.raises(SystemExit) as stop: command(line)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "usage: rnnbook-text" in said
    if "--steps" in line: assert "--steps: expected a whole number above 0, got" in said


def test_a_run_that_diverges_says_so(folder, capsys):
    with np.errstate(all="ignore"):
        assert command("train text.txt --out m --lr 1e40 --backend numpy", *SMALL) == 1
    assert "step" in capsys.readouterr().err and not (folder / "m").exists()


@pytest.mark.parametrize("kind", ["--lr 1e9", "--lr 1e9 --cell rnn", "--lr 10 --cell gru", "--lr 30 --backend numpy"])
def test_a_run_that_learned_nothing_says_so(folder, capsys, kind):
    (folder / "m").write_text("precious")
    with np.errstate(all="ignore"): assert command(f"train text.txt --out m --force {kind}", *SMALL) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("rnnbook-text: --lr: nothing was learned, and nothing is saved; the loss went from ") and "guessing among the 24 characters costs 4.58" in said
    assert (folder / "m").read_text() == "precious" and os.listdir(folder).count("m") == 1


@pytest.mark.parametrize("losses, sound", [
    ([3.0, *[2.0] * 98, 1.0], True), (np.linspace(3, 2.9, 50), True), (np.linspace(2.9, 3, 50), False), (np.linspace(9, 3.3, 50), False),
    (np.linspace(2, 9, 19), True), ([], True), ([*np.linspace(3, 1, 60), *np.linspace(1, 3.3, 40)], False),
])
def test_what_counts_as_learned(losses, sound):
    if sound: return _check_learned(list(losses), 24)  # log 24 = 3.18
    with pytest.raises(ValueError, match="nothing was learned"): _check_learned(list(losses), 24)


@pytest.mark.skipif(os.name == "nt", reason="signals of a POSIX system")
@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_interruption_saves(folder, backend):
    words = ["train", "text.txt", "--out", "m", "--hidden", "16", "--seconds", "300", "--device", "cpu", "--backend", backend]
    code = "import sys; from rnnbook.text_generation import main; sys.exit(main())"
    with open("shown", "wb") as shown:
        process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=shown, text=True)
        try:
            deadline = time.monotonic() + 60
            while b"step 5" not in (folder / "shown").read_bytes() and time.monotonic() < deadline: time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=60)
        finally: process.kill()
    assert process.returncode == 130 and "stopped early" in out and "held-out bits per character" in out
    assert TextModel.load("m").about["steps"] >= 5 and not [name for name in os.listdir() if name.startswith(".")]
