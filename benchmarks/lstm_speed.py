"""How fast an LSTM layer is, forward and backward, side by side in one run, one thread, float32.

    .venv/bin/python benchmarks/lstm_speed.py                        print the table
    .venv/bin/python benchmarks/lstm_speed.py --record benchmarks/lstm_speed.json

Five ways to the same gradients (for x, h0, c0 and every parameter):
  x[t] loop       torch.nn.LSTMCell called on x[t] for each step, as tutorials do; the backward pass of x[t] fills a whole gradient
                  of x with zeros for each step
  unbind loop     the same over x.unbind(0), which does not
  LSTMLayer       the inputs projected at once, the rest by autograd
  NumPy           lstm_forward and lstm_backward
  torch.nn.LSTM   PyTorch's own
Measured as in rnn_speed.py: each way lives in a process of its own, the processes take turns, a first run in each turn is not timed,
and the figure is the median over the rounds, "wall" by the clock on the wall and "cpu" the time for which the thread had a core.
"""
from rnn_speed import main  # first: it sets one thread for every library before they are loaded

import numpy as np
import torch

from rnnbook.lstm import LSTMLayer, lstm_backward, lstm_forward
from rnnbook.rnn import numpy_params

NAMES = ["x[t] loop", "unbind loop", "LSTMLayer", "NumPy", "torch.nn.LSTM"]
BARS = {"LSTMLayer": ("x[t] loop", [1.25, 1.25, 1.25, 1.25]), "NumPy": ("x[t] loop", [3, None, None, None])}


class Loop(torch.nn.Module):
    "A cell called once for each step, as a tutorial would write it."
    def __init__(self, cell, unbind=True):
        super().__init__()
        self.cell, self.unbind = cell, unbind

    def forward(self, x, state):
        (h, c), outputs = (s[0] for s in state), []
        for x_t in x.unbind(0) if self.unbind else (x[t] for t in range(len(x))):
            h, c = self.cell(x_t, (h, c))
            outputs.append(h)
        return torch.stack(outputs), (h[None], c[None])


def variants(T, B, I, H):
    "Name -> a function without arguments that runs forward and backward and returns the gradients, all from the same weights."
    generator = torch.Generator().manual_seed(0)
    shapes = (T, B, I), (1, B, H), (1, B, H), (T, B, H), (1, B, H), (1, B, H)
    x, h0, c0, d_output, d_h, d_c = (torch.randn(shape, generator=generator) for shape in shapes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lstm = torch.nn.LSTM(I, H)
    params = numpy_params(lstm)

    def by_autograd(module, prefix="cell.", suffix=""):
        module.load_state_dict({f"{prefix}{name.removesuffix('_l0')}{suffix}": torch.from_numpy(p) for name, p in params.items()})
        leaves = [tensor.clone().requires_grad_() for tensor in (x, h0, c0)]
        wanted = [*leaves, *module.parameters()]

        def run():
            for tensor in wanted:
                tensor.grad = None
            output, state = module(leaves[0], tuple(leaves[1:]))
            torch.autograd.backward((output, *state), (d_output, d_h, d_c))
            return tuple(tensor.grad for tensor in wanted)
        return run

    arrays = [tensor.numpy() for tensor in (x, h0, c0, d_output, d_h, d_c)]

    def by_numpy():
        _, _, tape = lstm_forward(arrays[0], params, tuple(arrays[1:3]))
        return tuple(lstm_backward(arrays[3], tuple(arrays[4:]), tape).values())

    return {
        "x[t] loop": by_autograd(Loop(torch.nn.LSTMCell(I, H), unbind=False)),
        "unbind loop": by_autograd(Loop(torch.nn.LSTMCell(I, H))),
        "LSTMLayer": by_autograd(LSTMLayer(I, H)),
        "NumPy": by_numpy,
        "torch.nn.LSTM": by_autograd(lstm, "", "_l0"),
    }


if __name__ == "__main__":
    main(NAMES, BARS, variants, "lstm_speed.py", __doc__)
