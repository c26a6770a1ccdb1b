"""The record of chapter 11: simple network, GRU and LSTM with equally many parameters on three tasks.

    python benchmarks/records/equal_parameters.py [--again] [--jobs 2]

Adding: the sum of the two marked numbers among 50; the error on 500 fresh sequences. Counting: does a^n b^m end here, that is, is m = n? Trained with n
up to 20, asked for n up to 150; the score is the largest n such that all strings up to it are judged right at each b. Text: the next character of the Python
documentation; bits per character on text held out. Each task is tried with two learning rates. Needs 13 minutes on one core.
What the options mean, and how a record goes on where it stopped: see evidence.py.
"""
import evidence
import numpy as np
from rnnbook.bptt import rnn_backward
from rnnbook.datasets import english_prose
from rnnbook.feedforward import bits_per_character, softmax_cross_entropy, softmax_cross_entropy_backward
from rnnbook.gru import gru_backward, gru_forward, gru_init
from rnnbook.initialization import adding_problem, orthogonal
from rnnbook.lstm import lstm_backward, lstm_forward, lstm_init, set_gate_biases
from rnnbook.rnn import rnn_forward, rnn_init
from rnnbook.sequences import Vocabulary, one_hot, stream_batches, window_batches
from rnnbook.training import train

FUNCTIONS = {"RNN": (rnn_init, rnn_forward, rnn_backward), "GRU": (gru_init, gru_forward, gru_backward), "LSTM": (lstm_init, lstm_forward, lstm_backward)}
CONTENDERS = ["RNN, orthogonal", "GRU", "LSTM", "LSTM, forget bias 1"]
SETTINGS = {  # parameters, sequences a batch, updates, updates between two tests, learning rates
    "adding": dict(parameters=1_000, batch=20, updates=2_000, every=200, rates=[0.003, 0.01]),
    "counting": dict(parameters=500, batch=16, updates=1_500, every=150, rates=[0.01, 0.03]),
    "text": dict(parameters=30_000, batch=20, updates=600, every=100, rates=[0.01, 0.03]),
}
SEEDS, MAX_NORM, ADDING_STEPS, TRAINED_TO, ASKED_TO, TEXT_STEPS = range(5), 1.0, 50, 20, 150, 50


def parameters(kind, I, H, O): return sum(p.size for p in FUNCTIONS[kind][0](I, H, O, rng=np.random.default_rng(0)).values())


def network(contender, I, O, wanted, rng):
    "Kind, units and parameters of the network whose number of parameters comes closest to the one wanted."
    kind = contender.split(",")[0]
    H = min(range(1, 400), key=lambda H: abs(parameters(kind, I, H, O) - wanted))
    params = FUNCTIONS[kind][0](I, H, O, rng=rng, dtype=np.float32)
    if "orthogonal" in contender: params["weight_hh_l0"] = orthogonal((H, H), rng=rng, dtype=np.float32)
    if "forget" in contender: params = set_gate_biases(params, f=1.0)
    return kind, H, params


def run(kind, params, x, state=None, lengths=None):
    "Logits (T, B, O), final state, and a function from their gradients to those of the parameters."
    _, forward, backward = FUNCTIONS[kind]
    output, state, tape = forward(x, params, state, lengths=lengths)

    def back(d_logits):
        rows = d_logits.reshape(-1, d_logits.shape[-1])
        readout = {"weight_ho": rows.T @ output.reshape(len(rows), -1), "bias_ho": rows.sum(0)}
        return backward(d_logits @ params["weight_ho"], None, tape) | readout
    return output @ params["weight_ho"].T + params["bias_ho"], state, back


class Adding:
    inputs, outputs = 2, 1
    def batches(self, rng, size):
        while True: yield [a.astype(np.float32) for a in adding_problem(ADDING_STEPS, size, rng)]

    def loss(self, kind, params, batch):
        logits, _, back = run(kind, params, batch[0])
        error, d_logits = logits[-1] - batch[1], np.zeros_like(logits)
        d_logits[-1] = 2 * error / error.size
        return float((error ** 2).mean()), back(d_logits)

    def score(self, kind, params): return self.loss(kind, params, next(self.batches(np.random.default_rng(10**6), 500)))[0]


