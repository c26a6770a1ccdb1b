"""How fast a recurrent layer is, forward and backward, side by side in one run, one thread, float32.

    .venv/bin/python benchmarks/rnn_speed.py                        print the table
    .venv/bin/python benchmarks/rnn_speed.py --record benchmarks/rnn_speed.json

Seven ways to the same gradients (for x, h0 and every parameter):
  x[t] loop      torch.nn.RNNCell called on x[t] for each step, as in its documentation; the backward pass of x[t] fills a whole
                 gradient of x with zeros for each step
  unbind loop    the same over x.unbind(0), which does not
  RNNCell loop   our readable cell over x.unbind(0)
  RNNLayer       the input projected at once, the rest by autograd
  NumPy          rnn_forward and rnn_backward
  RNNFunction    the hand-written backward pass, through BPTTLayer
  torch.nn.RNN   PyTorch's own
Each lives in a process of its own, as in training, where one layer runs over and over: what one variant leaves behind in the caches
and in the memory allocator does not favor or hinder another. The processes take turns, round after round, one at a time, so that
whatever else the machine does meets them all; in each turn a first run is not timed. The figure is the median over the rounds:
"wall" by the clock on the wall, "cpu" the time for which the thread had a core. On an idle machine the two agree; on a busy one
cpu compares the variants more fairly.
"""
import os

for name in ("OMP", "OPENBLAS", "MKL", "NUMBA"):
    os.environ[f"{name}_NUM_THREADS"] = "1"  # before the libraries are loaded

import argparse
import datetime
import json
import multiprocessing
import platform
import statistics
import sys
import time

import numpy as np
import torch

from records import evidence
from rnnbook.bptt import BPTTLayer, rnn_backward
from rnnbook.rnn import RNNCell, RNNLayer, numpy_params, rnn_forward
from rnnbook.testing import assert_parity

SIZES = [(50, 1, 32, 32), (1000, 16, 32, 64), (100, 32, 64, 128), (256, 64, 256, 512)]  # (T, B, I, H)
NAMES = ["x[t] loop", "unbind loop", "RNNCell loop", "RNNLayer", "NumPy", "RNNFunction", "torch.nn.RNN"]
BARS = {"NumPy": ("x[t] loop", [2, 2, 2, 2]), "RNNFunction": ("torch.nn.RNN", [2, 2, 1.3, 1.1])}


class Loop(torch.nn.Module):
    "A cell called once for each step, as a tutorial would write it."
    def __init__(self, cell, unbind=True):
        super().__init__()
        self.cell, self.unbind = cell, unbind

    def forward(self, x, h0):
        h, outputs = h0[0], []
        for x_t in x.unbind(0) if self.unbind else (x[t] for t in range(len(x))):
            h = self.cell(x_t, h)
            outputs.append(h)
        return torch.stack(outputs), h[None]


