"Checkpoints: every value comes back, no fault costs a checkpoint, no damage passes, and a resumed run is bit-equal."
import errno
import json
import math
import os
import random
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from rnnbook import checkpoints
from rnnbook.checkpoints import Checkpoint, CheckpointError, load_checkpoint, resume_checkpoint, save_checkpoint, write_whole
from rnnbook.optimizers import SGD, Adam, cosine_schedule
from rnnbook.rnn import RNNLayer
from rnnbook.training import Trainer

posix = pytest.mark.skipif(os.name == "nt", reason="signals, locks and permissions of a POSIX system")


def same(a, b):
    "Equal in type, structure and every bit."
    if type(a) is not type(b): return False
    if isinstance(a, dict): return list(a) == list(b) and all(same(a[key], b[key]) for key in a) and [*map(type, a)] == [*map(type, b)]
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        a_bits, b_bits = (t.contiguous().as_strided((t.numel(),), (1,)).view(torch.uint8) for t in (a, b))
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a_bits, b_bits)
    if isinstance(a, (np.ndarray, np.generic)): return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float): return struct.pack("d", a) == struct.pack("d", b)
    return a == b


def some_tree():
    g = torch.Generator().manual_seed(0)
    return {"weights": {"a": torch.randn(3, 5, generator=g), "b": torch.randn(4, generator=g, dtype=torch.float64).to(torch.bfloat16)},
            "step": 7, "history": [0.5, 0.25, math.nan], "state": (np.arange(6).reshape(2, 3), None), "name": "adäm"}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "run.safetensors"
    save_checkpoint(path, some_tree())
    return path


def refused(path, reason=""):
    with pytest.raises(CheckpointError) as caught: load_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ") and reason in str(caught.value), caught.value
    return str(caught.value)


def listing(folder): return sorted(os.listdir(folder))


# ---- what comes back

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.bool,
          torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_come_back_and_the_plain_library_reads_them(tmp_path, dtype):
    whole = torch.randint(0, 2, (4, 6), generator=torch.Generator().manual_seed(1)).to(dtype)
    tree = {"matrix": whole, "scalar": whole[0, 0].clone(), "empty": whole[:0], "turned": whole.T, "part": whole[::2, 1::3], "stretched": whole[:1, :1].expand(2, 3), "one": whole[0, ::6], "strange": whole[0, :1].as_strided((1,), (0,)), "odd": torch.ones(3, dtype=torch.uint8)}
    save_checkpoint(tmp_path / "c", tree)
    assert same(load_checkpoint(tmp_path / "c"), tree)
    by_library = safetensors.torch.load_file(tmp_path / "c")
    assert by_library.keys() == tree.keys() and all(same(by_library[name], t) for name, t in tree.items())
    with safe_open(tmp_path / "c", "pt") as file: assert all(same(file.get_tensor(name), t) for name, t in tree.items())


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "?", "u8", "u4", "u2", "u1", "c8"])
def test_arrays_come_back(tmp_path, dtype):
    whole = np.random.default_rng(0).integers(0, 2, (4, 6)).astype(dtype)
    tree = [whole, whole[0, 0], np.array(whole[0, 0]), whole[:0], whole.T, whole[::-2, 1::3], np.asfortranarray(whole)]
    save_checkpoint(tmp_path / "c", tree)
    found = load_checkpoint(tmp_path / "c")
    assert same(found, tree) and all(a.flags.writeable for a in found if isinstance(a, np.ndarray))
    save_checkpoint(tmp_path / "c", whole.astype(np.dtype(dtype).newbyteorder(">")))
    assert same(load_checkpoint(tmp_path / "c"), whole)  # the same numbers, in this machine's order


