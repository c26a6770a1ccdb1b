"""The record of chapter 14: what each way to regularize an LSTM gains on Bach's chorales and on a little Shakespeare.

    python benchmarks/records/regularization.py [--again] [--jobs 2]

An LSTM of 128 units predicts the next chord of a chorale (88 notes, each on or off), or the next character of a play of which it has 30,000
characters to learn from. Each kind and strength runs from three seeds, and stops when the validation loss has had no new lowest value for six epochs.
The data: `rnnbook.datasets`, "jsb-chorales" and "tinyshakespeare", and, where music21 is installed (pip install music21;
made with version 10.5.1), the chorales of its corpus. Needs 25 minutes on one core. What the options mean, and how a record goes on
where it stopped: see evidence.py.
"""
import importlib.util
import math
import warnings
from functools import lru_cache, partial

import evidence
import numpy as np
import torch
from rnnbook.datasets import load
from rnnbook.lstm import CellLayer, LSTMCell, set_gate_biases_
from rnnbook.optimizers import Adam, AdamW
from rnnbook.regularization import CellWrapper, LayerNormLSTMCell, RecurrentDropout, VariationalDropout, Zoneout
from rnnbook.sequences import Vocabulary, one_hot, stream_batches
from rnnbook.training import Trainer

H, LR, MAX_NORM, EPOCHS, PATIENCE, SEEDS = 128, 0.01, 1.0, 80, 6, 3
CHORALES, LINES, STEPS, TRAIN, OTHER = 16, 32, 50, 30_000, 20_000  # sequences in a batch; of the text: lines, steps, characters to train on, to test on

KINDS = {  # kind -> strengths tried on the chorales, on the text
    "nothing": ([0], [0]),
    "dropout on the input": ([0.2], []),
    "dropout on the output": ([0.2, 0.4], []),
    "dropout on both, as Zaremba": ([0.2], [0.2]),
    "variational, on both": ([0.2], []),
    "recurrent dropout, one mask": ([0.2, 0.4, 0.6], [0.4]),
    "variational everywhere, as Gal": ([0.2], []),
    "state dropped at every step": ([0.05, 0.2], []),
    "zoneout": ([0.1, 0.3], [0.1]),
    "weight decay (AdamW)": ([0.3, 1.0], []),
    "L2 in the gradient (Adam)": ([1e-4, 1e-3], []),
    "layer normalization": ([0], [0]),
    "label smoothing": ([0.005, 0.02], []),
}


FROM_MUSIC21 = {"nothing": 0, "recurrent dropout, one mask": 0.6, "layer normalization": 0}


class StepDropout(CellWrapper):
    "The wrong place: at every step other entries of h and of c are erased, in the state that is carried on."
    def __init__(self, cell, probability):
        super().__init__(cell)
        self.probability = probability

    def draw(self, projected):
        return torch.nn.functional.dropout(projected.new_ones(*projected.shape[:-1], sum(self.sizes)), self.probability)

    def step(self, projected, state):
        if not self.training: return self.cell.step(projected, state)
        n = sum(self.sizes)
        masks = projected[..., -n:].split(self.sizes, -1)
        return tuple(m * s for m, s in zip(masks, self.cell.step(projected[..., :-n], state)))


class Network(torch.nn.Module):
    "Dropout on the input, a layer, dropout on the output, a readout, whichever of them the kind asks for."
    def __init__(self, size, kind, p):
        super().__init__()
        cell = (LayerNormLSTMCell if kind == "layer normalization" else LSTMCell)(size, H)
        set_gate_biases_(cell, f=1.0)
        if kind in ("recurrent dropout, one mask", "variational everywhere, as Gal"): cell = RecurrentDropout(cell, p)
        if kind.startswith("zoneout"): cell = Zoneout(cell, p)
        if kind == "state dropped at every step": cell = StepDropout(cell, p)
        masked = VariationalDropout if kind.startswith("variational") else torch.nn.Dropout
        both = kind.startswith("variational") or "both" in kind
        self.before = masked(p) if both or kind == "dropout on the input" else torch.nn.Identity()
        self.after = masked(p) if both or kind.endswith("the output") else torch.nn.Identity()
        self.layer, self.readout = CellLayer(cell), torch.nn.Linear(H, size)

    def forward(self, x, state=None, lengths=None):
        output, state = self.layer(self.before(x), state, lengths=lengths)
        return self.readout(self.after(output)), state