def strings(numbers):
    "a^n b^n for each n: letters (T, B, 2), is this the last b? (T, B, 1), is this a b? (T, B, 1), lengths."
    T = 2 * max(numbers)
    t, n = np.arange(T)[:, None], np.array(numbers)
    x = np.stack([t < n, (n <= t) & (t < 2 * n)], axis=2).astype(np.float32)
    return x, (t == 2 * n - 1)[..., None], x[..., 1:] == 1, [2 * n for n in numbers]


class Counting:
    inputs, outputs = 2, 1
    def batches(self, rng, size):
        while True: yield strings(rng.integers(1, TRAINED_TO + 1, size).tolist())

    def loss(self, kind, params, batch):
        x, last, asked, lengths = batch
        logits, _, back = run(kind, params, x, lengths=lengths)
        signed = np.where(last, -logits, logits)[asked]
        d_logits = np.where(asked, (1 / (1 + np.exp(-logits)) - last) / asked.sum(), 0).astype(np.float32)
        return float(np.logaddexp(0, signed).mean()), back(d_logits)

    def score(self, kind, params):
        x, last, asked, lengths = strings(list(range(1, ASKED_TO + 1)))
        right = (((run(kind, params, x, lengths=lengths)[0] > 0) == last) | ~asked).all((0, 2))
        return int(np.append(right, False).argmin())


class Text:
    def __init__(self):
        read, heldout = english_prose()
        vocabulary = Vocabulary.from_text(read + heldout)
        self.read, self.heldout = vocabulary.encode(read), vocabulary.encode(heldout)[:20_000]
        self.inputs = self.outputs = len(vocabulary)

    def batches(self, rng, size): return window_batches(self.read, size, TEXT_STEPS, rng)

    def loss(self, kind, params, batch):
        logits, _, back = run(kind, params, one_hot(batch[0], self.inputs, dtype=np.float32))
        loss, tape = softmax_cross_entropy(logits, batch[1])
        return float(loss), back(softmax_cross_entropy_backward(tape))

    def score(self, kind, params):
        losses, state = [], None
        for x, y in stream_batches(self.heldout, 20, 100):
            logits, state, _ = run(kind, params, one_hot(x, self.inputs, dtype=np.float32), state)
            losses.append(softmax_cross_entropy(logits, y)[0])
        return float(bits_per_character(np.mean(losses)))


TASKS = {"adding": Adding, "counting": Counting, "text": Text}


def measure(task, contender, rate, seed):
    "One run: units, parameters, and the score after every so many updates."
    settings, problem, rng = SETTINGS[task], TASKS[task](), np.random.default_rng([seed, list(TASKS).index(task)])
    kind, H, params = network(contender, problem.inputs, problem.outputs, settings["parameters"], rng)
    scores = []

    def test(run):
        if len(run.history["loss"]) % settings["every"] == 0 and len(scores) < settings["updates"] // settings["every"]:
            scores.append(round(problem.score(kind, run.params), 5))

    train(lambda params, batch, state: (*problem.loss(kind, params, batch), None), params, problem.batches(rng, settings["batch"]),
          lr=rate, max_norm=MAX_NORM, steps=settings["updates"], callbacks=[test], progress=False)
    return dict(units=H, parameters=sum(p.size for p in params.values()), scores=scores)


def best(record, task, contender):
    "The runs at that learning rate whose median last score is best, and the rate."
    sign = -1 if task == "counting" else 1
    def runs(rate): return [run for run in record["runs"] if (run["task"], run["contender"], run["rate"]) == (task, contender, rate)]
    rate = min(SETTINGS[task]["rates"], key=lambda rate: sign * np.median([run["scores"][-1] for run in runs(rate)]))
    return runs(rate), rate


def main():
    chosen = evidence.options(__doc__).parse_args()
    about = dict(settings=SETTINGS, max_norm=MAX_NORM, adding_steps=ADDING_STEPS, trained_to=TRAINED_TO, asked_to=ASKED_TO, text_steps=TEXT_STEPS)
    jobs = [dict(task=task, contender=contender, rate=rate, seed=seed)
            for task, settings in SETTINGS.items() for contender in CONTENDERS for rate in settings["rates"] for seed in SEEDS]
    record = evidence.run_record(__file__, about, jobs, measure, chosen)
    if record["not_run"]: return
    for task in SETTINGS:
        for contender in CONTENDERS:
            runs, rate = best(record, task, contender)
            print(f"{task:9s} {contender:20s} {runs[0]['parameters']} parameters, {runs[0]['units']} units, rate {rate}: {sorted(run['scores'][-1] for run in runs)}")


if __name__ == "__main__": main()
