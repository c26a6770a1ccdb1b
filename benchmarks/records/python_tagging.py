"""The record of chapter 12: what is this name in a line of Python?

    python benchmarks/records/python_tagging.py [--again] [--jobs 2]

Networks read the lines of Python's standard library with all names hidden, and say of each name whether it is called, assigned, an attribute, ... They
read from the beginning, from the end, or both; or they may answer a few tokens late. The library differs between versions of Python: see `versions`.
Needs 6 minutes on 2 cores. What the options mean, and how a record goes on where it stopped: see evidence.py.
"""
import ast
import functools
import zlib
from pathlib import Path

import evidence
import numpy as np
import torch
from rnnbook.bidirectional import KINDS, PYTHON_TOKENS, Bidirectional, reverse_sequences, tagged_lines
from rnnbook.gru import GRULayer
from rnnbook.lstm import LSTMLayer
from rnnbook.rnn import RNNLayer
from rnnbook.sequences import Vocabulary, pad_sequences

EMBEDDED, B, STEPS, LR, MAX_NORM, LONGEST = 16, 32, 600, 0.01, 1.0, 60
LAYERS = {"rnn": RNNLayer, "lstm": LSTMLayer, "gru": GRULayer}
UNITS = {("rnn", "one"): 104, ("rnn", "both"): 71, ("lstm", "one"): 48, ("lstm", "both"): 32, ("gru", "one"): 57, ("gru", "both"): 38}  # about 12,800 parameters
VOCABULARY = Vocabulary(["", *PYTHON_TOKENS])  # "" follows the last token while an answer is awaited


@functools.cache
def patterns():
    "Lines to train on, shortest first, and lines of other modules that occur in none of those: pairs (ids, kinds), each once."
    parts = {}, {}
    for path in sorted(Path(ast.__file__).parent.glob("*.py")):
        for tokens, kinds in tagged_lines(path.read_text(encoding="utf-8")):
            if any(kinds) and len(tokens) <= LONGEST: parts[zlib.crc32(path.stem.encode()) % 5 == 0].setdefault(tokens, kinds)
    unseen = {tokens: kinds for tokens, kinds in parts[1].items() if tokens not in parts[0]}
    code = {kind: k for k, kind in enumerate(KINDS)} | {None: -100}  # what cross_entropy passes over
    return [sorted(((VOCABULARY.encode(tokens), np.array([code[kind] for kind in kinds])) for tokens, kinds in part.items()), key=lambda pair: len(pair[0]))
            for part in (parts[0], unseen)]


class Tagger(torch.nn.Module):
    "Embedding, recurrent layer, readout."
    def __init__(self, cell, reads, merge):
        super().__init__()
        make, H = LAYERS[cell], UNITS[cell, "both" if "both" in reads else "one"]
        self.embedding = torch.nn.Embedding(len(VOCABULARY), EMBEDDED)
        self.layer = Bidirectional(make(EMBEDDED, H), make(EMBEDDED, H), merge) if "both" in reads else make(EMBEDDED, H)
        self.readout = torch.nn.Linear(2 * H if "both" in reads and merge == "concat" else H, len(KINDS))
        self.flips_padding = "padding" in reads

    def forward(self, ids, lengths):
        return self.readout(self.layer(self.embedding(ids), lengths=None if self.flips_padding else lengths)[0])


def batch(pairs, reads, delay, padding=0):
    "ids, lengths and kinds of some lines, for a network that reads in that way and answers so late."
    (ids, lengths), (kinds, _) = pad_sequences([ids for ids, _ in pairs]), pad_sequences([kinds for _, kinds in pairs], -100)
    if reads == "reverse": ids, kinds = reverse_sequences(ids, lengths), reverse_sequences(kinds, lengths)
    ids = np.pad(ids, ((0, delay + padding), (0, 0)))
    kinds = np.pad(kinds, ((delay, padding), (0, 0)), constant_values=-100)
    return torch.from_numpy(ids), torch.from_numpy(lengths + delay), torch.from_numpy(kinds)


def score(model, pairs, reads, delay, padding=0):
    "For each kind, how many names are of it, how many are said to be, and how many of those rightly."
    found = np.zeros((3, len(KINDS)), int)
    for start in range(0, len(pairs), 256):
        ids, lengths, kinds = batch(pairs[start:start + 256], reads, delay, padding)
        with torch.no_grad(): said = model(ids, lengths).argmax(-1)[kinds >= 0].numpy()
        kinds = kinds[kinds >= 0].numpy()
        found += [np.bincount(names, minlength=len(KINDS)) for names in (kinds, said, kinds[kinds == said])]
    return found.tolist()


def measure(cell, reads, delay, merge, seed):
    "Train one network, and let it tag lines it has not seen."
    train, test = patterns()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Tagger(cell, reads, merge)
    rng, optimizer = np.random.default_rng(seed), torch.optim.Adam(model.parameters(), LR)
    starts = np.arange(0, len(train) - B + 1, B)  # of batches of lines about equally long
    order = np.concatenate([rng.permutation(starts) for _ in range(STEPS // len(starts) + 1)])
    for step, start in enumerate(order[:STEPS]):
        optimizer.param_groups[0]["lr"] = LR * (1 - step / STEPS)
        ids, lengths, kinds = batch(train[start:start + B], reads, delay)
        loss = torch.nn.functional.cross_entropy(model(ids, lengths).flatten(0, 1), kinds.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
    are, said, right = score(model, test, reads, delay)
    result = dict(parameters=sum(p.numel() for p in model.parameters()), accuracy=sum(right) / sum(are), said=said, right=right)
    if model.flips_padding: result["accuracy_more_padding"] = sum(score(model, test, reads, delay, padding=32)[2]) / sum(are)
    return result


def main():
    chosen, (train, test) = evidence.options(__doc__).parse_args(), patterns()
    names = np.bincount(np.concatenate([kinds[kinds >= 0] for _, kinds in test]), minlength=len(KINDS))
    about = dict(kinds=KINDS, lines=len(train), test_lines=len(test), test_names=names.tolist(), embedded=EMBEDDED, batch=B, steps=STEPS, lr=LR,
                 max_norm=MAX_NORM, longest=LONGEST, optimizer="Adam, learning rate falling linearly to 0")
    ways = [("lstm", reads, 0, "concat") for reads in ("forward", "reverse", "both")]
    ways += [("lstm", "forward", delay, "concat") for delay in (1, 2, 4, 8)]
    ways += [("gru", "both", 0, "concat"), ("rnn", "both", 0, "concat")]
    ways += [("lstm", "both", 0, "sum"), ("lstm", "both", 0, "mean"), ("lstm", "both, turned with the padding", 0, "concat")]
    jobs = [dict(cell=cell, reads=reads, delay=delay, merge=merge, seed=seed) for cell, reads, delay, merge in ways for seed in range(5)]
    record = evidence.run_record(__file__, about, jobs, measure, chosen)
    for cell, reads, delay, merge in ways:
        runs = [run for run in record["runs"] if (run["cell"], run["reads"], run["delay"], run["merge"]) == (cell, reads, delay, merge)]
        print(f"{cell:5s} {reads:30s} {delay} late, {merge:6s}", [round(run["accuracy"], 4) for run in runs], [round(run.get("accuracy_more_padding", 0), 4) for run in runs])


if __name__ == "__main__": main()