class Chorales:
    "Batches of chorales of like lengths, in another order at each reading: x (T, B, 88), y one step ahead, lengths."
    def __init__(self, rolls, size, rng=None):
        self.rolls, self.size, self.rng = [torch.from_numpy(roll).float() for roll in rolls], size, rng

    def __len__(self): return -(-len(self.rolls) // self.size)

    def __iter__(self):
        noise = np.zeros(len(self.rolls)) if self.rng is None else self.rng.uniform(0, 10, len(self.rolls))
        order = np.argsort([len(roll) for roll in self.rolls] + noise)
        groups = [order[k:k + self.size] for k in range(0, len(order), self.size)]
        if self.rng is not None: self.rng.shuffle(groups)
        for group in groups:
            padded = torch.nn.utils.rnn.pad_sequence([self.rolls[i] for i in group])
            yield padded[:-1], padded[1:], [len(self.rolls[i]) - 1 for i in group]


def chorale_loss(smoothing, network, batch, state):
    "Mean over the time steps of the cross-entropy of all 88 notes, in nats."
    x, y, lengths = batch
    logits, _ = network(x, lengths=lengths)
    target = (1 - smoothing) * y + smoothing / 2
    nats = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)
    inside = torch.arange(len(y))[:, None] < torch.tensor(lengths)
    return (nats * inside).sum() / inside.sum(), None


def text_loss(smoothing, network, batch, state):
    "Mean cross-entropy of the next character, in nats; the state is carried on."
    x, y = batch
    logits, state = network(x, state)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), label_smoothing=smoothing), state


def chorales(seed, rolls=lambda: load("jsb-chorales")):
    "Training, validation and test batches, the logits' loss, and the log odds of each note."
    data = rolls()
    on = np.concatenate(data["train"]).mean(0).clip(1e-4)
    parts = Chorales(data["train"], CHORALES, np.random.default_rng(seed)), Chorales(data["valid"], 100), Chorales(data["test"], 100)
    return parts, chorale_loss, np.log(on / (1 - on))


@lru_cache(1)
def music21_rolls():
    """The four-voice chorales of music21's corpus as piano rolls in the original keys, one time step per quarter note (what sounds on it), and split at
    random, always alike: three fifths to train on, one fifth to validate, one fifth to test. Takes a minute."""
    import music21
    names = sorted(music21.corpus.chorales.Iterator(numberingSystem="bwv", returnType="filename"))
    rolls = []
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            score = music21.corpus.parse(name)
        roll = np.zeros((math.ceil(score.duration.quarterLength), 88))
        for note in (note for part in score.parts for note in part.flatten().notes):
            begin, end = math.ceil(note.offset), math.ceil(note.offset + note.duration.quarterLength)
            for pitch in note.pitches: roll[begin:end, pitch.midi - 21] = 1  # key 0 of 88 is A0
        rolls.append(roll)
    order, n = np.random.default_rng(0).permutation(len(rolls)), len(rolls) // 5
    return {part: [rolls[i] for i in ids] for part, ids in dict(test=order[:n], valid=order[n:2 * n], train=order[2 * n:]).items()}


