"""The record of chapter 05: the adding problem from nine starts.

    python benchmarks/records/adding_problem.py [--again] [--jobs 2]

Recurrent networks of 100 units read T steps and say the sum of the two marked numbers. They differ in the recurrent matrix they start from, and in tanh
or ReLU. Needs 20 minutes on 2 cores. What the options mean, and how a record goes on where it stopped: see evidence.py.
"""
import math

import evidence
import numpy as np
import torch
from rnnbook.bptt import BPTTLayer
from rnnbook.initialization import adding_problem, eye_, kaiming_normal_, orthogonal_, scale_spectral_radius_, xavier_normal_, xavier_uniform_

H, B, SEQUENCES, EVERY, LR, MAX_NORM, SOLVED = 100, 20, 40_000, 2_000, 3e-4, 1.0, 1 / 60

STARTS = {  # name -> nonlinearity and what fills the recurrent matrix; None: all parameters as torch.nn.RNN draws them
    "torch's default, tanh": ("tanh", None),
    "small Gaussian, tanh": ("tanh", lambda W: torch.nn.init.normal_(W, 0, 0.01)),
    "Xavier, tanh": ("tanh", xavier_normal_),
    "spectral radius 1, tanh": ("tanh", lambda W: scale_spectral_radius_(xavier_normal_(W), 1.0)),
    "orthogonal, tanh": ("tanh", orthogonal_),
    "identity, tanh": ("tanh", eye_),
    "He, ReLU": ("relu", lambda W: kaiming_normal_(W, nonlinearity="relu")),
    "orthogonal, ReLU": ("relu", orthogonal_),
    "identity, ReLU": ("relu", eye_),
}


def network(start, seed):
    "A recurrent layer and its readout, as they are before training."
    nonlinearity, fill_ = STARTS[start]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer, readout = BPTTLayer(2, H, nonlinearity=nonlinearity), torch.nn.Linear(H, 1)
        if fill_:
            for bias in (layer.cell.bias_ih, layer.cell.bias_hh, readout.bias): torch.nn.init.zeros_(bias)
            xavier_uniform_(layer.cell.weight_ih, gain=0.1)
            xavier_uniform_(readout.weight)
            fill_(layer.cell.weight_hh)
    return layer, readout


def batch(steps, size, rng): return [torch.from_numpy(array).float() for array in adding_problem(steps, size, rng)]


def measure(start, steps, lr, seed):
    "Train until solved, exploded, or the sequences are used up: the test error along the way."
    layer, readout = network(start, seed)
    parameters = [*layer.parameters(), *readout.parameters()]
    optimizer, rng, errors, outcome = torch.optim.Adam(parameters, lr), np.random.default_rng(seed), [], "not solved"
    test_x, test_y = batch(steps, 1000, np.random.default_rng(10**6 + steps))
    for used in range(B, SEQUENCES + 1, B):
        x, y = batch(steps, B, rng)
        optimizer.zero_grad()
        (readout(layer(x)[1][0]) - y).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        if not norm.isfinite(): outcome = "exploded"; break
        optimizer.step()
        if used % EVERY == 0:
            with torch.no_grad(): error = (readout(layer(test_x)[1][0]) - test_y).square().mean().item()
            errors.append(float(f"{error:.4g}") if math.isfinite(error) else None)
            if error < SOLVED: outcome = "solved"; break
    return dict(outcome=outcome, sequences=used, errors=errors)


def main():
    chosen = evidence.options(__doc__).parse_args()
    about = dict(units=H, batch=B, most_sequences=SEQUENCES, error_every=EVERY, max_norm=MAX_NORM, solved_below=SOLVED, optimizer="Adam",
                 inputs="Xavier uniform, gain 0.1; readout Xavier uniform; biases 0; except for torch's default")
    pilot = 100  # a seed of its own for the other learning rates
    jobs = [dict(start=start, steps=steps, lr=LR, seed=seed) for steps in (100, 150, 200) for start in STARTS for seed in range(5)]
    other_rates = [dict(start=start, steps=100, lr=lr, seed=pilot) for start in STARTS for lr in (1e-4, 1e-3)]
    record = evidence.run_record(__file__, about, jobs + other_rates, measure, chosen)
    for start in STARTS:
        for steps in (100, 150, 200):
            runs = [run for run in record["runs"] if (run["start"], run["steps"]) == (start, steps) and run["seed"] != pilot]
            print(f"{start:24s} T = {steps}: solved {sum(run['outcome'] == 'solved' for run in runs)} of {len(runs)}", [run["sequences"] for run in runs])


if __name__ == "__main__": main()