def variants(T, B, I, H):
    "Name -> a function without arguments that runs forward and backward and returns the gradients, all from the same weights."
    generator = torch.Generator().manual_seed(0)
    x, h0, d_output, d_state = (torch.randn(shape, generator=generator) for shape in ((T, B, I), (1, B, H), (T, B, H), (1, B, H)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rnn = torch.nn.RNN(I, H)
    params = numpy_params(rnn)

    def by_autograd(module, prefix="cell.", suffix=""):
        module.load_state_dict({f"{prefix}{name.removesuffix('_l0')}{suffix}": torch.from_numpy(p) for name, p in params.items()})
        leaves = x.clone().requires_grad_(), h0.clone().requires_grad_()
        wanted = [*leaves, *module.parameters()]

        def run():
            for tensor in wanted:
                tensor.grad = None
            torch.autograd.backward(module(*leaves), (d_output, d_state))
            return tuple(tensor.grad for tensor in wanted)
        return run

    arrays = [tensor.numpy() for tensor in (x, h0, d_output, d_state)]

    def by_numpy():
        _, _, tape = rnn_forward(arrays[0], params, arrays[1])
        return tuple(rnn_backward(arrays[2], arrays[3], tape).values())

    return {
        "x[t] loop": by_autograd(Loop(torch.nn.RNNCell(I, H), unbind=False)),
        "unbind loop": by_autograd(Loop(torch.nn.RNNCell(I, H))),
        "RNNCell loop": by_autograd(Loop(RNNCell(I, H))),
        "RNNLayer": by_autograd(RNNLayer(I, H)),
        "NumPy": by_numpy,
        "RNNFunction": by_autograd(BPTTLayer(I, H)),
        "torch.nn.RNN": by_autograd(rnn, "", "_l0"),
    }


def work(variants, connection, name):
    "A process that runs one of the `variants`: told a size, it answers with the gradients; told None, with two times in seconds."
    torch.set_num_threads(1)
    while (order := connection.recv()) != "stop":
        if order is not None:
            run = variants(*order)[name]
            connection.send([np.asarray(grad) for grad in run()])
            continue
        run()
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        connection.send((time.perf_counter() - wall, time.process_time() - cpu))


def measure(workers, size, rounds):
    "Median milliseconds of each variant at one size: name -> {wall, cpu}."
    def ask(name, order):
        workers[name].send(order)
        return workers[name].recv()

    grads = {name: ask(name, size) for name in workers}
    for name in workers:
        assert_parity(grads[name], grads[list(workers)[-1]], tol=2e-5, name=name)  # they all compute the same thing
    times = {name: [] for name in workers}
    for turn in range(rounds):
        for name in list(workers) if turn % 2 else list(workers)[::-1]:
            times[name].append(ask(name, None))
    return {name: {clock: round(1e3 * statistics.median(values), 4) for clock, values in zip(("wall", "cpu"), zip(*pairs))}
            for name, pairs in times.items()}


def machine():
    "The kind of machine and the versions, without its name or paths."
    return {
        "date": datetime.date.today().isoformat(), "machine": evidence.machine(),
        "threads": torch.get_num_threads(), "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
        "blas": np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"],
    }


def table(results, clock, bars):
    "The results as text: milliseconds, and how many times as fast as the variant that the bar names."
    heads = {name: f"   {name} against {other}" for name, (other, _) in bars.items()}
    names = list(results[0]["milliseconds"])
    lines = [f"{clock + ' ms':22s}" + "".join(f"{name:>14s}" for name in names) + "".join(heads.values())]
    for i, row in enumerate(results):
        times = {name: row["milliseconds"][name][clock] for name in names}
        line = f"{str(tuple(row['size'])):22s}" + "".join(f"{times[name]:14.2f}" for name in names)
        for name, (other, limits) in bars.items():
            ratio, bar = times[other] / times[name], limits[i]
            verdict = "" if bar is None else f" (bar {bar}, {'met' if ratio >= bar else 'MISSED'})"
            line += f"   {ratio:5.2f}{verdict}".ljust(len(heads[name]))
        lines.append(line)
    return "\n".join(lines)


def main(names=NAMES, bars=BARS, variants=variants, script="rnn_speed.py", about=__doc__):
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="rounds at the largest size; smaller ones take more (default 15)")
    parser.add_argument("--record", help="also write the result to this JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    context, workers, results = multiprocessing.get_context("spawn"), {}, []
    for name in names:
        workers[name], theirs = context.Pipe()
        context.Process(target=work, args=(variants, theirs, name), daemon=True).start()
    for size, factor in zip(SIZES, (20, 2, 6, 1)):
        results.append({"size": size, "rounds": options.rounds * factor, "milliseconds": measure(workers, size, options.rounds * factor)})
        print(f"measured {size}", file=sys.stderr)
    for connection in workers.values():
        connection.send("stop")
    print("(T, B, I, H), float32, forward and backward, all gradients, median of each variant\n")
    print(table(results, "wall", bars), table(results, "cpu", bars), sep="\n\n")
    about = machine()
    print("\n" + ", ".join(f"{name} {value}" for name, value in about.items()))
    if options.record:
        command = f"python benchmarks/{script} --rounds {options.rounds}"
        with open(options.record, "w", encoding="utf-8") as file:
            json.dump({"command": command, **about, "results": results}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