@pytest.mark.parametrize("value", [
    0, -1, 2**63 - 1, 2**63, -2**63, 10**6000, True, False, None, "", "a\x00b\n\"\\ ü 🙂 \ud800", [], (), {}, [[]], ([],), {"": {}},
    0.0, -0.0, 0.1, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan, -math.nan, struct.unpack("d", struct.pack("Q", 0x7ff8_0000_0000_beef))[0],
    [0.1, -0.0, math.nan, math.inf], (0.1, math.nan), [1, 2.0], [True, 1, 1.0], [1, 10**30], {1: "a", "1": "b", -10**30: "c"}, {"b": 1, "a": 2},
    {"dict": 1}, {"tensor": "x"}, {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}, "__metadata__": torch.ones(2), "\ud800": torch.ones(3)},
    {1: torch.ones(1), "1": torch.zeros(1)}, torch.ones(2), np.float64(0.1), np.bool_(True), np.int8(-3),
], ids=lambda value: type(value).__name__)
def test_values_come_back(tmp_path, value):
    save_checkpoint(tmp_path / "c", value)
    assert same(load_checkpoint(tmp_path / "c"), value)
    safetensors.torch.load_file(tmp_path / "c")


def test_what_comes_back_as_something_plainer(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(3))
    save_checkpoint(tmp_path / "c", OrderedDict(p=parameter, q=torch.tensor([1 + 1j]).conj()))
    found = load_checkpoint(tmp_path / "c")
    assert type(found) is dict and type(found["p"]) is torch.Tensor and not found["p"].requires_grad
    assert torch.equal(found["p"], parameter.data) and found["q"].tolist() == [1 - 1j]


def cyclic():
    tree = []
    tree.append(tree)
    return tree


@pytest.mark.parametrize("tree, place, got", [
    ({"a": [1, {2}]}, "tree['a'][1]: ", "set"), ({"f": {3: print}}, "tree['f'][3]: ", "builtin_function_or_method"), (1j, "tree: ", "complex"),
    ({"a": {1.5: 0}}, "tree['a']: expected keys", "1.5"), ({True: 0}, "tree: expected keys", "True"), ([None, b"x"], "tree[1]: ", "bytes"),
    ([torch.zeros(2, dtype=torch.complex128)], "tree[0]: ", "complex128"), ([np.array(["a"])], "tree[0]: ", "<U1"), ([np.array([None])], "tree[0]: ", "object"),
    ([torch.zeros(2).to_sparse()], "tree[0]: ", "sparse"), ([torch.zeros(2, device="meta")], "tree[0]: ", "meta"), (np.zeros(2, "M8[s]"), "tree: ", "datetime64"),
    ({"a": np.ma.zeros(3)}, "tree['a']: ", "MaskedArray"), (defaultdict(int), "tree: ", "defaultdict"), (stat.S_ISREG, "tree: ", ""), (Path("x"), "tree: ", "Path"),
    (stat.FileStat if hasattr(stat, "FileStat") else type, "tree: ", "type"), (cyclic(), "tree[0][0]", "more"), (torch.float32, "tree: ", "dtype"),
], ids=lambda value: value if isinstance(value, str) else "tree")
def test_the_rest_is_refused_with_its_place(saved, tree, place, got):
    before = saved.read_bytes()
    with pytest.raises(TypeError) as caught: save_checkpoint(saved, tree)
    assert str(caught.value).startswith(place) and got in str(caught.value)
    assert saved.read_bytes() == before and listing(saved.parent) == [saved.name]


