"""The record of chapter 18: the experiments of Hochreiter and Schmidhuber (1997), and the continual stream of Gers, Schmidhuber and Cummins (2000).

    python benchmarks/records/long_lags.py [--again] [--jobs 1]

How many sequences an LSTM with and without forget gate and a plain recurrent network need until they fulfil each problem's own criterion, and on how
many sequences the trained network is wrong afterwards. Needs about an hour on one core. What the options mean, and how a record goes on where it
stopped: see evidence.py.
"""
from functools import partial

import evidence
import numpy as np
from rnnbook.long_lags import PROBLEMS, answer_errors, embedded_reber, error_free, long_lag_noise, network_forward, reber_problem, reber_strings, solve, solve_continual

SETTINGS = dict(units=16, batch_size=20, lr=0.01)
SEEDS = range(5)
LSTMS = ("LSTM", "LSTM without forget gate")
QUICK = ("2c", "3a", "3b", "6a", "6b", "3c", "4", "1", "5, rough", "5, fine")
RNN_TOO = ("1", "2c", "3a", "4", "6a", "continual")
LAGS = (5, 10, 20, 50, 100, 200, 500)


def problem_of(name, rng):
    "A problem by its name: a key of PROBLEMS, 1, or, as `lag 50`, task 2c with another lag."
    if name == "1": return reber_problem(rng)
    if not name.startswith("lag "): return PROBLEMS[name]
    lag = int(name.removeprefix("lag "))
    draw = partial(long_lag_noise, lag, 50)
    return PROBLEMS["2c"]._replace(draw=draw, longest=lag + 30, test=lambda rng: [draw(1000, rng) for _ in range(10)])


def wrong_after(problem, draw, network, params, rng):
    "How many of 2560 fresh sequences the trained network gets wrong, and its mean error on them."
    errors = []
    for _ in range(20):
        batch = draw(128, rng)
        y, _, _ = network_forward(network, batch.x.astype(np.float32), params, lengths=batch.lengths, every=problem.every)
        errors.extend(answer_errors(y, batch))
    errors = np.array(errors)
    return dict(wrong_of_2560=int((errors >= problem.tolerance).sum()), mean_error=float(f"{errors.mean():.3g}"))


def measure(problem, network, seed, most, **changed):
    "One run: sequences until the criterion was fulfilled, None if it was not; in the continual stream, symbols."
    rng = np.random.default_rng([seed, *problem.encode()])
    if problem == "continual":
        symbols, params = solve_continual(network, rng=rng, most=most, progress=False, **SETTINGS)
        return dict(symbols=symbols, error_free=error_free(network, params, rng).tolist())
    task = problem_of(problem, rng)
    sequences, params, history = solve(task, network, rng=rng, most=most, progress=False, **SETTINGS | changed)
    fresh = (lambda count, rng: embedded_reber(reber_strings(count, rng))) if problem == "1" else task.draw  # its own draws from the training strings
    return dict(sequences=sequences, **wrong_after(task, fresh, network, params, rng))


def jobs():
    "All runs, the first seeds of every problem first."
    runs = []
    def add(name, networks, seed, most, **changed):
        runs.extend(dict(problem=name, network=network, seed=seed, most=most, **changed) for network in networks)
    for seed in SEEDS:
        for name in QUICK:
            add(name, LSTMS, seed, 100_000)
            if name in RNN_TOO: add(name, ["RNN"], seed, 50_000)
        add("continual", (*LSTMS, "RNN"), seed, 2_000_000)
        add("2a", LSTMS, seed, 20_000, batch_size=4, lr=0.02)
        for lag in LAGS: add(f"lag {lag}", (*LSTMS, "RNN"), seed, 20_000)
        add("2b", LSTMS, seed, 50_000)
    return runs


def main():
    chosen = evidence.options(__doc__, jobs=1).parse_args()
    about = dict(**SETTINGS, optimizer="Adam", max_norm=1.0, dtype="float32",
                 source="Hochreiter and Schmidhuber (1997), Neural Computation 9(8), section 5; Gers, Schmidhuber and Cummins (2000), Neural Computation 12(10)")
    record = evidence.run_record(__file__, about, jobs(), measure, chosen)
    for problem in dict.fromkeys(run["problem"] for run in record["runs"]):
        for network in (*LSTMS, "RNN"):
            runs = [run for run in record["runs"] if (run["problem"], run["network"]) == (problem, network)]
            needed = [run["symbols" if problem == "continual" else "sequences"] for run in runs]
            if runs: print(f"{problem:9s} {network:26s} solved {sum(n is not None for n in needed)} of {len(runs)}", needed)


if __name__ == "__main__": main()
