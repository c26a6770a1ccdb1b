"""The record of chapter 08: `rnnbook-text` on Tiny Shakespeare, 120 s of training for each of three seeds and both backends.

    RNNBOOK_DATA=FOLDER python benchmarks/records/character_model.py [--again] [--seconds 120]

FOLDER holds text/tinyshakespeare.txt (see chapter 01a); without RNNBOOK_DATA the file is downloaded. Each run is written into
benchmarks/records/character_model.json as soon as it has ended, and a run that is there already is not repeated, so that an interrupted record
goes on where it stopped; `--again` starts a new one. Needs 13 minutes on 2 cores with nothing else running.
"""
import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from rnnbook.character_model import ngram_fit, ngram_probabilities, xz_bits
from rnnbook.datasets import fetch, read_text
from rnnbook.sequences import Vocabulary

RECORD = Path(__file__).with_suffix(".json")
BACKENDS, SEEDS = ("torch", "numpy"), (0, 1, 2)


def machine():
    "The kind of machine, in words."
    name = platform.machine()
    if Path("/proc/cpuinfo").is_file():
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
        if found: name = f"{found[1].strip()} ({name})"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores, {name}, {platform.system()}, {torch.get_num_threads()} threads"


def baselines(text):
    "What counting and copying need on the same split, in bits per character."
    vocabulary = Vocabulary.from_text(text)
    ids, n = vocabulary.encode(text), len(text) - len(text) // 10
    p = ngram_probabilities(ngram_fit(ids[:n], len(vocabulary)), ids[n:])[:, 1:]
    return dict(ngram_bits=[round(float(bits), 4) for bits in -np.log2(p).mean(1)], xz_bits=round(xz_bits(text[:n], text[n:]), 4))


def measure(file, backend, seed, seconds):
    "One run of the command: its steps, seconds and held-out bits per character, read from what it prints."
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", str(file), "--out", f"{folder}/model", "--seconds", f"{seconds:g}", "--seed", str(seed), "--backend", backend, "--device", "cpu"]
        command = [sys.executable, "-c", "import sys; from rnnbook.character_model import main; sys.exit(main())", *words]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    steps, trained = re.search(r"([\d,]+) steps in (\d+) s", printed).groups()
    bits = re.search(r"held-out bits per character: ([\d.]+)", printed)[1]
    return dict(backend=backend, seed=seed, steps=int(steps.replace(",", "")), seconds=int(trained), bits=float(bits))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="measure all runs anew")
    parser.add_argument("--seconds", type=float, default=120, help="of training in each run (120)")
    options = parser.parse_args()
    file = fetch("tinyshakespeare")
    about = dict(command=f"rnnbook-text train tinyshakespeare.txt --out MODEL --seconds {options.seconds:g} --seed S --backend B --device cpu",
                 machine=machine(), versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__})
    record = json.loads(RECORD.read_text()) if RECORD.is_file() and not options.again else {}
    if any(record.get(key) != value for key, value in about.items()): record = {**about, "runs": []}  # another machine, another record
    if "ngram_bits" not in record: record |= baselines(read_text(file))
    for backend in BACKENDS:
        for seed in SEEDS:
            if not any((run["backend"], run["seed"]) == (backend, seed) for run in record["runs"]):
                record["runs"].append(measure(file, backend, seed, options.seconds))
                record["date"] = datetime.date.today().isoformat()
                RECORD.write_text(json.dumps(record, indent=1) + "\n")
        runs = [run for run in record["runs"] if run["backend"] == backend]
        print(f"{backend}: median {np.median([run['bits'] for run in runs]):.3f} bits per character of", [run["bits"] for run in runs])
    print(f"n-gram, orders 0 to 6: {record['ngram_bits']}, xz: {record['xz_bits']}")


if __name__ == "__main__": main()
