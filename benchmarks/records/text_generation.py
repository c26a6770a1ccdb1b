"""The record of chapter 40: simple network, GRU, LSTM, and two layers of LSTM on the source of Python's standard library, 3000 steps each, three seeds.

    python benchmarks/records/text_generation.py [--again] [--jobs 2]

Bits per character on the held-out modules, and bits spent on closing brackets, by how long they were open. The text comes with Python, so another
version of Python gives other numbers. What the options mean, and how a record goes on where it stopped: see evidence.py.
"""
import evidence
import numpy as np
import torch
from rnnbook.character_model import ngram_fit, ngram_probabilities, xz_bits
from rnnbook.datasets import python_source
from rnnbook.sequences import Vocabulary, stream_batches
from rnnbook.text_generation import TextModel, bracket_depth, text_init
from rnnbook.training import Trainer

KINDS, SEEDS = [("rnn", 1), ("gru", 1), ("lstm", 1), ("lstm", 2)], (0, 1, 2)
HIDDEN, STRIPS, STEPS, UPDATES, LR = 192, 16, 64, 3000, 6e-3
CLASSES = [(1, 2), (3, 5), (6, 10), (11, 20), (21, 40), (41, 80), (81, 400)]  # of characters for which a bracket was open


def closings(source):
    "Where brackets close, for how many characters they were open, and the class of each."
    depth, since = bracket_depth(source)
    places = 1 + np.flatnonzero(np.diff(depth) < 0)
    distances = since[places - 1] + 1
    return places, [(low <= distances) & (distances <= high) for low, high in CLASSES], depth


def bracket_bits(logits, vocabulary, source):
    "For each class the mean bits spent on a closing bracket; and the mean probability of one after characters where none is open."
    places, inside, depth = closings(source)
    logs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    closes = np.logaddexp.reduce(logs[:, vocabulary.encode(")]}")], axis=1)  # (N,) log-probability of any closing bracket next
    bits = -closes[places - 1] / np.log(2)
    return [round(float(bits[where].mean()), 4) for where in inside], round(float(np.exp(closes[depth == 0]).mean()), 5)


def measure(cell, layers, seed):
    "One network: bits per held-out character, and at closing brackets."
    text, heldout = python_source()
    vocabulary = Vocabulary.from_text(text)
    params = text_init(cell, len(vocabulary), HIDDEN, num_layers=layers, rng=np.random.default_rng(seed))
    model = TextModel.from_numpy(params, vocabulary, cell=cell)
    trainer = Trainer(model, TextModel.loss, lr=lambda done: LR * min(1, 50 * done + 0.01) * (1 - 0.98 * done), max_norm=1.0, device="cpu", progress=False)
    trainer.fit(list(stream_batches(vocabulary.encode(text), STRIPS, STEPS)), steps=UPDATES)
    ids = torch.from_numpy(vocabulary.encode(heldout))[:, None]
    with torch.no_grad(): logits = model.eval()(ids)[0]
    nats = torch.nn.functional.cross_entropy(logits[:-1, 0], ids[1:, 0]).item()
    by_class, false = bracket_bits(logits[:, 0].double().numpy(), vocabulary, heldout)
    return dict(parameters=sum(p.numel() for p in model.parameters()), bits=round(nats / np.log(2), 4), bracket_bits=by_class, closes_when_none_open=false)


def main():
    chosen = evidence.options(__doc__, jobs=2).parse_args()
    text, heldout = python_source()
    vocabulary = Vocabulary.from_text(text)
    ids, (places, inside, _) = vocabulary.encode(text), closings(heldout)
    counted = ngram_probabilities(ngram_fit(ids, len(vocabulary)), vocabulary.encode(heldout))[:, 1:]
    about = dict(hidden=HIDDEN, strips=STRIPS, steps=STEPS, updates=UPDATES, lr=LR, characters=len(text), heldout=len(heldout), classes=CLASSES,
                 brackets=[int(where.sum()) for where in inside],
                 ngram_bits=[round(float(bits), 4) for bits in -np.log2(counted).mean(1)], xz_bits=round(xz_bits(text, heldout), 4))
    jobs = [dict(cell=cell, layers=layers, seed=seed) for seed in SEEDS for cell, layers in KINDS]
    record = evidence.run_record(__file__, about, jobs, measure, chosen)
    for cell, layers in KINDS:
        runs = [run for run in record["runs"] if (run["cell"], run["layers"]) == (cell, layers)]
        if runs: print(cell, layers, "bits", [run["bits"] for run in runs], "brackets", np.median([run["bracket_bits"] for run in runs], 0).round(2))


if __name__ == "__main__": main()
