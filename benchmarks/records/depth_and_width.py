"""The record of chapter 13: the same number of parameters as one wide layer or as several narrow ones.

    python benchmarks/records/depth_and_width.py [--again] [--jobs 2]

LSTMs with 30,000 parameters read the source of Python's standard library and say the next character. They differ in the number of layers, and in whether
residual connections lead around the layers. Needs 10 minutes on one core. What the options mean, and how a record goes on where it stopped: see evidence.py.
"""
import evidence
import numpy as np
import torch
from rnnbook.datasets import python_source
from rnnbook.lstm import LSTMLayer, set_gate_biases_
from rnnbook.sequences import Vocabulary, stream_batches
from rnnbook.stacked import Stacked

PARAMETERS, EMBEDDING, BATCH, STEPS, BATCHES, EVERY, MAX_NORM = 30_000, 16, 32, 40, 600, 100, 1.0
TRAIN, HELDOUT = 1_000_000, 50_000
RATE, RATES, PILOT = 0.02, (0.01, 0.02, 0.04), 100
FORMS = [(1, False), (2, False), (4, False), (8, False), (2, True), (4, True), (8, True)]


def count(layers, hidden, vocabulary):
    "Parameters of the whole network."
    sizes = [EMBEDDING] + [hidden] * (layers - 1)
    return vocabulary * EMBEDDING + sum(4 * hidden * (size + hidden + 2) for size in sizes) + vocabulary * (hidden + 1)


def widest(layers, vocabulary):
    "The most units a layer can have with no more than PARAMETERS in all."
    hidden = 1
    while count(layers, hidden + 1, vocabulary) <= PARAMETERS: hidden += 1
    return hidden


class Network(torch.nn.Module):
    "What `Stacked` computes, with each layer by torch.nn.LSTM, which has no residual connections but compiled code."
    def __init__(self, layers, hidden, vocabulary, residual):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, EMBEDDING)
        self.layers = torch.nn.ModuleList([torch.nn.LSTM(hidden if k else EMBEDDING, hidden) for k in range(layers)])
        for layer in self.layers: set_gate_biases_(layer, f=1.0)
        self.readout, self.residual = torch.nn.Linear(hidden, vocabulary), residual

    def forward(self, ids, states):
        x, finals = self.embedding(ids), []
        for k, layer in enumerate(self.layers):
            y, final = layer(x, states[k])
            finals.append(final)
            x = y + x if self.residual and k else y
        return self.readout(x), finals


def is_stacked(network):
    "Raise unless `Stacked` with the same weights gives the same answer."
    hidden, x = network.readout.in_features, torch.randn(7, 3, EMBEDDING, generator=torch.Generator().manual_seed(0))
    stack = Stacked([LSTMLayer(hidden if k else EMBEDDING, hidden) for k in range(len(network.layers))], residual=network.residual)
    stack.load_state_dict(dict(zip(stack.state_dict(), network.layers.state_dict().values(), strict=True)))
    y = x
    for k, layer in enumerate(network.layers): y = layer(y)[0] + (y if network.residual and k else 0)
    torch.testing.assert_close(stack(x)[0], y)


def texts():
    "Training and held-out characters as ids, and the size of the vocabulary."
    train, heldout = python_source()
    vocabulary = Vocabulary.from_text(train + heldout)
    return vocabulary.encode(train[:TRAIN]), vocabulary.encode(heldout[:HELDOUT]), len(vocabulary)


def bits(network, x, y, states):
    "Bits per character and the states behind the last step, cut off from what came before."
    logits, states = network(torch.from_numpy(x), states)
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(y).flatten())
    return nats / np.log(2), [tuple(part.detach() for part in state) for state in states]


def measure(layers, residual, lr, seed):
    "Train; bits per held-out character, and those of the training batches on the way."
    train, heldout, vocabulary = texts()
    none, hidden = [None] * layers, widest(layers, vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(layers, hidden, vocabulary, residual)
    is_stacked(network)
    optimizer = torch.optim.Adam(network.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, BATCHES)
    start = np.random.default_rng(seed).integers(0, len(train) - BATCH * (STEPS * BATCHES + 1))
    batches, states, losses = stream_batches(train[start:], BATCH, STEPS), none, []
    for _ in range(BATCHES):
        loss, states = bits(network, *next(batches), states)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), MAX_NORM)
        optimizer.step(); schedule.step()
        losses.append(loss.item())
    found, states = [], none
    with torch.no_grad():
        for x, y in stream_batches(heldout, 50, 100):
            loss, states = bits(network, x, y, states)
            found.append(loss.item())
    return dict(hidden=hidden, parameters=sum(p.numel() for p in network.parameters()), bits=round(float(np.mean(found)), 4),
                training=[round(float(np.mean(part)), 4) for part in np.split(np.array(losses), BATCHES // EVERY)])


def main():
    chosen = evidence.options(__doc__, jobs=1).parse_args()
    about = dict(task="next character of the standard library's source", train_characters=TRAIN, heldout_characters=HELDOUT, most_parameters=PARAMETERS,
                 embedding=EMBEDDING, batch=BATCH, steps=STEPS, batches=BATCHES, training_mean_over=EVERY, max_norm=MAX_NORM, forget_bias=1,
                 optimizer="Adam, rate falling linearly to 1%", rates=RATES, pilot_seed=PILOT)
    trials = [dict(layers=layers, residual=residual, lr=lr, seed=PILOT) for layers, residual in FORMS for lr in RATES]
    runs = [dict(layers=layers, residual=residual, lr=RATE, seed=seed) for seed in range(5) for layers, residual in FORMS]
    record = evidence.run_record(__file__, about, runs + trials, measure, chosen)
    for layers, residual in FORMS:
        own = [run for run in record["runs"] if (run["layers"], run["residual"]) == (layers, residual)]
        print(layers, "layers", "residual" if residual else "plain", [run["bits"] for run in own if run["seed"] != PILOT],
              {run["lr"]: run["bits"] for run in own if run["seed"] == PILOT})


if __name__ == "__main__": main()
