"""The record of chapter 08: `rnnbook-text` on Tiny Shakespeare, 120 s of training for each of three seeds and both backends.

    RNNBOOK_DATA=FOLDER python benchmarks/records/character_model.py [--again] [--seconds 120]

FOLDER holds text/tinyshakespeare.txt (see chapter 01a); without RNNBOOK_DATA the file is downloaded. Needs 13 minutes on 2 cores with nothing else
running. What the options mean, and how a record goes on where it stopped: see evidence.py.
"""
import re
import subprocess
import sys
import tempfile
from functools import partial

import evidence
import numpy as np
from rnnbook.character_model import ngram_fit, ngram_probabilities, xz_bits
from rnnbook.datasets import fetch, read_text
from rnnbook.sequences import Vocabulary

BACKENDS, SEEDS = ("torch", "numpy"), (0, 1, 2)
NETWORK = "--cell rnn --hidden 384 --dropout 0 --lr 0.003".split()  # that of chapter 08


def baselines(text):
    "What counting and copying need on the same split, in bits per character."
    vocabulary = Vocabulary.from_text(text)
    ids, n = vocabulary.encode(text), len(text) - len(text) // 10
    p = ngram_probabilities(ngram_fit(ids[:n], len(vocabulary)), ids[n:])[:, 1:]
    return dict(ngram_bits=[round(float(bits), 4) for bits in -np.log2(p).mean(1)], xz_bits=round(xz_bits(text[:n], text[n:]), 4))


def measure(file, seconds, backend, seed):
    "One run of the command: its steps, seconds and held-out bits per character, read from what it prints."
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", file, "--out", f"{folder}/model", "--seconds", f"{seconds:g}", "--seed", str(seed), "--backend", backend, "--device", "cpu", *NETWORK]
        command = [sys.executable, "-c", "import sys; from rnnbook.text_generation import main; sys.exit(main())", *words]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    steps, trained = re.search(r"([\d,]+) steps in (\d+) s", printed).groups()
    bits = re.search(r"held-out bits per character: ([\d.]+)", printed)[1]
    return dict(steps=int(steps.replace(",", "")), seconds=int(trained), bits=float(bits))


def main():
    parser = evidence.options(__doc__, jobs=1)  # each run is measured in seconds, so it has the machine to itself
    parser.add_argument("--seconds", type=float, default=120, help="of training in each run (120)")
    chosen = parser.parse_args()
    file = fetch("tinyshakespeare")
    about = dict(command=f"rnnbook-text train tinyshakespeare.txt --out MODEL --seconds {chosen.seconds:g} --seed S --backend B --device cpu {' '.join(NETWORK)}")
    jobs = [dict(backend=backend, seed=seed) for backend in BACKENDS for seed in SEEDS]
    record = evidence.run_record(__file__, about | baselines(read_text(file)), jobs, partial(measure, str(file), chosen.seconds), chosen)
    for backend in BACKENDS:
        bits = [run["bits"] for run in record["runs"] if run["backend"] == backend]
        print(f"{backend}: median {np.median(bits):.3f} bits per character of", bits)
    print(f"n-gram, orders 0 to 6: {record['ngram_bits']}, xz: {record['xz_bits']}")


if __name__ == "__main__": main()
