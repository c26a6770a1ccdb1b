"""Data sets: reading text, the registry by hand and by download (from this machine only), loaders, the two corpora that Python brings along."""
import hashlib
import http.server
import sys
import threading
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from rnnbook import datasets
from rnnbook.datasets import DATASETS, Dataset, english_prose, fetch, load, load_pairs, load_piano_rolls, python_source, read_text
from rnnbook.sequences import Vocabulary

HERE = "http://localhost"


@pytest.fixture(autouse=True)
def no_folder_and_no_proxy(request, monkeypatch):
    "Tests start without RNNBOOK_DATA, unless they ask for the real one, and reach this machine directly."
    if "real" not in request.fixturenames:
        monkeypatch.delenv("RNNBOOK_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "localhost")
    monkeypatch.setenv("no_proxy", "localhost")


def entry(monkeypatch, data, url, filename="sub/little.txt", loader=read_text):
    "Register a data set `little` with the checksum of `data`."
    dataset = Dataset(filename, url, hashlib.sha256(data).hexdigest(), "a test", "CC0", "a little text", loader)
    monkeypatch.setitem(DATASETS, "little", dataset)
    return dataset


# ---- Reading text


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_read_text_returns_what_was_written(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    expected = text.removeprefix("\ufeff").replace("\r\n", "\n")
    if expected:
        assert read_text(path) == read_text(str(path)) == expected
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_text(path) == text.replace("\r\n", "\n")


@pytest.mark.parametrize("raw, text", [
    (b"a\r\nb\r\n", "a\nb\n"), (b"a\nb", "a\nb"), (b"a\rb", "a\rb"), (b"\xef\xbb\xbfa", "a"), (b"a\xef\xbb\xbf", "a\ufeff"), (b"\x0c\x00", "\x0c\x00"),
])
def test_line_ends_and_byte_order_mark(raw, text, tmp_path):
    (tmp_path / "a.txt").write_bytes(raw)
    assert read_text(tmp_path / "a.txt") == text


@pytest.mark.parametrize("raw, options, message", [
    ("abé".encode("latin-1"), {}, "expected UTF-8, got byte 0xe9 at offset 2"),
    ("\ufeffab".encode() + b"\xff", {}, "expected UTF-8, got byte 0xff at offset 5"),
    ("ab".encode("utf-16"), {}, "expected UTF-8, got byte 0xff at offset 0"),
    ("é".encode()[:1], {}, "expected UTF-8, got byte 0xc3 at offset 0"),
    (b"", {}, "expected text, got an empty file"),
    (b"\xef\xbb\xbf", {}, "expected text, got an empty file"),
    (b"a\r\nb", {"at_least": 4}, "expected at least 4 characters, got 3"),
    (b"a\r\nbc", {"vocabulary": Vocabulary("ab\n")}, "expected tokens of the vocabulary (3 of them), got 'c' at offset 3"),
])
def test_bad_text_is_refused_with_path_and_offset(raw, options, message, tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(raw)
    with pytest.raises(ValueError) as error:
        read_text(path, **options)
    assert str(error.value) == f"{path}: {message}"


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        read_text(tmp_path / "nowhere.txt")


# ---- The registry: files by hand


def test_folder_comes_first(monkeypatch, tmp_path):
    entry(monkeypatch, b"hello\r\n", f"{HERE}:9/never-asked")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "little.txt").write_bytes(b"hello\r\n")
    monkeypatch.setenv("RNNBOOK_DATA", str(tmp_path))
    assert fetch("little") == tmp_path / "sub" / "little.txt"
    assert load("little") == "hello\n"


def test_wrong_checksum_by_hand(monkeypatch, tmp_path):
    dataset = entry(monkeypatch, b"hello", f"{HERE}:9/never-asked", "little.txt")
    (tmp_path / "little.txt").write_bytes(b"hullo")
    monkeypatch.setenv("RNNBOOK_DATA", str(tmp_path))
    with pytest.raises(ValueError) as error:
        load("little")
    for part in (str(tmp_path / "little.txt"), dataset.sha256, hashlib.sha256(b"hullo").hexdigest(), dataset.source):
        assert part in str(error.value)


def test_unknown_name():
    with pytest.raises(ValueError, match="name: expected one of 'tinyshakespeare', 'fra-eng', 'jsb-chorales', got 'nothing'"):
        fetch("nothing")


def test_entries_are_complete():
    for dataset in DATASETS.values():
        assert len(dataset.sha256) == 64 and set(dataset.sha256) <= set("0123456789abcdef")
        assert dataset.url.startswith("https://") and not Path(dataset.filename).is_absolute()
        assert all(dataset) and callable(dataset.loader)


# ---- The registry: downloads, from a server on this machine


@pytest.fixture
def server(tmp_path):
    "A folder, and the address under which this machine serves it."
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        asked = []

        def __init__(self, *arguments): super().__init__(*arguments, directory=folder)
        def log_message(self, *arguments): self.asked.append(self.path)

    with http.server.ThreadingHTTPServer(("localhost", 0), Quiet) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        yield types.SimpleNamespace(folder=folder, url=f"{HERE}:{service.server_port}", asked=Quiet.asked)
        service.shutdown()


def test_download_once_into_the_cache(monkeypatch, tmp_path, server):
    (server.folder / "remote.txt").write_bytes(b"hello")
    dataset = entry(monkeypatch, b"hello", f"{server.url}/remote.txt")
    monkeypatch.setenv("RNNBOOK_DATA", str(tmp_path / "empty"))  # not there: the cache is next
    path = fetch("little", cache=tmp_path / "cache")
    assert path == tmp_path / "cache" / dataset.filename and path.read_bytes() == b"hello"
    assert fetch("little", cache=tmp_path / "cache") == path and server.asked == ["/remote.txt"]
    path.write_bytes(b"damaged")  # a damaged file in the cache is fetched anew
    assert fetch("little", cache=tmp_path / "cache").read_bytes() == b"hello" and len(server.asked) == 2


def test_download_with_wrong_checksum_leaves_nothing(monkeypatch, tmp_path, server):
    (server.folder / "remote.txt").write_bytes(b"hullo")
    dataset = entry(monkeypatch, b"hello", f"{server.url}/remote.txt")
    with pytest.raises(ValueError) as error:
        fetch("little", cache=tmp_path / "cache")
    assert dataset.sha256 in str(error.value) and hashlib.sha256(b"hullo").hexdigest() in str(error.value)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize("reachable", [True, False])
def test_what_cannot_be_had_says_what_to_put_where(monkeypatch, tmp_path, server, reachable):
    url = f"{server.url}/missing.txt" if reachable else f"{HERE}:9/missing.txt"
    dataset = entry(monkeypatch, b"hello", url)
    with pytest.raises(FileNotFoundError) as error:
        fetch("little", cache=tmp_path / "cache")
    for part in ("little", url, "RNNBOOK_DATA", dataset.filename, dataset.sha256, dataset.source, dataset.licence):
        assert part in str(error.value)


def test_pooch_is_imported_only_to_download():
    import subprocess
    code = "import sys, rnnbook.datasets as d; d.english_prose(); sys.exit('pooch' in sys.modules or 'scipy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- Loaders


def zipped(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.txt", data)
    return path


def test_pairs(tmp_path):
    text = "Go.\tVa !\tCC-BY\r\nTwo\u2028lines.\tDeux\u2028lignes.\r\n"
    assert load_pairs(zipped(tmp_path / "p.zip", _about="x", fra=text.encode())) == [("Go.", "Va !"), ("Two\u2028lines.", "Deux\u2028lignes.")]
    assert load_pairs(zipped(tmp_path / "q.zip", fra="a\tb")) == [("a", "b")]
    with pytest.raises(ValueError, match=r"r.zip/fra.txt: line 2: expected a tab between two sentences, got 'no tab'"):
        load_pairs(zipped(tmp_path / "r.zip", fra="a\tb\nno tab\nc\td\n"))
    with pytest.raises(ValueError, match=r"s.zip/fra.txt: expected UTF-8, got byte 0xe9 at offset 2"):
        load_pairs(zipped(tmp_path / "s.zip", fra="a\té".encode("latin-1")))


def test_piano_rolls(tmp_path):
    scipy_io = pytest.importorskip("scipy.io", reason="SciPy is not installed")
    pieces = [(np.random.default_rng(n).random((n, 88)) < 0.1).astype(np.uint8) for n in (3, 5, 4)]
    cells = np.empty((1, 3), object)
    cells[0] = pieces
    scipy_io.savemat(tmp_path / "r.mat", dict(traindata=cells, validdata=cells[:, 1:], testdata=cells[:, 2:]))
    rolls = load_piano_rolls(tmp_path / "r.mat")
    assert [len(rolls[part]) for part in ("train", "valid", "test")] == [3, 2, 1]
    assert all(roll.dtype == np.float64 and (roll == piece).all() for roll, piece in zip(rolls["train"], pieces))


def test_piano_rolls_without_scipy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match=r"r.mat: a MATLAB file needs SciPy; pip install 'rnnbook\[data\]'"):
        load_piano_rolls(tmp_path / "r.mat")


# ---- The corpora that Python brings along


def paragraphs(text):
    return {" ".join(p.split()) for p in text.split("\n\n")} - {""}


@pytest.mark.parametrize("corpus", [english_prose, python_source])
def test_corpora(corpus):
    train, heldout = corpus()
    assert corpus() == (train, heldout)
    assert len(train) > len(heldout) > 0
    Vocabulary.from_text(train).encode(heldout)


def test_english_prose_repeats_no_paragraph():
    train, heldout = english_prose()
    assert not paragraphs(train) & paragraphs(heldout)


def test_topics_and_files_stay_whole(monkeypatch):
    "What is read from each topic or file lies on one side only, and little of it is lost."
    texts = {f"topic{k}": f"\n  T{k} a\n=====\n\nT{k} b\n\nsaid by all\n" for k in range(60)}
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", types.SimpleNamespace(topics=texts))
    train, heldout = english_prose()
    for k in range(60):
        sides = [f"T{k} a" in part.split("\n") or f"  T{k} a" in part.split("\n") for part in (train, heldout)]
        assert sum(sides) == 1 and [f"T{k} b" in part.split("\n") for part in (train, heldout)] == sides
    assert (train + heldout).count("said by all") == 1 and "===" not in train + heldout
    assert 2 <= sum(f"T{k} b\n" in heldout for k in range(60)) <= 15


def test_heldout_lines_with_new_characters_are_left_out():
    kept = next(f"name{k}" for k in range(99) if datasets._split({f"name{k}": "x"})[0])
    held = next(f"name{k}" for k in range(99) if datasets._split({kept: "x", f"name{k}": "x"}) == ("x", "x"))
    assert datasets._split({kept: "abc\n", held: "ab\nxyz\nca\n"}) == ("abc\n", "ab\nca\n")


def test_python_without_sources(monkeypatch):
    monkeypatch.setattr(datasets, "_MODULES", ["nonexistent_module"])
    with pytest.raises(FileNotFoundError, match="nonexistent_module: the source of this standard module is not installed"):
        python_source()


# ---- The real files


@pytest.fixture
def real(request):
    "Skips unless RNNBOOK_DATA holds the file of the data set."
    import os
    folder, name = os.environ.get("RNNBOOK_DATA"), request.param
    if not folder:
        pytest.skip("RNNBOOK_DATA is not set")
    if not Path(folder, DATASETS[name].filename).exists():
        pytest.skip(f"RNNBOOK_DATA holds no {DATASETS[name].filename}")
    return load(name)


@pytest.mark.parametrize("real", ["tinyshakespeare"], indirect=True)
def test_real_tinyshakespeare(real):
    assert len(real) == 1_115_394 and len(set(real)) == 65 and real.startswith("First Citizen:\n")


@pytest.mark.parametrize("real", ["fra-eng"], indirect=True)
def test_real_pairs(real):
    assert real[0] == ("Go.", "Va !") and all(len(pair) == 2 and all(pair) for pair in real)
    assert len(real) == 142_787


@pytest.mark.parametrize("real", ["jsb-chorales"], indirect=True)
def test_real_chorales(real):
    assert [len(real[part]) for part in ("train", "valid", "test")] == [229, 76, 77]
    rolls = [roll for part in real.values() for roll in part]
    assert all(roll.shape[1] == 88 and set(np.unique(roll)) <= {0, 1} for roll in rolls) and real["train"][0].shape == (129, 88)
