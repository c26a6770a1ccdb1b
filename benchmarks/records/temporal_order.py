"""The record of chapter 04: how often a recurrent network learns the temporal-order task, with and without clipping, against the length.

    python benchmarks/records/temporal_order.py [--again] [--jobs 2]

The setting of Pascanu, Mikolov and Bengio (2013), section 4.1.1, except for two things: the recurrent matrix begins as a random orthogonal one
(theirs are kept for comparison under the name "basic tanh"), and a run ends after UPDATES updates, of which they allowed five million.
What the options mean, and how a record goes on where it stopped: see evidence.py.
"""
import math

import evidence
import numpy as np
import torch
from rnnbook.bptt import BPTTLayer
from rnnbook.gradients import clip_grad_norm_, temporal_order
from torch.nn.functional import cross_entropy

SETTINGS = [*(("orthogonal", length) for length in (20, 30, 40, 50, 75, 100)), ("basic tanh", 20), ("basic tanh", 30)]
SEEDS = range(5)
HIDDEN, BATCH, LR, MAX_NORM, UPDATES, EVERY = 50, 20, 0.01, 1.0, 30_000, 500


def network(initial, rng):
    "Layer and readout: all weights normal with standard deviation 0.1, biases 0; W_hh as `initial` says."
    layer, readout = BPTTLayer(6, HIDDEN), torch.nn.Linear(HIDDEN, 4)
    weights = {"weight_ih": layer.cell.weight_ih, "weight_hh": layer.cell.weight_hh, "readout": readout.weight}
    with torch.no_grad():
        for bias in (layer.cell.bias_ih, layer.cell.bias_hh, readout.bias): bias.zero_()
        for name, weight in weights.items():
            values = 0.1 * rng.standard_normal(weight.shape)
            if name == "weight_hh" and initial == "orthogonal": values = np.linalg.qr(values)[0]
            weight.copy_(torch.from_numpy(values))
    return layer, readout


def answers(layer, readout, x): return readout(layer(torch.from_numpy(x).float())[1][0])  # (B, 4)


def errors(layer, readout, length, sequences, rng):
    "The share of fresh sequences that are classified wrongly."
    wrong = 0
    with torch.no_grad():
        for _ in range(sequences // 1000):
            x, y = temporal_order(length, 1000, rng)
            wrong += int((answers(layer, readout, x).argmax(1).numpy() != y).sum())
    return wrong / sequences


def measure(initial, length, max_norm, seed):
    "One run: how many updates it took, the share of errors at its end, whether it succeeded, the largest gradient norm."
    rng, fresh = np.random.default_rng([seed, length]), np.random.default_rng([seed, length, 1])
    layer, readout = network(initial, rng)
    parameters, largest, update, wrong = [*layer.parameters(), *readout.parameters()], 0.0, 0, 1.0
    for update in range(1, UPDATES + 1):
        x, y = temporal_order(length, BATCH, rng)
        loss = cross_entropy(answers(layer, readout, x), torch.from_numpy(y))
        for p in parameters: p.grad = None
        loss.backward()
        norm = clip_grad_norm_(parameters, max_norm or math.inf, error_if_nonfinite=False).item()
        if not math.isfinite(norm):
            wrong = 1.0
            break
        largest = max(largest, norm)
        with torch.no_grad():
            for p in parameters: p.sub_(p.grad, alpha=LR)
        if update % EVERY == 0 and errors(layer, readout, length, 1000, fresh) < 0.01:
            if (wrong := errors(layer, readout, length, 10_000, fresh)) < 0.01: break
    else: wrong = errors(layer, readout, length, 10_000, fresh)
    return dict(updates=update, errors=wrong, solved=wrong < 0.01, largest_norm=float(f"{largest:.3g}"))


def main():
    chosen = evidence.options(__doc__).parse_args()
    about = dict(hidden=HIDDEN, batch_size=BATCH, lr=LR, updates_allowed=UPDATES, checked_every=EVERY,
                 success="below 1% errors on 10,000 fresh sequences", source="Pascanu, Mikolov, Bengio (2013), arXiv:1211.5063, section 4.1.1 and figure 7")
    jobs = [dict(initial=initial, length=length, max_norm=max_norm, seed=seed) for initial, length in SETTINGS for seed in SEEDS for max_norm in (MAX_NORM, None)]
    record = evidence.run_record(__file__, about, jobs, measure, chosen)
    for initial, length in SETTINGS:
        for max_norm in (MAX_NORM, None):
            solved = [run["solved"] for run in record["runs"] if (run["initial"], run["length"], run["max_norm"]) == (initial, length, max_norm)]
            print(f"{initial}, length {length}, {'clipped' if max_norm else 'not clipped'}: {sum(solved)} of {len(solved)}")


if __name__ == "__main__": main()
