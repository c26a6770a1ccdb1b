"""What checkpoints survive: savers killed at random moments, random bytes flipped, random lengths cut off.

    python benchmarks/records/checkpoint_faults.py [--again] [--jobs N] [--minutes M]

Beside `save_checkpoint` stands what one writes at first: the safetensors library's bytes, straight into the file. Takes about five minutes.
"""
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from evidence import options, run_record
from safetensors.numpy import load, load_file, save

from rnnbook.checkpoints import CheckpointError, load_checkpoint, save_checkpoint

ABOUT = dict(
    kill="a process saves again and again, 4 MB a time, and is killed (SIGKILL) up to 0.2 s after its first save; found: what is under the name then",
    flip="one byte of a file of 20 kB is changed, at a random place, by random bits; and the file is cut off at a random length",
    numbers=1_000_000,
)
SAVER = """
import sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save
if sys.argv[2] == "save_checkpoint": from rnnbook.checkpoints import save_checkpoint
else: save_checkpoint = lambda path, tree: Path(path).write_bytes(save(tree))
for k in range(10**9):
    tree = {"step": np.array(k), "weights": np.full(%d, k, np.float32)}
    print(k, flush=True)  # from here on step k may be there
    save_checkpoint(sys.argv[1], tree)
""" % ABOUT["numbers"]


def kill(saver, seed):
    "Kill one saver; what is found, how many leftovers there are, and whether the next save clears them away."
    with tempfile.TemporaryDirectory() as folder:
        path, read = Path(folder, "run"), load_checkpoint if saver == "save_checkpoint" else load_file
        with subprocess.Popen([sys.executable, "-c", SAVER, str(path), saver], stdout=subprocess.PIPE, text=True) as child:
            begun = [int(child.stdout.readline()), int(child.stdout.readline())]  # step 0 is saved
            time.sleep(random.Random(seed).uniform(0, 0.2))
            child.send_signal(signal.SIGKILL)
            begun += map(int, child.stdout.read().split())
        leftovers = len(list(path.parent.iterdir())) - 1
        try: tree = read(path)
        except Exception as error: return dict(found="broken", reason=type(error).__name__, saves=begun[-1], leftovers=leftovers)
        whole = bool((tree["weights"] == tree["step"]).all())
        found = {begun[-1]: "new", begun[-1] - 1: "old"}.get(int(tree["step"]), "older") if whole else "mixed"
        if saver == "save_checkpoint": save_checkpoint(path, {})
        return dict(found=found, saves=begun[-1], leftovers=leftovers, cleaned=len(list(path.parent.iterdir())) == 1)


def noticed(read, *errors):
    try: read()
    except errors: return True
    return False


def flip(seed, changes):
    "How many of so many changed bytes, and of a tenth as many cuts, are noticed by us, and by the safetensors library alone."
    rng = np.random.default_rng(seed)
    tree = {"module": {"weight": rng.standard_normal((50, 50)).astype(np.float32), "bias": np.zeros(50, np.float32)}, "optimizer": {"exp_avg": rng.standard_normal((50, 50)).astype(np.float32)},
            "step": 7, "loss": rng.random(20).tolist()}
    counts = dict(noticed=0, by_library=0, in_header=0, cuts_noticed=0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run")
        save_checkpoint(path, tree)
        whole = path.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        for _ in range(changes):
            place, changed = int(rng.integers(len(whole))), bytearray(whole)
            changed[place] ^= int(rng.integers(1, 256))
            path.write_bytes(changed)
            counts["noticed"] += noticed(lambda: load_checkpoint(path), CheckpointError)
            counts["by_library"] += noticed(lambda: load(bytes(changed)), Exception)
            counts["in_header"] += place < header
        for _ in range(changes // 10):
            path.write_bytes(whole[:int(rng.integers(len(whole)))])
            counts["cuts_noticed"] += noticed(lambda: load_checkpoint(path), CheckpointError)
    return dict(counts, size=len(whole), header=header)


def measure(fault, **job): return {"kill": kill, "flip": flip}[fault](**job)


def main():
    jobs = [dict(fault="flip", seed=seed, changes=100) for seed in range(10)]
    jobs += [dict(fault="kill", saver=saver, seed=seed) for saver in ("save_checkpoint", "plain write") for seed in range(100)]
    run_record(__file__, ABOUT, jobs, measure, options(__doc__).parse_args())


if __name__ == "__main__": main()
