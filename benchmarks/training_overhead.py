"""What a step through `Trainer` costs more than one in a loop written by hand, with the same clipping and the same optimizer.

    .venv/bin/python benchmarks/training_overhead.py                  print the table
    .venv/bin/python benchmarks/training_overhead.py --record benchmarks/training_overhead.json

The two train twins of one network on the same batches, one thread, float32, without validation, callbacks or progress bar, and take
turns step by step: the batches are drawn from a generator that makes a step by hand before it hands the next batch to `Trainer`. So
whatever else the machine does meets both. A step of `Trainer` is timed from the moment it gets its batch to the moment it asks for the
next one, which is everything it does; a step by hand is timed whole. At the end both have the same losses and the same weights, bit for
bit. The overhead is the difference of the two medians; the bar is 300 µs. "wall" is by the clock on the wall, "cpu" the time for which
the thread had a core: on an idle machine the two agree, on a busy one cpu compares more fairly.
"""
from rnn_speed import machine  # first: it sets one thread for every library before they are loaded

import argparse
import json
import statistics
import time

import numpy as np
import torch

from rnnbook.bptt import BPTTLayer
from rnnbook.gradients import clip_grad_norm_
from rnnbook.optimizers import Adam
from rnnbook.training import Trainer

SIZES = [(10, 8, 2, 8), (50, 32, 32, 64)]  # (T, B, I, H)
BAR, WARM_UP, MAX_NORM, LR = 300, 50, 1.0, 1e-3
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}


class Network(torch.nn.Module):
    "A recurrent layer and a readout."
    def __init__(self, I, H):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer, self.readout = BPTTLayer(I, H), torch.nn.Linear(H, 4)


def compute_loss(module, batch, state):
    x, y = batch
    output, state = module.layer(x, state)
    return torch.nn.functional.cross_entropy(module.readout(output).flatten(0, 1), y.flatten()), state


def read_clocks():
    return {name: clock() for name, clock in CLOCKS.items()}


def measure(T, B, I, H, steps):
    "Microseconds of each step by hand and through `Trainer`: clock -> name -> one for each step."
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(T, B, I, generator=generator), torch.randint(0, 4, (T, B), generator=generator)) for _ in range(20)]
    module, twin = Network(I, H), Network(I, H)
    parameters = list(module.parameters())
    optimizer, state, losses, norms = Adam(parameters, lr=LR), None, [], []
    times = {clock: {"by hand": [], "Trainer": []} for clock in CLOCKS}

    def by_hand(batch):
        nonlocal state
        optimizer.zero_grad()
        loss, state = compute_loss(module, batch, state)
        loss.backward()
        norms.append(clip_grad_norm_(parameters, MAX_NORM).item())
        optimizer.step()
        state = state.detach()
        losses.append(loss.item())

    def batches():
        for k in range(WARM_UP + steps):
            start = read_clocks()
            by_hand(data[k % len(data)])
            middle = read_clocks()
            yield data[k % len(data)]
            end = read_clocks()
            for clock in CLOCKS:
                times[clock]["by hand"].append(1e6 * (middle[clock] - start[clock]))
                times[clock]["Trainer"].append(1e6 * (end[clock] - middle[clock]))

    history = Trainer(twin, compute_loss, lr=LR, max_norm=MAX_NORM, device="cpu", progress=False).fit(batches())
    assert history["loss"] == losses and history["grad_norm"] == norms
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters()))
    return {clock: {name: values[WARM_UP:] for name, values in both.items()} for clock, both in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="interleaved steps at each size (default 200)")
    parser.add_argument("--record", help="also write the result to this JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for size in SIZES:
        times, row = measure(*size, options.steps), {"size": size, "steps": options.steps, "microseconds": {}, "overhead": {}}
        for clock, both in times.items():
            medians = {name: round(statistics.median(values), 1) for name, values in both.items()}
            row["microseconds"][clock] = medians
            row["overhead"][clock] = overhead = round(medians["Trainer"] - medians["by hand"], 1)
            print(f"{str(size):18s} {clock:5s} by hand {medians['by hand']:8.1f} µs, Trainer {medians['Trainer']:8.1f} µs, "
                  f"overhead {overhead:6.1f} µs (bar {BAR}, {'met' if overhead <= BAR else 'MISSED'})")
        results.append(row)
    about = machine()
    print("(T, B, I, H), float32, median of the steps; " + ", ".join(f"{name} {value}" for name, value in about.items()))
    if options.record:
        command = f"python benchmarks/training_overhead.py --steps {options.steps}"
        with open(options.record, "w", encoding="utf-8") as file:
            json.dump({"command": command, **about, "bar": BAR, "results": results}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