def shakespeare(seed):
    "The same for the text: the first 30,000 characters to train on, the next 20,000 to validate, and 20,000 of the last tenth to test."
    text = load("tinyshakespeare")
    vocabulary, last = Vocabulary.from_text(text), int(0.9 * len(text))
    def batches(start, count):
        ids = vocabulary.encode(text[start:start + count])
        return [(torch.from_numpy(one_hot(x, len(vocabulary), np.float32)), torch.from_numpy(y)) for x, y in stream_batches(ids, LINES, STEPS)], ids
    (train, ids), (valid, _), (test, _) = batches(0, TRAIN), batches(TRAIN, OTHER), batches(last, OTHER)
    return (train, valid, test), text_loss, np.log(np.bincount(ids, minlength=len(vocabulary)) / len(ids) + 1e-5)


def decayed(kind, p, params, lr):
    "The optimizer; weight decay and L2 spare what is not a matrix."
    groups = [dict(params=[q for q in params if q.dim() == 2]), dict(params=[q for q in params if q.dim() != 2], weight_decay=0)]
    return (AdamW if kind.startswith("weight decay") else Adam)(groups, lr=lr, weight_decay=p)


def measure(data, kind, strength, seed):
    "Train until the validation stalls: the losses of the best weights, and the validation along the way."
    (train, valid, test), loss, log_odds = {"chorales": chorales, "shakespeare": shakespeare, "music21": partial(chorales, rolls=music21_rolls)}[data](seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(len(log_odds), kind, strength)
    with torch.no_grad(): network.readout.bias.copy_(torch.from_numpy(log_odds))  # begin with how often each one occurs
    optimizer = partial(decayed, kind, strength) if "decay" in kind or "L2" in kind else Adam
    trainer = Trainer(network, partial(loss, strength if kind == "label smoothing" else 0), optimizer=optimizer, lr=LR, max_norm=MAX_NORM,
                      device="cpu", progress=False, seed=seed)
    plain = Trainer(network, partial(loss, 0), device="cpu", progress=False, seed=seed)  # to measure by, without smoothing
    history = trainer.fit(train, steps=EPOCHS * len(train), validation=lambda _: plain.evaluate(valid), every=len(train), patience=PATIENCE)
    losses = dict(train=plain.evaluate(train), valid=plain.evaluate(valid), test=plain.evaluate(test))
    last = np.mean(history["loss"][-len(train):])
    return dict(epochs=len(history["validation_loss"]), **{name: round(float(value), 4) for name, value in losses.items()},
                last_epoch_with_noise=round(float(last), 4), validation=[round(v, 3) for v in history["validation_loss"]])


def main():
    chosen = evidence.options(__doc__).parse_args()
    about = dict(units=H, lr=LR, max_norm=MAX_NORM, most_epochs=EPOCHS, patience=PATIENCE, optimizer="Adam", forget_bias=1,
                 chorales=dict(source="jsb-chorales: train 229, valid 76, test 77", batch=CHORALES, unit="nats per time step"),
                 shakespeare=dict(source="tinyshakespeare", train=TRAIN, valid=OTHER, test=OTHER, lines=LINES, steps=STEPS, unit="nats per character"))
    jobs = [dict(data=data, kind=kind, strength=strength, seed=seed) for data, column in (("chorales", 0), ("shakespeare", 1))
            for seed in range(SEEDS) for kind in KINDS for strength in KINDS[kind][column]]
    if importlib.util.find_spec("music21"):
        jobs += [dict(data="music21", kind=kind, strength=strength, seed=seed) for seed in range(SEEDS) for kind, strength in FROM_MUSIC21.items()]
    else: print("music21 is not installed (pip install music21): no new runs on its chorales")
    record = evidence.run_record(__file__, about, jobs, measure, chosen)
    for data, kind, strength in dict.fromkeys((run["data"], run["kind"], run["strength"]) for run in record["runs"]):
        runs = [run for run in record["runs"] if (run["data"], run["kind"], run["strength"]) == (data, kind, strength)]
        print(f"{data:12s}{kind:32s}{strength:7} test", [run["test"] for run in runs], "valid", [run["valid"] for run in runs])


if __name__ == "__main__": main()