def test_equal_trees_are_equal_files(tmp_path):
    save_checkpoint(tmp_path / "a", some_tree())
    save_checkpoint(tmp_path / "b", some_tree())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_saving_and_loading_disturb_nothing(saved):
    tree, outer = some_tree(), (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    save_checkpoint(saved, tree)
    load_checkpoint(saved)["weights"]["a"].zero_()
    assert same(tree, some_tree())
    assert torch.equal(outer[0], torch.get_rng_state()) and outer[1:] == (np.random.get_state()[1].tolist(), random.getstate())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_of_a_gpu_come_back_on_the_cpu(tmp_path):
    save_checkpoint(tmp_path / "c", [torch.arange(5, device="cuda")])
    assert same(load_checkpoint(tmp_path / "c"), [torch.arange(5)])


# ---- faults while writing


class Full:
    "A file on a disk with room for a few bytes."
    def __init__(self, file, room): self.file, self.room = file, room
    def __enter__(self): return self
    def __exit__(self, *error): self.file.close()
    def __getattr__(self, name): return getattr(self.file, name)
    def write(self, piece):
        piece = bytes(piece)
        self.file.write(piece[:self.room])
        self.room -= len(piece)
        if self.room < 0: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def unchanged(path, before, error, *words):
    "The old file is there, alone, and the error says so."
    assert path.read_bytes() == before and listing(path.parent) == [path.name]
    assert same(load_checkpoint(path), some_tree())
    for word in (str(path), "what was there before is unchanged", *words): assert word in str(error.value)


@pytest.mark.parametrize("room", [0, 1, 100, 700])
def test_no_space_left_while_writing(saved, monkeypatch, room):
    before, real = saved.read_bytes(), open
    assert room < len(before)
    monkeypatch.setattr(checkpoints, "open", lambda *a: Full(real(*a), room), raising=False)
    with pytest.raises(OSError, match="No space left") as caught: save_checkpoint(saved, {"new": torch.zeros(1000)})
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    unchanged(saved, before, caught)


@pytest.mark.parametrize("call, code", [("fsync", errno.ENOSPC), ("fsync", errno.EIO), ("replace", errno.EACCES), ("replace", None)])
def test_a_refusal_of_any_call(saved, monkeypatch, call, code):
    def refuse(*args): raise (OSError(code, os.strerror(code)) if code else OSError("just so"))
    before = saved.read_bytes()
    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OSError, match="not saved") as caught: save_checkpoint(saved, {"new": 1})
    monkeypatch.undo()
    unchanged(saved, before, caught, os.strerror(code) if code else "just so")


def test_no_permission_injected(saved, monkeypatch):
    before = saved.read_bytes()
    def refuse(*args): raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(args[0]))
    monkeypatch.setattr(checkpoints, "open", refuse, raising=False)
    with pytest.raises(PermissionError, match="Permission denied") as caught: save_checkpoint(saved, {"new": 1})
    monkeypatch.undo()
    unchanged(saved, before, caught)


@posix
def test_a_folder_that_is_really_read_only():
    with tempfile.TemporaryDirectory() as folder:  # not pytest's own, into which only its owner may look
        path = Path(folder, "run.safetensors")
        save_checkpoint(path, some_tree())
        before, user = path.read_bytes(), os.geteuid()
        os.chmod(folder, 0o555)
        try:
            if user == 0: os.seteuid(65534)  # root may write everywhere
            with pytest.raises(PermissionError, match="Permission denied") as caught: save_checkpoint(path, {"new": 1})
            assert same(load_checkpoint(path), some_tree())
        finally:
            if user == 0: os.seteuid(0)
            os.chmod(folder, 0o755)
        unchanged(path, before, caught)


@posix
def test_a_limit_of_the_system(saved):
    "The system itself breaks off the write, after 200,000 bytes."
    import resource
    before, limits = saved.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught: save_checkpoint(saved, {"new": torch.zeros(100_000)})
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    unchanged(saved, before, caught)


@posix
def test_a_failure_after_the_rename_says_that_the_new_file_is_there(saved, monkeypatch):
    real = os.fsync
    def refuse(number):
        if stat.S_ISDIR(os.fstat(number).st_mode): raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(number)
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="the new file is in its place"): save_checkpoint(saved, {"new": 1})
    assert load_checkpoint(saved) == {"new": 1} and listing(saved.parent) == [saved.name]


@posix
def test_the_order_of_the_calls(saved, monkeypatch):
    "Content to the disk, then the name, then the folder: any other order may lose both files."
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda n: (calls.append("folder" if stat.S_ISDIR(os.fstat(n).st_mode) else f"file of {os.fstat(n).st_size}"), fsync(n)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    save_checkpoint(saved, some_tree())
    assert calls == [f"file of {saved.stat().st_size}", "rename", "folder"]


def test_a_missing_folder_and_a_folder_in_the_way(tmp_path):
    with pytest.raises(FileNotFoundError, match="not saved"): save_checkpoint(tmp_path / "no" / "c", 1)
    (tmp_path / "c").mkdir()
    with pytest.raises(OSError, match="not saved"): save_checkpoint(tmp_path / "c", 1)
    assert listing(tmp_path) == ["c"] and listing(tmp_path / "c") == []
    with pytest.raises(FileNotFoundError): load_checkpoint(tmp_path / "d")


def test_an_interrupt_leaves_the_old_file(saved, monkeypatch):
    def interrupt(number): raise KeyboardInterrupt
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt): save_checkpoint(saved, {"new": 1})
    assert same(load_checkpoint(saved), some_tree()) and listing(saved.parent) == [saved.name]


