"""The record of chapter 06: the light switch learned by each optimizer, at 13 learning rates and with 7 random seeds.

    python benchmarks/records/optimizers.py [--again]

Needs 10 minutes on 2 cores. What the options mean, and how a record goes on where it stopped: see evidence.py.
"""
import math

import evidence
import numpy as np
import torch
from rnnbook import optimizers
from rnnbook.rnn import RNNLayer
from torch.nn.functional import binary_cross_entropy_with_logits

KINDS = {
    "SGD": ("SGD", {}), "momentum": ("SGD", dict(momentum=0.9)), "Nesterov": ("SGD", dict(momentum=0.9, nesterov=True)),
    "Adagrad": ("Adagrad", {}), "Adadelta": ("Adadelta", {}), "RMSprop": ("RMSprop", {}), "RMSprop, centered": ("RMSprop", dict(centered=True)),
    "Adam": ("Adam", {}), "AdamW": ("AdamW", {}),
}
RATES = [float(f"{10 ** (k / 2 - 4):.3g}") for k in range(13)]  # 0.0001 to 100
SETTINGS = dict(seeds=7, steps=300, batch=32, length=30, hold=0.9, hidden=8)


def light_switch(steps, batch, rng, hold):
    "Presses (T, B, 1), most of them none, and the light (T, B) that the last press left on or off, as in the chapter."
    press = rng.choice([-1.0, 1.0], (steps, batch)) * (rng.random((steps, batch)) >= hold)
    press[0] = rng.choice([-1.0, 1.0], batch)
    step = np.arange(steps)[:, None]
    last = np.maximum.accumulate(np.where(press != 0, step, 0))
    light = np.take_along_axis(press, last, 0) > 0
    return torch.from_numpy(press[..., None]).float(), torch.from_numpy(light).float()


def loss(module, x, y): return binary_cross_entropy_with_logits(module[1](module[0](x)[0])[..., 0], y)


def one_run(kind, lr, seed):
    "Held-out loss after training, None where it is not finite."
    settings, (name, options), rng = SETTINGS, KINDS[kind], np.random.default_rng(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = torch.nn.ModuleList([RNNLayer(1, settings["hidden"]), torch.nn.Linear(settings["hidden"], 1)])
    optimizer = getattr(optimizers, name)(module.parameters(), lr=lr, **options)
    for _ in range(settings["steps"]):
        optimizer.zero_grad()
        loss(module, *light_switch(settings["length"], settings["batch"], rng, settings["hold"])).backward()
        optimizer.step()
    with torch.no_grad(): found = loss(module, *light_switch(settings["length"], 256, np.random.default_rng(99), settings["hold"])).item()
    return float(f"{found:.4g}") if math.isfinite(found) else None


def measure(optimizer, seed): return dict(losses=[one_run(optimizer, lr, seed) for lr in RATES])


def main():
    chosen = evidence.options(__doc__).parse_args()
    jobs = [dict(optimizer=kind, seed=seed) for seed in range(SETTINGS["seeds"]) for kind in KINDS]
    record = evidence.run_record(__file__, dict(settings=SETTINGS, rates=RATES, optimizers=KINDS), jobs, measure, chosen)
    for kind in KINDS:
        losses = np.array([run["losses"] for run in record["runs"] if run["optimizer"] == kind], float)  # None becomes nan
        median = np.median(np.nan_to_num(losses, nan=np.inf), 0)
        print(f"{kind}: lowest median {median.min():.3g} at {RATES[int(median.argmin())]}")


if __name__ == "__main__": main()
