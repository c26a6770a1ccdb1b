"""How fast a GRU layer is, forward and backward, side by side in one run, one thread, float32.

    .venv/bin/python benchmarks/gru_speed.py                        print the table
    .venv/bin/python benchmarks/gru_speed.py --record benchmarks/gru_speed.json

Five ways to the same gradients (for x, h0 and every parameter):
  x[t] loop      torch.nn.GRUCell called on x[t] for each step, as tutorials do; the backward pass of x[t] fills a whole gradient
                 of x with zeros for each step
  unbind loop    the same over x.unbind(0), which does not
  GRULayer       the inputs projected at once, the rest by autograd
  NumPy          gru_forward and gru_backward
  torch.nn.GRU   PyTorch's own
Measured as in rnn_speed.py: each way lives in a process of its own, the processes take turns, a first run in each turn is not timed,
and the figure is the median over the rounds, "wall" by the clock on the wall and "cpu" the time for which the thread had a core.
"""
from rnn_speed import Loop, main  # first: it sets one thread for every library before they are loaded

import torch

from rnnbook.gru import GRULayer, gru_backward, gru_forward
from rnnbook.rnn import numpy_params

NAMES = ["x[t] loop", "unbind loop", "GRULayer", "NumPy", "torch.nn.GRU"]
BARS = {"GRULayer": ("x[t] loop", [1.25, 1.25, 1.25, 1.25]), "NumPy": ("x[t] loop", [3, None, None, None])}


def variants(T, B, I, H):
    "Name -> a function without arguments that runs forward and backward and returns the gradients, all from the same weights."
    generator = torch.Generator().manual_seed(0)
    x, h0, d_output, d_state = (torch.randn(shape, generator=generator) for shape in ((T, B, I), (1, B, H), (T, B, H), (1, B, H)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gru = torch.nn.GRU(I, H)
    params = numpy_params(gru)

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
        _, _, tape = gru_forward(arrays[0], params, arrays[1])
        return tuple(gru_backward(arrays[2], arrays[3], tape).values())

    return {
        "x[t] loop": by_autograd(Loop(torch.nn.GRUCell(I, H), unbind=False)),
        "unbind loop": by_autograd(Loop(torch.nn.GRUCell(I, H))),
        "GRULayer": by_autograd(GRULayer(I, H)),
        "NumPy": by_numpy,
        "torch.nn.GRU": by_autograd(gru, "", "_l0"),
    }


if __name__ == "__main__":
    main(NAMES, BARS, variants, "gru_speed.py", __doc__)