@posix
def test_permissions_links_and_names(tmp_path, monkeypatch):
    (tmp_path / "plain").touch()
    save_checkpoint(tmp_path / "c", 1)
    assert (tmp_path / "c").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "c").chmod(0o600)
    save_checkpoint(tmp_path / "c", 2)
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o600  # a private file stays private
    (tmp_path / "link").symlink_to(tmp_path / "c")
    save_checkpoint(tmp_path / "link", 3)
    assert (tmp_path / "link").is_symlink() and load_checkpoint(tmp_path / "c") == 3
    monkeypatch.chdir(tmp_path)
    save_checkpoint("[a]*?", 4)
    assert load_checkpoint("[a]*?") == 4 and listing(tmp_path) == ["[a]*?", "c", "link", "plain"]


# ---- killed savers, and many

SAVE = "import os, random, signal, sys, time, torch\nfrom pathlib import Path\nfrom rnnbook.checkpoints import load_checkpoint, save_checkpoint\ntorch.set_num_threads(1)\n"


@posix
def test_killed_while_saving(tmp_path):
    "Twenty savers, each killed at a random moment: what is found is whole, and none older than what was there before."
    code = SAVE + """
path, rng, first, midway = Path(sys.argv[1]), random.Random(0), 0, 0
def save(k): save_checkpoint(path, {"step": k, "weights": torch.full((200_000,), float(k))})
save(0)
for trial in range(20):
    child = os.fork()
    if not child:
        k = first
        while True: save(k := k + 1)
    while not any(path.parent.glob(".run.*")): pass  # until it saves, however busy the machine is
    time.sleep(rng.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    leftovers = [p for p in path.parent.iterdir() if p != path]
    assert all(p.name.startswith(".run.") and p.name.endswith(".tmp") for p in leftovers) and len(leftovers) < 2, leftovers
    midway += len(leftovers)
    found = load_checkpoint(path)
    assert (found["weights"] == found["step"]).all() and found["step"] >= first
    first = found["step"]
save(-1)
assert [*path.parent.iterdir()] == [path], "the next save cleans up"
print(midway, first)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    midway, saves = map(int, done.stdout.split())
    assert midway >= 3 and saves >= 3  # some were hit in the middle of a save, and some had finished saves


@posix
def test_a_leftover_is_cleaned_only_when_its_saver_is_dead(tmp_path):
    "A saver that hangs keeps its temporary file while others save, until it is killed."
    code = SAVE + "def hang(*args): print('there', flush=True); time.sleep(60)\nos.replace = hang\nsave_checkpoint(sys.argv[1], 1)"
    path = tmp_path / "c"
    for decoy in (".c.tmp", f".c.{15 * '1'}z.tmp", f".c.{16 * '1'}.tmp2", f"c.{16 * '1'}.tmp", f".c.d.{16 * '1'}.tmp"): (tmp_path / decoy).touch()
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "there\n"
        before = listing(tmp_path)
        save_checkpoint(path, 2)
        assert listing(tmp_path) == sorted([*before, "c"])
        child.kill()
    assert len(before) == 6 and load_checkpoint(path) == 2
    save_checkpoint(path, 3)
    assert len(listing(tmp_path)) == 6 and load_checkpoint(path) == 3  # the five files of others stay


def test_many_savers_at_once(tmp_path):
    errors = []
    def save(k):
        try:
            for i in range(10):
                save_checkpoint(tmp_path / "c", {"step": k, "weights": torch.full((5000,), k)})
                found = load_checkpoint(tmp_path / "c")
                assert (found["weights"] == found["step"]).all()
        except BaseException as error: errors.append(error)
    threads = [threading.Thread(target=save, args=(k,)) for k in range(6)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not errors and listing(tmp_path) == ["c"]


@posix
def test_a_file_system_without_locks(saved, monkeypatch):
    def refuse(*args): raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    leftover = saved.parent / f".{saved.name}.0000000000000000.tmp"
    leftover.touch()
    monkeypatch.setattr(checkpoints.fcntl, "flock", refuse)
    save_checkpoint(saved, 1)
    assert load_checkpoint(saved) == 1 and leftover.exists()  # nobody knows whose it is
    monkeypatch.setattr(checkpoints, "fcntl", None)
    save_checkpoint(saved, 2)
    assert load_checkpoint(saved) == 2


def test_write_whole_joins_its_pieces(tmp_path):
    write_whole(tmp_path / "w", [b"ab", bytearray(b"c"), memoryview(b"d"), np.frombuffer(b"ef", np.uint8), b""])
    assert (tmp_path / "w").read_bytes() == b"abcdef"


# ---- damaged and hostile files


def test_every_flipped_byte_is_found(saved):
    whole, rng = saved.read_bytes(), np.random.default_rng(0)
    places = {*range(0, 120), *(len(whole) - 1 - k for k in range(20)), *rng.choice(len(whole), 200, replace=False).tolist()}
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= int(rng.integers(1, 256))
        saved.write_bytes(flipped)
        refused(saved)
    for place in range(checkpoints._SUM.start, checkpoints._SUM.stop):  # the checksum itself, between small and large letters too
        saved.write_bytes(whole[:place] + bytes([whole[place] ^ 0x20]) + whole[place + 1:])
        refused(saved)
    saved.write_bytes(whole)
    assert same(load_checkpoint(saved), some_tree())


def test_every_cut_is_found(saved):
    whole, rng = saved.read_bytes(), np.random.default_rng(1)
    for length in {*range(0, 120, 7), len(whole) - 1, *rng.integers(0, len(whole), 60).tolist()}:
        saved.write_bytes(whole[:length])
        refused(saved, "" if length else "empty")
    for more in (b"\0", b"junk", whole):
        saved.write_bytes(whole + more)
        refused(saved, "checksum")


def forged(header, body=b"", length=None):
    "A file whose checksum is right: its author meant it."
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    data = bytearray(struct.pack("<Q", len(text) if length is None else length) + text + body)
    if data[8:checkpoints._SUM.start] == checkpoints._START: data[checkpoints._SUM] = checkpoints._checksum([data])
    return bytes(data)


def about(tree="1", **changes): return {"__metadata__": {"sha256": 64 * "0", "format": checkpoints._FORMAT, "tree": tree} | changes}


def entry(dtype="F32", shape=(1,), data_offsets=(0, 4)): return {"t": dict(dtype=dtype, shape=shape, data_offsets=data_offsets)}


T = '{"tensor": "t"}'
HOSTILE = {
    "huge header": forged(about(), length=2**60), "header of 2**64 - 1": forged(about(), length=2**64 - 1), "no header": forged(b""), "zeros": bytes(1000), "text": b"hello",
    "a list": forged(b"[1, 2]"), "a number": forged(b"7"), "deep": forged(b"[" * 100_000 + b"]" * 100_000), "no metadata": forged(entry(), bytes(4)),
    "deep metadata": forged(b'{"__metadata__":{"sha256":"' + b"0" * 64 + b'","x":' + b"[" * 100_000), "metadata is a list": forged({"__metadata__": [1]}),
    "deep tree": forged(about("[" * 100_000 + "]" * 100_000)), "deep tuples": forged(about('{"tuple":[' * 5000 + "]}" * 5000)),
    "another format": forged(about(format="rnnbook.checkpoint 2")), "no tree": forged({"__metadata__": {"sha256": 64 * "0", "format": checkpoints._FORMAT}}),
    "tree is no JSON": forged(about("{")), "tree of two kinds": forged(about('{"int": "1", "float": "2"}')), "unknown kind": forged(about('{"module": "os"}')),
    "tree is a number": forged(about(7)), "int of words": forged(about('{"int": "seven"}')), "float too short": forged(about('{"float": "00"}')),
    "dict of lists": forged(about('{"dict": [[[], 1]]}')), "dict of numbers": forged(about('{"dict": [1, 2]}')), "tuple of a number": forged(about('{"tuple": 1}')),
    "missing tensor": forged(about(T)), "unknown type": forged(about(T) | entry("F31"), bytes(4)), "type is a list": forged(about(T) | entry([]), bytes(4)),
    "shape too large": forged(about(T) | entry(shape=[2**62]), bytes(4)), "shape overflows": forged(about(T) | entry(shape=[2**40, 2**40]), bytes(4)),
    "shape of zeros": forged(about(T) | entry(shape=[0, 2**70], data_offsets=[0, 0]), bytes(4)), "negative shape": forged(about(T) | entry(shape=[-1, -1]), bytes(4)),
    "shape is text": forged(about(T) | entry(shape="1"), bytes(4)), "beyond the end": forged(about(T) | entry(shape=[2], data_offsets=[0, 8]), bytes(4)),
    "negative place": forged(about(T) | entry(data_offsets=[-4, 4]), bytes(8)), "place is a fraction": forged(about(T) | entry(data_offsets=[0, 4.0]), bytes(4)),
    "negative places": forged(about(T) | entry(data_offsets=[-8, -4]), bytes(8)), "shape to be guessed": forged(about(T) | entry(shape=[-1]), bytes(4)),
    "a hole": forged(about(T) | entry(data_offsets=[4, 8]), bytes(8)), "bytes left over": forged(about(T) | entry(), bytes(8)),
    "two in one place": forged(about('[{"tensor": "t"}, {"tensor": "u"}]') | entry() | {"u": entry()["t"]}, bytes(4)),
    "backwards": forged(about('[{"tensor": "t"}, {"tensor": "u"}, {"tensor": "v"}]') | entry() | {"u": entry(shape=[0], data_offsets=[4, 0])["t"], "v": entry()["t"]}, bytes(4)),
    "one tensor twice": forged(about(f"[{T}, {T}]") | entry(), bytes(4)), "a tensor of nobody": forged(about() | entry(), bytes(4)),
    "sizes that overflow": forged(about(T) | entry(shape=[2**32, 2**32], data_offsets=[0, 0])),
    "half a number": forged(about(T) | entry(data_offsets=[0, 3]), bytes(4)), "one offset": forged(about(T) | entry(data_offsets=[0]), bytes(4)),
    "entry is a list": forged(about(T) | {"t": []}, bytes(4)), "array of bfloat16": forged(about('{"array": "t"}') | entry("BF16", [2]), bytes(4)),
    "not UTF-8": forged(b'{"__metadata__":{"sha256":"' + b"0" * 64 + b'","x":"\xff"}}'), "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix.",
    "plain safetensors": safetensors.torch.save({"a": torch.ones(3)}), "safetensors with metadata": safetensors.torch.save({"a": torch.ones(3)}, {"sha256": 64 * "0"}),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused(saved, content):
    saved.write_bytes(content)
    refused(saved)


def test_a_forged_file_is_read_where_it_makes_sense(saved):
    saved.write_bytes(forged(about(T) | entry(), struct.pack("<f", 1.5)))
    assert same(load_checkpoint(saved), torch.tensor([1.5]))  # so the files above fail for what they say


def test_what_the_file_is_instead_is_named(saved):
    torch.save({"a": torch.ones(3)}, saved)
    assert zipfile.is_zipfile(saved)
    refused(saved, "zip archive")
    torch.save({"a": torch.ones(3)}, saved, _use_new_zipfile_serialization=False)
    refused(saved, "pickle")
    for size in range(0, 300, 8):  # one of them has a header of 128 bytes, whose length looks like the start of a pickle
        saved.write_bytes(safetensors.torch.save({"a" * (size + 1): torch.ones(3)}))
        refused(saved, "another safetensors file")


def test_nothing_is_run(saved):
    "A pickle that would write a file is refused, and writes none."
    class Trap:
        def __reduce__(self): return (open, (str(saved.parent / "trapped"), "w"))
    torch.save(Trap(), saved)
    refused(saved)
    assert listing(saved.parent) == [saved.name]


# ---- a run of two stacked layers with dropout between them, Adam, a schedule, a carried state and a validation


class Stacked(torch.nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.first, self.second = RNNLayer(2, hidden), RNNLayer(hidden, hidden)
        self.dropout, self.readout = torch.nn.Dropout(0.3), torch.nn.Linear(hidden, 3)

    def forward(self, x, state):
        h, a = self.first(x, state and state[0])
        h, b = self.second(self.dropout(h), state and state[1])
        return self.readout(h), (a, b)


def stacked_loss(module, batch, state):
    logits, state = module(batch[0], state)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten()), state


class Stream:
    "Batches without end, which can say where they are."
    def __init__(self): self.rng = np.random.default_rng(3)
    def __iter__(self):
        while True: yield self.rng.standard_normal((5, 4, 2)).astype(np.float32), self.rng.integers(0, 3, (5, 4))
    def state_dict(self): return self.rng.bit_generator.state
    def load_state_dict(self, state): self.rng.bit_generator.state = state


class Shuffled:
    "Eight batches in another order at each reading; nothing outside decides on it."
    def __init__(self): self.batches, self.rng = [batch for _, batch in zip(range(8), Stream())], np.random.default_rng(4)
    def __iter__(self): return (self.batches[k] for k in self.rng.permutation(8))


STEPS = 40


def trainer(seed=0, hidden=6, optimizer=Adam):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Trainer(Stacked(hidden), stacked_loss, optimizer=optimizer, lr=cosine_schedule(0.02), max_norm=1.0, seed=seed, device="cpu", progress=False)


def fit(trainer, data, callbacks=(), **options):
    held_out = [batch for _, batch in zip(range(2), Shuffled())]
    return trainer.fit(data, steps=STEPS, validation=held_out, every=7, callbacks=callbacks, **options)


def interrupt_at(step):
    def press(run):
        if len(run.history["step"]) == step and run.history.stopped is None: signal.raise_signal(signal.SIGINT)
    return press


def end_state(trainer):
    "All of a run's state but the time that it took."
    state = trainer.state_dict()
    del state["history"]["seconds"]
    return state


def resume(path, data):
    "In fresh objects, begun in another way: the end state of the run that is in the file."
    fresh = trainer(seed=9)
    resume_checkpoint(path, fresh)
    fit(fresh, data, resume=True)
    return end_state(fresh)


@pytest.fixture(scope="module")
def uninterrupted():
    ends = {}
    for data in (Stream, Shuffled):
        whole = trainer()
        fit(whole, data())
        ends[data] = end_state(whole)
    return ends


MOMENTS = sorted(random.Random(5).sample(range(1, STEPS), 20))


@pytest.mark.parametrize("k", range(20))
def test_interrupted_saved_and_resumed_is_bit_equal(tmp_path, uninterrupted, k):
    "SIGINT at twenty random steps; the rest is done by fresh objects from the file."
    data, stopped, path = (Stream, Shuffled)[k % 2], trainer(), tmp_path / "run"
    assert fit(stopped, data(), [interrupt_at(MOMENTS[k]), Checkpoint(path, every=1000)]).stopped == "interrupt"
    assert len(load_checkpoint(path)["history"]["step"]) == MOMENTS[k]
    assert same(resume(path, data()), uninterrupted[data])


def test_resumed_in_another_process(tmp_path, uninterrupted):
    "The same, and the end state comes back as a checkpoint. There, equal trees are equal files too."
    for data in (Stream, Shuffled):
        fit(trainer(), data(), [interrupt_at(17), Checkpoint(tmp_path / data.__name__, every=5)])
    code = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_checkpoints import *\n"
            "for data in (Stream, Shuffled): save_checkpoint(data.__name__ + '.end', resume(data.__name__, data()))\n"
            "save_checkpoint('theirs', some_tree())")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    for data in (Stream, Shuffled): assert same(load_checkpoint(tmp_path / f"{data.__name__}.end"), uninterrupted[data])
    save_checkpoint(tmp_path / "ours", some_tree())
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("data", [Stream, Shuffled])
def test_a_crash_costs_only_the_steps_since_the_last_save(tmp_path, uninterrupted, data):
    def crash(run):
        if len(run.history["step"]) == 23: raise MemoryError
    with pytest.raises(MemoryError): fit(trainer(), data(), [Checkpoint(tmp_path / "run", every=10), crash])
    assert len(load_checkpoint(tmp_path / "run")["history"]["step"]) == 20
    assert same(resume(tmp_path / "run", data()), uninterrupted[data])


def test_saving_does_not_change_the_run(tmp_path, uninterrupted):
    busy = trainer()
    fit(busy, Stream(), [Checkpoint(tmp_path / "run", every=1)])
    assert same(end_state(busy), uninterrupted[Stream])
    ended = load_checkpoint(tmp_path / "run")
    assert ended.pop("stopped") == "steps" and same(ended, {k: v for k, v in busy.state_dict().items() if k != "stopped"})


@pytest.mark.parametrize("moment", ["in a step", "in a save"])
def test_a_second_ctrl_c_leaves_a_good_file(tmp_path, uninterrupted, monkeypatch, moment):
    path, run = tmp_path / "run", trainer()
    def press_twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    if moment == "in a step":
        def loss(module, batch, state):
            if len(run.history["step"]) == 23: press_twice()
            return stacked_loss(module, batch, state)
        run.loss = loss
    else:
        real, calls = os.replace, []
        def replace(*names):
            calls.append(names)
            if len(calls) == 3: press_twice()
            real(*names)
        monkeypatch.setattr(os, "replace", replace)
    assert fit(run, Stream(), [Checkpoint(path, every=10)]).stopped == "interrupt"
    monkeypatch.undo()
    assert listing(tmp_path) == ["run"] and len(load_checkpoint(path)["history"]["step"]) == {"in a step": 20, "in a save": 30}[moment]
    assert same(resume(path, Stream()), uninterrupted[Stream])


def test_a_failed_save_is_not_passed_over(tmp_path, monkeypatch):
    run, checkpoint = trainer(), Checkpoint(tmp_path / "run", every=10)
    def full_at_20(number, real=os.fsync):
        if len(run.history["step"]) == 20: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(number)
    monkeypatch.setattr(os, "fsync", full_at_20)
    with pytest.raises(OSError, match="No space left"): fit(run, Stream(), [checkpoint])
    assert len(load_checkpoint(tmp_path / "run")["history"]["step"]) == 10


@pytest.mark.parametrize("options, complaint", [
    ({"hidden": 5}, r"expected \(5, 2\).*got \(6, 2\)"), ({"optimizer": SGD}, "optimizer"),
])
def test_another_architecture_is_refused_and_the_trainer_untouched(tmp_path, options, complaint):
    path, other = tmp_path / "run", trainer(**options)
    fit(trainer(), Stream(), [interrupt_at(5), Checkpoint(path)])
    fit(other, Stream(), [interrupt_at(3)])
    before = other.state_dict()
    with pytest.raises(CheckpointError, match=complaint) as caught: resume_checkpoint(path, other)
    assert str(path) in str(caught.value) and same(other.state_dict(), before)


@pytest.mark.parametrize("tree", [None, 7, [], {}, {"module": {}}, {"weights": torch.ones(2)}, "change", "history", "optimizer"], ids=str)
def test_another_tree_is_refused_and_the_trainer_untouched(tmp_path, tree):
    path, run = tmp_path / "run", trainer()
    fit(run, Stream(), [interrupt_at(3)])
    before = run.state_dict()
    if isinstance(tree, str):
        tree = {"change": lambda: before | {"module": before["module"] | {"readout.bias": torch.ones(4)}}, "history": lambda: before | {"history": []},
                "optimizer": lambda: before | {"optimizer": {"state": {}}}}[tree]()
    save_checkpoint(path, tree)
    with pytest.raises(CheckpointError, match="run: "): resume_checkpoint(path, run)
    assert same(run.state_dict(), before)


def test_resume_reads_before_it_touches(saved):
    run = trainer()
    before = run.state_dict()
    saved.write_bytes(saved.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="checksum"): resume_checkpoint(saved, run)
    with pytest.raises(FileNotFoundError): resume_checkpoint(saved.parent / "nothing", run)
    assert same(run.state_dict(), before)


@pytest.mark.parametrize("every", [0, -1, 1.5, True, None, "10"])
def test_every_is_checked_at_once(tmp_path, every):
    with pytest.raises(ValueError, match="every: expected a positive whole number"): Checkpoint(tmp_path / "run", every=every)


def test_a_missing_folder_is_found_before_the_first_step(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no/run: expected a file in a folder that exists"): Checkpoint(tmp_path / "no" / "run")
    monkeypatch.chdir(tmp_path)
    Checkpoint("run")
