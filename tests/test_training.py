"The training loop: one path in NumPy and PyTorch, every way to stop, and what must not be touched."
import csv
import dataclasses
import functools
import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from rnnbook.bptt import BPTTLayer, rnn_backward
from rnnbook.feedforward import linear_backward, linear_forward, softmax_cross_entropy, softmax_cross_entropy_backward
from rnnbook.gradients import clip_grad_norm
from rnnbook.optimizers import SGD, Adagrad, Adam, adagrad, adam, sgd
from rnnbook.rnn import RNNLayer, numpy_params, rnn_forward
from rnnbook.testing import assert_parity
from rnnbook.training import CSVLog, Diverged, History, Trainer, train

quiet = functools.partial(train, progress=False)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Threads that wait for work beside networks this small take more time than the work."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Reader(torch.nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.layer, self.readout = BPTTLayer(2, 5, dtype=dtype), torch.nn.Linear(5, 3, dtype=dtype)


def reader(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Reader(**options)


def torch_loss(module, batch, state):
    x, y = batch
    output, state = module.layer(x, state)
    return torch.nn.functional.cross_entropy(module.readout(output).flatten(0, 1), y.flatten()), state


def numpy_loss(params, batch, state):
    x, y = batch
    output, state, tape = rnn_forward(x, params, state)
    logits, readout = linear_forward(output, params["weight_ho"], params["bias_ho"])
    loss, entropy = softmax_cross_entropy(logits, y)
    d = linear_backward(softmax_cross_entropy_backward(entropy), readout)
    return loss, rnn_backward(d["x"], None, tape) | {"weight_ho": d["weight"], "bias_ho": d["bias"]}, state


def stream(count=30, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((6, 4, 2)).astype(dtype), rng.integers(0, 3, (6, 4))) for _ in range(count)]


def bowl(params, batch, state):
    "A quadratic: loss |w|²/2, gradient w."
    return float((params["w"] ** 2).sum() / 2), {"w": params["w"]}, state


W = {"w": np.array([3.0, -4.0])}


# ---- one path


@pytest.mark.parametrize("numpy_optimizer, torch_optimizer", [(sgd, SGD), (adagrad, Adagrad), (adam, Adam), (adam, torch.optim.Adam)])
@pytest.mark.parametrize("max_norm", [None, 0.05, 10.0])
@pytest.mark.parametrize("lr", [0.1, lambda done: 0.1 * (1 - done)], ids=["constant", "falling"])
def test_numpy_and_torch_take_one_path(numpy_optimizer, torch_optimizer, max_norm, lr):
    module, options = reader(), dict(lr=lr, max_norm=max_norm, progress=False)
    params, by_numpy = train(numpy_loss, numpy_params(module), stream(12), optimizer=numpy_optimizer, **options)
    by_torch = Trainer(module, torch_loss, optimizer=torch_optimizer, device="cpu", **options).fit(stream(12))
    for name in ("step", "loss", "grad_norm", "lr"):
        assert len(by_numpy[name]) == len(by_torch[name]) == 12
        assert_parity(np.array(by_torch[name], float), np.array(by_numpy[name], float), tol=1e-9, name=name)
    assert_parity(numpy_params(module), params, tol=1e-9)
    assert_parity(by_torch.state, by_numpy.state, tol=1e-9)


def test_trainer_is_the_bare_loop():
    by_hand, module = reader(), reader()
    optimizer, state, losses, norms = torch.optim.Adam(by_hand.parameters(), lr=0.01), None, [], []
    for x, y in stream():
        optimizer.zero_grad()
        loss, state = torch_loss(by_hand, (torch.from_numpy(x), torch.from_numpy(y)), state)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.3).item())
        optimizer.step()
        state = state.detach()
        losses.append(loss.item())
    history = Trainer(module, torch_loss, optimizer=torch.optim.Adam, lr=0.01, max_norm=0.3, device="cpu", progress=False).fit(stream())
    assert_parity(np.array(history["loss"]), np.array(losses), tol=1e-12)
    assert_parity(np.array(history["grad_norm"]), np.array(norms), tol=1e-12)
    assert_parity(numpy_params(module), numpy_params(by_hand), tol=1e-12)


def test_train_is_the_bare_loop():
    params, state, memory, losses = dict(W), None, None, []
    for _ in range(10):
        loss, grads, state = bowl(params, None, state)
        grads, _ = clip_grad_norm(grads, 1.0)
        params, memory = adam(params, grads, memory, lr=0.1)
        losses.append(loss)
    trained, history = quiet(bowl, W, range(10), lr=0.1, max_norm=1.0)
    assert history["loss"] == losses and history["loss"][0] == 12.5 and history["grad_norm"][0] == 5.0
    assert_parity(trained, params, tol=0)


def test_two_fits_are_one_long_one():
    batches, once, twice = stream(), reader(), reader()
    Trainer(once, torch_loss, device="cpu", progress=False).fit(batches)
    trainer = Trainer(twice, torch_loss, device="cpu", progress=False)
    first = trainer.fit(batches[:13])
    trainer.fit(batches[13:], state=first.state)
    assert_parity(numpy_params(twice), numpy_params(once), tol=0)


def test_float32_stays_float32():
    module = reader(dtype=torch.float32)
    params, _ = quiet(numpy_loss, numpy_params(module), stream(3, dtype=np.float32), lr=lambda done: np.float64(0.1), max_norm=np.float64(0.1))
    assert all(p.dtype == np.float32 for p in params.values())


# ---- what must not be touched


def test_arguments_and_random_states_are_left_alone():
    np.random.seed(5)
    before, torch_before = np.random.get_state(), torch.get_rng_state()
    start, batches = numpy_params(reader()), stream(3)
    copies = {name: p.copy() for name, p in start.items()}
    quiet(numpy_loss, start, batches)
    Trainer(reader(), torch_loss, progress=False).fit(batches)
    assert_parity(start, copies, tol=0)
    assert (np.random.get_state()[1] == before[1]).all() and np.random.get_state()[2] == before[2]
    assert torch.equal(torch.get_rng_state(), torch_before)


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_frozen_parameters(training):
    module = reader().train(training)
    module.readout.weight.requires_grad_(False)
    frozen, modes = module.readout.weight.clone(), []
    def loss(module, batch, state):
        modes.append(module.training)
        return torch_loss(module, batch, state)
    Trainer(module, loss, progress=False).fit(stream(2))
    assert modes == [True, True] and module.training is training
    assert torch.equal(module.readout.weight, frozen)


def test_signal_handler_is_put_back():
    before = signal.getsignal(signal.SIGINT)
    quiet(bowl, W, [1])
    with pytest.raises(Diverged):
        quiet(lambda *a: (math.nan, {"w": W["w"]}, None), W, [1])
    assert signal.getsignal(signal.SIGINT) is before


# ---- batches and state


def recorder(seen):
    def loss_and_grads(params, batch, state):
        seen.append((batch, state))
        return 0.0, {"w": np.zeros(2)}, f"after {batch}"
    return loss_and_grads


def test_a_list_is_read_again_and_an_iterator_is_not():
    seen = []
    _, history = quiet(recorder(seen), W, ["a", "b"], steps=3, state="s")
    assert seen == [("a", "s"), ("b", "after a"), ("a", "s")] and history.stopped == "steps" and history.state == "after a"
    _, history = quiet(recorder(seen), W, ["a", "b"])
    assert history.stopped == "batches" and len(history["step"]) == 2
    _, history = quiet(recorder(seen), W, iter(["a", "b"]), steps=9)
    assert history.stopped == "batches" and len(history["step"]) == 2


def test_no_batch_is_taken_and_thrown_away():
    batches = iter(range(100))
    quiet(bowl, W, batches, steps=7)
    assert next(batches) == 7
    quiet(bowl, W, batches, seconds=1e-9)
    assert next(batches) == 9


def test_a_collection_that_runs_dry_ends_the_run():
    class Once:
        left = [1, 2]
        def __iter__(self):
            while self.left: yield self.left.pop()
    _, history = quiet(bowl, W, Once(), steps=100)
    assert history.stopped == "batches" and len(history["step"]) == 2


def test_nested_batches_and_states():
    module = torch.nn.Linear(2, 2, dtype=torch.float64)
    def loss(module, batch, state):
        assert isinstance(batch["x"][0], torch.Tensor) and batch["name"] == "b" and batch["x"][0].device.type == "cpu"
        if state is not None:
            assert not state["h"][0].requires_grad and state["count"] == 1
        y = module(batch["x"][0])
        return y.square().mean(), {"h": (y, None), "count": 1}
    history = Trainer(module, loss, device="cpu", progress=False).fit([{"x": (np.ones((3, 2)), torch.ones(1)), "name": "b"}], steps=4)
    assert history.state["h"][0].shape == (3, 2) and not history.state["h"][0].requires_grad


def test_grads_may_hold_more_but_not_less():
    quiet(lambda p, b, s: (0.0, {"w": np.zeros(2), "x": np.full(9, np.nan)}, s), W, [1])
    with pytest.raises(ValueError, match="'w'"):
        quiet(lambda p, b, s: (0.0, {"v": np.zeros(2)}, s), W, [1])


# ---- stopping


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nonfinite_stops_before_the_update(bad, where):
    def loss_and_grads(params, batch, state):
        loss, grads, state = bowl(params, batch, state)
        if batch == 4 and where == "loss":
            loss = bad
        if batch == 4 and where == "gradient":
            grads = {"w": np.array([bad, 0.0])}
        return loss, grads, state
    expected, _ = quiet(bowl, W, range(4), lr=0.1)
    with pytest.raises(Diverged, match=r"step 5, batch 5 .*gradient norm.* at step 1\), most of it in w with (nan|inf|\d)") as caught:
        quiet(loss_and_grads, W, range(10), lr=0.1, max_norm=1e9)
    assert_parity(caught.value.params, expected, tol=0)
    assert caught.value.history["step"] == [1, 2, 3, 4]

    w = torch.nn.Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64))
    module = torch.nn.Module()
    module.w = w
    def loss(module, batch, state):
        scale = torch.tensor(bad if batch == 4 else 1.0, dtype=torch.float64)
        return ((w**2).sum() / 2 * scale if where == "loss" else (w**2).sum() / 2 + _BadGradient.apply(w, scale)), state
    trainer = Trainer(module, loss, lr=0.1, device="cpu", progress=False)
    with pytest.raises(Diverged, match="step 5, batch 5 of its reading.* most of it in w with"):
        trainer.fit(range(10))
    assert_parity(w, expected["w"])
    assert len(trainer.history["step"]) == 4


class _BadGradient(torch.autograd.Function):
    "0 whose gradient is 0 times `scale`, so not finite where the scale is not."
    @staticmethod
    def forward(ctx, w, scale):
        ctx.save_for_backward(scale)
        return w.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        scale, = ctx.saved_tensors
        return (torch.zeros(2, dtype=torch.float64) * scale), None


def press_at(batches, at, times=1):
    for k, batch in enumerate(batches, 1):
        if k == at:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        yield batch


def test_interrupt_finishes_the_step():
    params, history = quiet(bowl, W, press_at(range(100), at=5), lr=0.1)
    assert history.stopped == "interrupt" and history["step"] == [1, 2, 3, 4, 5]
    assert_parity(params, quiet(bowl, W, range(5), lr=0.1)[0], tol=0)


def test_second_interrupt_stops_at_once():
    params, history = quiet(bowl, W, press_at(range(100), at=5, times=2), lr=0.1)
    assert history.stopped == "interrupt" and history["step"] == [1, 2, 3, 4]
    assert_parity(params, quiet(bowl, W, range(4), lr=0.1)[0], tol=0)


def test_interrupt_in_the_middle_of_an_optimizer_leaves_no_half_update():
    class Pressed(SGD):
        def update(self, p, g, state, group):
            super().update(p, g, state, group)
            if presses:
                presses.pop()
                signal.raise_signal(signal.SIGINT)
    presses, module, expected = [1], reader(), reader()
    trainer = Trainer(module, torch_loss, optimizer=Pressed, lr=0.1, device="cpu", progress=False)
    assert trainer.fit(stream()).stopped == "interrupt"
    Trainer(expected, torch_loss, optimizer=SGD, lr=0.1, device="cpu", progress=False).fit(stream(1))
    assert_parity(numpy_params(module), numpy_params(expected), tol=0)


def test_keyboard_interrupt_raised_by_the_users_code():
    def impatient(params, batch, state):
        if batch == 3:
            raise KeyboardInterrupt
        return bowl(params, batch, state)
    _, history = quiet(impatient, W, range(10))
    assert history.stopped == "interrupt" and len(history["step"]) == 3


def test_a_handler_of_the_users_own_is_respected():
    calls, before = [], signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *_: calls.append(1))
    try:
        _, history = quiet(bowl, W, press_at(range(10), at=5))
    finally:
        signal.signal(signal.SIGINT, before)
    assert calls == [1] and history.stopped == "batches" and len(history["step"]) == 10


def test_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(quiet(bowl, W, range(3))[1].stopped))
    thread.start(); thread.join()
    assert results == ["batches"]


def test_seconds():
    _, history = quiet(bowl, W, [1], seconds=0.05)
    assert history.stopped == "seconds" and history["seconds"][-1] >= 0.05 > (history["seconds"][-2] if len(history["step"]) > 1 else 0)
    _, history = quiet(bowl, W, [1], seconds=60, steps=3)
    assert history.stopped == "steps" and len(history["step"]) == 3


# ---- the learning rate


def test_rate_is_a_function_of_the_share():
    shares = []
    def lr(done):
        shares.append(done)
        return 0.1
    quiet(bowl, W, [1], steps=4, lr=lr)
    quiet(bowl, W, [1, 2], lr=lr)  # a list has a length
    assert shares == [0, 0.25, 0.5, 0.75, 0, 0.5]
    shares.clear()
    _, history = quiet(bowl, W, [1], seconds=0.05, lr=lr)
    assert_parity(np.array(shares[1:]), np.array(history["seconds"][:-1]) / 0.05)


@pytest.mark.parametrize("options, name", [
    (dict(steps=0), "steps"), (dict(steps=-3), "steps"), (dict(seconds=0), "seconds"), (dict(seconds=math.nan), "seconds"), (dict(seconds=math.inf), "seconds"),
    (dict(lr=-0.1), "lr"), (dict(lr=math.nan), "lr"), (dict(lr=lambda done: -1.0), "lr"), (dict(max_norm=0), "max_norm"), (dict(max_norm=-1.0), "max_norm"),
])
def test_errors_name_the_argument(options, name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        quiet(bowl, W, [1], **options)
    limits = {key: options.pop(key) for key in list(options) if key in ("steps", "seconds")}
    with pytest.raises(ValueError, match=f"{name}: expected"):
        Trainer(reader(), torch_loss, progress=False, **options).fit(stream(1), **limits)


def test_no_batches_and_no_length():
    for nothing in ([], iter([])):
        with pytest.raises(ValueError, match="batches: expected at least one"):
            quiet(bowl, W, nothing, steps=5)
    with pytest.raises(ValueError, match="lr: a function"):
        quiet(bowl, W, iter([1]), lr=lambda done: 0.1)


# ---- what people see


def test_progress_and_silence(capsys):
    quiet(bowl, W, range(3))
    Trainer(reader(), torch_loss, progress=False).fit(stream(2))
    assert capsys.readouterr() == ("", "")
    train(bowl, W, range(3))
    Trainer(reader(), torch_loss, device="cpu").fit(stream(2), seconds=0.01)
    out, err = capsys.readouterr()
    assert out == "device: cpu\n" and "3/3" in err and "loss" in err and "0/0 s" in err and err.count("steps/s") >= 2


def test_the_bar_is_drawn_seldom(capsys):
    train(bowl, W, range(20000))
    assert capsys.readouterr().err.count("\r") < 200


def test_history_is_a_dict_of_lists():
    history = History()
    assert dict(history) == {name: [] for name in ("step", "loss", "grad_norm", "lr", "seconds", "validation_step", "validation_loss")}
    assert history.stopped is None and history.state is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_parity():
    module, options = reader(), dict(lr=0.01, max_norm=0.3, progress=False)
    params, by_numpy = train(numpy_loss, numpy_params(module), stream(), **options)
    trainer = Trainer(module, torch_loss, **options)
    by_torch = trainer.fit(stream())
    assert trainer.device.type == "cuda" and by_torch.state.device.type == "cuda"
    assert_parity(np.array(by_torch["loss"]), np.array(by_numpy["loss"]), tol=1e-10)
    assert_parity(numpy_params(module), params, tol=1e-10)


# ---- validation, patience, best weights


def falling_then_rising(params):
    "Lowest where w has shrunk to the length 2."
    return abs(float(np.linalg.norm(params["w"])) - 2.0)


def test_validation_keeps_the_best_and_patience_stops():
    seen = []
    params, history = quiet(bowl, W, [1], optimizer=sgd, lr=0.1, steps=100, validation=lambda p: seen.append(p) or falling_then_rising(p),
                            every=2, patience=3)
    best = int(np.argmin(history["validation_loss"]))
    assert history.stopped == "patience" and history["validation_step"] == list(range(2, 2 * best + 9, 2)) and history["step"][-1] == 2 * best + 8
    assert history["validation_loss"] == [falling_then_rising(p) for p in seen]
    assert_parity(params, seen[best], tol=0)
    assert_parity(params, quiet(bowl, W, [1], optimizer=sgd, lr=0.1, steps=2 * (best + 1))[0], tol=0)


def test_the_last_step_is_validated_once():
    for steps, expected in ((7, [3, 6, 7]), (6, [3, 6]), (2, [2])):
        _, history = quiet(bowl, W, [1], steps=steps, validation=falling_then_rising, every=3)
        assert history["validation_step"] == expected and history.stopped == "steps"
    _, history = quiet(bowl, W, iter(range(4)), validation=falling_then_rising, every=3)
    assert history["validation_step"] == [3, 4] and history.stopped == "batches"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_finite_is_never_the_best(bad):
    losses = iter([bad, 3.0, 2.0, bad, 5.0, bad])
    params, history = quiet(bowl, W, [1], steps=100, validation=lambda p: next(losses), every=1, patience=3)
    assert history.stopped == "patience" and history["step"][-1] == 6
    assert_parity(params, quiet(bowl, W, [1], steps=3)[0], tol=0)
    params, history = quiet(bowl, W, [1], steps=9, validation=lambda p: bad, every=1, patience=4)
    assert history["step"][-1] == 4
    assert_parity(params, quiet(bowl, W, [1], steps=4)[0], tol=0)  # there is no best: the last


def test_validation_on_batches_is_the_mean_loss_with_a_carried_state():
    module, batches, held_out = reader(), stream(4), stream(3, seed=9)
    params, by_numpy = quiet(numpy_loss, numpy_params(module), batches, validation=held_out, every=2)
    trainer = Trainer(module, torch_loss, device="cpu", progress=False)
    by_torch = trainer.fit(batches, validation=held_out, every=2)
    assert by_numpy["validation_step"] == by_torch["validation_step"] == [2, 4]
    assert_parity(np.array(by_torch["validation_loss"]), np.array(by_numpy["validation_loss"]), tol=1e-12)
    losses, state = [], None
    for batch in held_out:
        loss, _, state = numpy_loss(params, batch, state)
        losses.append(loss)
    assert_parity(np.array(trainer.evaluate(held_out)), np.mean(losses), tol=1e-12)
    fresh = [numpy_loss(params, batch, None)[0] for batch in held_out]
    assert abs(np.mean(fresh) - np.mean(losses)) > 1e-6  # so the test can tell


def test_evaluate_touches_nothing():
    module = Stacked()
    trainer = Trainer(module, stacked_loss, device="cpu", progress=False)
    modes, before, states = [], {k: v.clone() for k, v in module.state_dict().items()}, random_states()
    def watch(module, batch, state):
        modes.append((module.training, torch.is_grad_enabled()))
        return stacked_loss(module, batch, state)
    trainer.loss = watch
    assert trainer.evaluate(stream(2)) == trainer.evaluate(stream(2))
    assert modes == [(False, False)] * 4 and module.training and random_states() == states
    assert_equal(module.state_dict(), before)
    assert all(p.grad is None for p in module.parameters())


def test_each_part_of_a_module_gets_its_own_mode_back():
    module, modes = Stacked(), []
    module.dropout.eval()  # somebody has switched one layer off for good
    def loss(module, batch, state):
        modes.append((module.training, module.dropout.training))
        return stacked_loss(module, batch, state)
    trainer = Trainer(module, loss, device="cpu", progress=False)
    trainer.evaluate(stream(1))
    assert module.training and module.first.training and not module.dropout.training
    trainer.fit(stream(1), validation=stream(1))
    assert modes == [(False, False), (True, True), (False, False)]
    assert module.training and module.first.training and not module.dropout.training


def test_evaluate_on_nothing():
    with pytest.raises(ValueError, match="batches: expected at least one batch, got none"):
        Trainer(Stacked(), stacked_loss, device="cpu", progress=False).evaluate([])


@pytest.mark.parametrize("answer, got", [(lambda loss: loss, "Tensor"), (lambda loss: (loss, None, None), "3 values"), (lambda loss: None, "NoneType")])
def test_a_loss_that_does_not_return_its_parts(answer, got):
    def loss(module, batch, state): return answer(torch_loss(module, batch, state)[0])
    trainer = Trainer(reader(), loss, device="cpu", progress=False)
    for use in (trainer.fit, trainer.evaluate):
        with pytest.raises(ValueError, match=f"loss: expected a function that returns loss, state; got {got}"):
            use(stream(1))
    with pytest.raises(ValueError, match="loss_and_grads: expected a function that returns loss, grads, state; got 2 values"):
        quiet(lambda p, b, s: (0.0, p), W, [1])


def test_validation_does_not_change_the_run():
    def run(**options):
        trainer = Trainer(Stacked(), stacked_loss, device="cpu", progress=False)
        return trainer.fit(short(), **options)["loss"]
    draw = lambda module: float(torch.rand(()))
    assert run() == run(validation=short(2), every=3) == run(validation=draw, every=2)


def test_validation_arguments():
    for options, name in ((dict(validation=iter([1])), "validation: expected a function, or batches that can be read again"), (dict(patience=3), "validation: expected batches or a function, since patience"),
                          (dict(validation=bowl, every=0), "every: expected"), (dict(validation=bowl, patience=-1), "patience: expected"),
                          (dict(validation=[]), "validation: expected at least one batch"), (dict(lr=Plateau(0.1)), "validation: expected batches or a function, since lr")):
        with pytest.raises(ValueError, match=name):
            quiet(bowl, W, [1], **options)


@dataclasses.dataclass
class Plateau:
    "Halves the rate whenever a validation brings no new lowest loss."
    lr: float
    best: float = math.inf

    def __call__(self, done): return self.lr

    def observe(self, loss):
        if not loss < self.best: self.lr /= 2
        self.best = min(self.best, loss)

    def state_dict(self): return dict(vars(self))
    def load_state_dict(self, state): vars(self).update(state)


def test_a_schedule_may_observe_the_validation_loss():
    losses = iter([3.0, 4.0, 2.0, 2.0, 1.0])
    _, history = quiet(bowl, W, iter(range(10)), lr=Plateau(0.1), validation=lambda p: next(losses), every=2)
    assert history["lr"] == [0.1] * 4 + [0.05] * 4 + [0.025] * 2


# ---- random states


def short(count=12, seed=0): return [(x[:3, :2], y[:3, :2]) for x, y in stream(count, seed)]


class Stacked(torch.nn.Module):
    "Two recurrent layers with dropout between them."
    def __init__(self, seed=0, hidden=6, dtype=torch.float64):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.second = RNNLayer(2, hidden, dtype=dtype), RNNLayer(hidden, hidden, dtype=dtype)
            self.dropout, self.readout = torch.nn.Dropout(0.3), torch.nn.Linear(hidden, 3, dtype=dtype)


def stacked_loss(module, batch, state):
    x, y = batch
    first, second = state or (None, None)
    output, first = module.first(x, first)
    output, second = module.second(module.dropout(output), second)
    noise = 1 + 0.01 * (np.random.random() + random.random()) if module.training else 1  # drawn from each global generator
    return noise * torch.nn.functional.cross_entropy(module.readout(output).flatten(0, 1), y.flatten()), (first, second)


def random_states():
    "The global random states, in a form that == can compare."
    return torch.get_rng_state().tolist(), str(np.random.get_state()[1].tolist()) + str(np.random.get_state()[2:]), random.getstate()


def leave_by(way):
    "Fit in a way that ends as its name says."
    def loss(module, batch, state):
        if way == "diverged" and count[0] > 3:
            return module.readout.weight.sum() * math.nan, state
        if way == "two interrupts" and count[0] > 3:
            signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGINT)
        if way == "keyboard" and count[0] > 3:
            raise KeyboardInterrupt
        if way == "error" and count[0] > 3:
            raise ZeroDivisionError
        return stacked_loss(module, batch, state)
    def callback(run):
        count[0] += 1
        if way == "callback" and count[0] > 3:
            raise ZeroDivisionError
    count, trainer = [0], Trainer(Stacked(), loss, device="cpu", progress=False)
    validation = (lambda module: 1 / 0) if way == "validation" else short(1)
    try:
        return trainer.fit(short(), callbacks=[callback], validation=validation, every=2).stopped
    except (Diverged, ZeroDivisionError) as error:
        return type(error).__name__


@pytest.mark.parametrize("way, answer", [("batches", "batches"), ("diverged", "Diverged"), ("two interrupts", "interrupt"), ("keyboard", "interrupt"),
                                         ("error", "ZeroDivisionError"), ("callback", "ZeroDivisionError"), ("validation", "ZeroDivisionError")])
def test_random_states_come_back_whatever_happens(way, answer):
    torch.rand(3), np.random.standard_normal(), random.gauss(0, 1)  # the second number of a pair is kept in store
    before, handler = random_states(), signal.getsignal(signal.SIGINT)
    assert leave_by(way) == answer
    assert random_states() == before and signal.getsignal(signal.SIGINT) is handler


def test_same_seed_same_run_whatever_the_outer_state():
    def run(outer, **options):
        torch.manual_seed(outer)
        trainer = Trainer(Stacked(), stacked_loss, device="cpu", progress=False, **options)
        trainer.fit(short())
        return trainer.state_dict()
    once, twice, other = run(1), run(2), run(1, seed=1)
    assert_equal(twice, once, but=("seconds",))
    assert not torch.equal(other["module"]["readout.weight"], once["module"]["readout.weight"])


def test_the_next_fit_goes_on_drawing():
    trainer = Trainer(Stacked(), stacked_loss, device="cpu", lr=0.0, progress=False)
    batch = stream(1)
    assert trainer.fit(batch)["loss"] != trainer.fit(batch)["loss"]
    once = Trainer(Stacked(), stacked_loss, device="cpu", progress=False)
    twice = Trainer(Stacked(), stacked_loss, device="cpu", progress=False)
    once.fit(short())
    first = twice.fit(short()[:9])
    twice.fit(short()[9:], state=first.state)
    assert_equal(twice.module.state_dict(), once.module.state_dict())


DIGEST = """
import sys
sys.path.insert(0, {folder!r})
from test_training import *
trainer = Trainer(Stacked(), stacked_loss, device="cpu", progress=False)
trainer.fit(short(), validation=short(2, seed=9), every=7)
print(digest(trainer))
"""


def digest(trainer):
    "One number for all weights, moments, random states and losses."
    state, hashed = trainer.state_dict(), hashlib.sha256()
    for name, leaf in leaves(state):
        if "seconds" not in name:
            hashed.update(f"{name} {leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else leaf}".encode())
    return hashed.hexdigest()


def test_same_seed_same_run_in_another_process():
    trainer = Trainer(Stacked(), stacked_loss, device="cpu", progress=False)
    trainer.fit(short(), validation=short(2, seed=9), every=7)
    code = DIGEST.format(folder=os.path.dirname(__file__)) + f"assert torch.get_num_threads() == {torch.get_num_threads()}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONHASHSEED": "7"})
    assert done.stdout.strip() == digest(trainer), done.stderr


def test_one_thread_and_two_take_the_same_path_to_the_last_digits():
    rng, before = np.random.default_rng(0), torch.get_num_threads()
    batches = [(rng.standard_normal((2, 150, 2)), rng.integers(0, 3, (2, 150))) for _ in range(5)]
    def loss(module, batch, state):
        output, state = module.first(batch[0], state)
        activity = output.square().mean()  # of 38,400 numbers, so many that two threads share the sum; the gradient depends on it
        return activity.square() + torch.nn.functional.cross_entropy(module.readout(output).flatten(0, 1), batch[1].flatten()), state
    def run(threads):
        torch.set_num_threads(threads)
        trainer = Trainer(Stacked(hidden=128), loss, max_norm=0.05, device="cpu", progress=False)
        return trainer.fit(batches), numpy_arrays(trainer.module)
    try:
        (history_1, one), (history_2, two), (_, again) = run(1), run(2), run(2)
    finally:
        torch.set_num_threads(before)
    for name in ("loss", "grad_norm"):
        assert_parity(np.array(history_2[name]), np.array(history_1[name]), tol=1e-12)
    assert_parity(two, one, tol=1e-12)
    assert_parity(again, two, tol=0)  # with as many threads, to the last bit


def numpy_arrays(module):
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in module.state_dict().items()}


# ---- resuming


def leaves(tree, name=""):
    "Pairs (path, leaf) of nested dicts, lists and tuples."
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{name}/{key}")
    elif isinstance(tree, (list, tuple)):
        for k, value in enumerate(tree):
            yield from leaves(value, f"{name}/{k}")
    else:
        yield name, tree


def assert_equal(actual, expected, but=()):
    "Bit for bit, without those leaves."
    actual, expected = (dict(leaves(tree)) for tree in (actual, expected))
    assert actual.keys() == expected.keys()
    for name, leaf in expected.items():
        if not name.endswith(tuple(but)):
            same = torch.equal(actual[name], leaf) if isinstance(leaf, torch.Tensor) else actual[name] == leaf
            assert same, name


class Press:
    "Sends SIGINT once, at a moment of a step: while the batch is drawn, forward, or backward."
    def __init__(self, step=None, moment=None): self.step, self.moment, self.drawn = step, moment, 0

    def at(self, moment):
        if (self.drawn, moment) == (self.step, self.moment):
            self.step = None
            signal.raise_signal(signal.SIGINT)

    def batches(self, batches):
        for batch in batches:
            self.drawn += 1
            self.at("draw")
            yield batch

    def loss(self, module, batch, state):
        if module.training: self.at("forward")
        loss, state = stacked_loss(module, batch, state)
        if module.training: loss.register_hook(lambda grad: self.at("backward"))
        return loss, state


class Reread:
    "Batches that can be read again, with the presser's count."
    def __init__(self, press, batches): self.press, self.list = press, batches
    def __iter__(self): return self.press.batches(self.list)


class Shuffled:
    "Batches in a new order for each reading, that can say where they stand."
    def __init__(self, press, batches): self.press, self.list, self.rng, self.left = press, batches, np.random.default_rng(3), []
    def __iter__(self): return self.press.batches(self.order())
    def __len__(self): return len(self.list)

    def order(self):
        if not self.left: self.left = self.rng.permutation(len(self.list)).tolist()
        while self.left: yield self.list[self.left.pop()]

    def state_dict(self): return {"left": list(self.left), "rng": json.dumps(self.rng.bit_generator.state)}
    def load_state_dict(self, state): self.left, self.rng.bit_generator.state = list(state["left"]), json.loads(state["rng"])


def endless(press, batches):
    "A generator with an order of its own."
    rng = np.random.default_rng(3)
    return press.batches(batches[rng.integers(len(batches))] for _ in range(10**6))


PLAIN = dict(lr=lambda done: 0.02 * (1 - done), fit=dict(steps=30))
FULL = dict(lr=lambda done: 0.05 * (1 - done), fit=dict(steps=45, validation=short(3, seed=9), every=3, patience=5))
PLATEAU = dict(lr=Plateau, fit=dict(steps=45, validation=short(3, seed=9), every=3, patience=5))


def start(setting, kind, step=None, moment=None):
    "A fresh trainer, the fit's arguments, and the batches."
    press, lr = Press(step, moment), setting["lr"]
    trainer = Trainer(Stacked(), press.loss, optimizer=Adam, lr=Plateau(0.05) if lr is Plateau else lr, max_norm=0.3, device="cpu", progress=False)
    return trainer, kind(press, short(11))


@functools.cache
def uninterrupted(setting, kind):
    trainer, batches = start(globals()[setting], globals()[kind])
    trainer.fit(batches, **globals()[setting]["fit"])
    return trainer.state_dict()


rng = np.random.default_rng(11)
INTERRUPTS = [(int(rng.integers(1, 30)), str(rng.choice(["draw", "forward", "backward"]))) for _ in range(20)]
CASES = [(*case, "PLAIN", "Reread") for case in INTERRUPTS]
CASES += [(*case, ("FULL", "PLATEAU")[k % 2], ("Reread", "Shuffled", "endless")[k % 3]) for k, case in enumerate(INTERRUPTS[:12])]
CASES += [(step, "draw", "PLAIN", kind) for step in (11, 22) for kind in ("Reread", "Shuffled")]  # at the end of a reading


@pytest.mark.parametrize("step, moment, setting, kind", CASES)
def test_a_resumed_run_ends_bit_equal(step, moment, setting, kind):
    expected, options = uninterrupted(setting, kind), globals()[setting]
    step = min(step, len(expected["history"]["step"]) - 1)
    trainer, batches = start(options, globals()[kind], step, moment)
    history = trainer.fit(batches, **options["fit"])
    assert history.stopped == "interrupt" and history["step"][-1] == step
    fresh, batches = start(options, globals()[kind])
    torch.rand(7)  # the world has moved on
    fresh.load_state_dict(trainer.state_dict())
    fresh.fit(batches, **options["fit"], resume=True)
    assert_equal(fresh.state_dict(), expected, but=("seconds",))
    assert fresh.history.stopped == expected["stopped"] != "interrupt"


@pytest.mark.parametrize("kind", ["Reread", "Shuffled", "endless"])
def test_resumed_again_and_again_in_one_trainer(kind):
    expected = uninterrupted("FULL", kind)
    trainer, batches = start(FULL, globals()[kind])
    def press(run):
        if len(run.history["step"]) % 3 == 0 and run.history.stopped is None:
            signal.raise_signal(signal.SIGINT)
    fits = 1
    while trainer.fit(batches, **FULL["fit"], resume=True, callbacks=[press]).stopped == "interrupt":
        fits += 1
    assert fits > 5
    assert_equal(trainer.state_dict(), expected, but=("seconds",))


def test_a_state_from_a_callback_is_as_good():
    expected, states = uninterrupted("FULL", "Shuffled"), {}
    trainer, batches = start(FULL, Shuffled)
    trainer.fit(batches, **FULL["fit"], callbacks=[lambda run: states.update({(len(run.history["step"]), run.history.stopped): run.state_dict()})])
    last = len(expected["history"]["step"])
    for key in ((1, None), (4, None), (last - 1, None), (last, None), (last, expected["stopped"])):
        fresh, batches = start(FULL, Shuffled)
        fresh.load_state_dict(states[key])
        fresh.fit(batches, **FULL["fit"], resume=True)
        assert_equal(fresh.state_dict(), expected, but=("seconds",))


def test_a_state_is_a_copy_both_ways():
    trainer, batches = start(PLAIN, Reread, 9, "forward")
    trainer.fit(batches, **PLAIN["fit"])
    state = trainer.state_dict()
    kept = {name: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for name, leaf in leaves(state)}
    for one in (trainer, start(PLAIN, Reread)[0]):
        one.load_state_dict(state)
        one.fit(start(PLAIN, Reread)[1], **PLAIN["fit"], resume=True)
        assert_equal(dict(leaves(state)), kept)


def test_resume_with_nothing_to_resume_is_a_fresh_start():
    trainer, batches = start(PLAIN, Reread)
    trainer.fit(batches, **PLAIN["fit"], resume=True)
    assert_equal(trainer.state_dict(), uninterrupted("PLAIN", "Reread"), but=("seconds",))
    fresh, batches = start(PLAIN, Reread)
    fresh.load_state_dict(start(PLAIN, Reread)[0].state_dict())  # saved before the first step
    fresh.fit(batches, **PLAIN["fit"], resume=True)
    assert_equal(fresh.state_dict(), uninterrupted("PLAIN", "Reread"), but=("seconds",))


def test_limits_are_totals():
    trainer = Trainer(Stacked(), stacked_loss, device="cpu", progress=False)
    trainer.fit(stream(4), steps=6)
    history = trainer.fit(stream(4), steps=10, resume=True)
    assert history["step"] == list(range(1, 11)) and history.stopped == "steps"
    once = Trainer(Stacked(), stacked_loss, device="cpu", progress=False)
    once.fit(stream(4), steps=10)
    assert_equal(trainer.state_dict(), once.state_dict(), but=("seconds",))
    assert len(trainer.fit(stream(4), steps=10, resume=True)["step"]) == 10
    assert len(trainer.fit(stream(4), seconds=history["seconds"][-1] / 2, resume=True)["step"]) == 10  # seconds count on
    assert trainer.history["seconds"] == sorted(trainer.history["seconds"])


def test_what_was_interrupted_keeps_its_weights_and_what_ended_has_the_best():
    trainer, batches = start(FULL, Reread, len(uninterrupted("FULL", "Reread")["history"]["step"]) - 1, "forward")
    trainer.fit(batches, **FULL["fit"])
    assert trainer.history.stopped == "interrupt" and not torch.equal(trainer.best["readout.bias"], trainer.module.readout.bias)
    trainer.fit(batches, **FULL["fit"], resume=True)
    assert_equal(trainer.module.state_dict(), trainer.best)


@pytest.mark.parametrize("moment", ["draw", "forward", "backward"])
def test_a_step_broken_off_cannot_be_resumed(moment):
    trainer, batches = start(PLAIN, Reread, 9, moment)
    saved = []
    press = batches.press
    at = press.at
    def twice(moment):
        if press.step == press.drawn: at(moment), press.step is None and signal.raise_signal(signal.SIGINT)
    press.at = twice
    trainer.fit(batches, **PLAIN["fit"], callbacks=[lambda run: saved.append(run.state_dict()) if len(run.history["step"]) == 5 and not saved else None])
    assert trainer.history.stopped == "interrupt" and trainer.history["step"][-1] == 8
    for what in (trainer.state_dict, lambda: trainer.fit(batches, **PLAIN["fit"], resume=True)):
        with pytest.raises(RuntimeError, match="broken off after step 8"):
            what()
    trainer.load_state_dict(saved[0])
    trainer.fit(start(PLAIN, Reread)[1], **PLAIN["fit"], resume=True)
    assert_equal(trainer.state_dict(), uninterrupted("PLAIN", "Reread"), but=("seconds",))


@pytest.mark.parametrize("at, step, whole", [(2, 6, False), (5, 13, True)])
def test_a_validation_broken_off(at, step, whole):
    "In the middle of a run it cannot be resumed; the last one is done again."
    def measure(module):
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGINT)
        return float(module.readout.weight.square().mean())
    def trainer(): return Trainer(Stacked(), stacked_loss, device="cpu", lr=Plateau(0.05), progress=False)
    options, calls = dict(steps=13, validation=measure, every=3), [1] * at
    expected, broken = trainer(), trainer()
    expected.fit(short(), **options)
    calls = []
    history = broken.fit(short(), **options)
    assert history.stopped == "interrupt" and history["step"][-1] == step and len(history["validation_step"]) == at - 1
    if not whole:
        with pytest.raises(RuntimeError, match=f"broken off after step {step}"): broken.state_dict()
        return
    broken.fit(short(), **options, resume=True)
    assert_equal(broken.state_dict(), expected.state_dict(), but=("seconds",))


def test_numpy_returns_what_there_is_when_the_last_validation_is_broken_off():
    def measure(params): raise KeyboardInterrupt
    params, history = quiet(bowl, W, range(3), lr=0.1, validation=measure)
    assert history.stopped == "interrupt" and history["step"] == [1, 2, 3]
    assert_parity(params, quiet(bowl, W, range(3), lr=0.1)[0], tol=0)


def test_batches_that_cannot_be_passed_over():
    def fresh():
        trainer = Trainer(Stacked(), stacked_loss, device="cpu", progress=False)
        trainer.load_state_dict(state)
        return trainer
    trainer = Trainer(Stacked(), stacked_loss, device="cpu", progress=False)
    batches = stream(4)
    trainer.fit(batches, steps=3)
    state = trainer.state_dict()
    with pytest.raises(ValueError, match="batches: expected at least the 3 used before, got 2"):
        fresh().fit(iter(batches[:2]), steps=9, resume=True)
    for name, draw in (("torch", lambda: torch.rand(())), ("numpy", np.random.random), ("python", random.random)):
        before = random_states()
        with pytest.raises(ValueError, match=f"batches: .*random state of {name}.*generator of their own"):
            fresh().fit(((draw(), batch)[1] for batch in batches), steps=9, resume=True)
        assert random_states() == before
    with pytest.raises(ValueError, match="batches: expected, as before, ones without load_state_dict, got Shuffled"):
        fresh().fit(Shuffled(Press(), batches), steps=9, resume=True)
    once = iter(batches)
    trainer = Trainer(Stacked(), stacked_loss, device="cpu", progress=False)
    trainer.fit(once, steps=2)
    trainer.load_state_dict(state)
    with pytest.raises(ValueError, match="batches: expected an iterator that begins anew"):
        trainer.fit(once, steps=9, resume=True)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, shuffle=True, generator=torch.Generator().manual_seed(1))
    assert len(fresh().fit(loader, steps=9, resume=True)["step"]) == 9  # with a generator of its own it works


class Jittered(torch.utils.data.Dataset):
    "Items that are drawn from a global random state when they are asked for."
    def __len__(self): return 8
    def __getitem__(self, k): return torch.rand(6, 2, dtype=torch.float64), torch.zeros(6, dtype=torch.long)


def items(rng):
    return torch.utils.data.TensorDataset(torch.from_numpy(rng.standard_normal((20, 6, 2))), torch.from_numpy(rng.integers(0, 3, (20, 6))))


def loader_loss(module, batch, state):
    x, y = batch
    return stacked_loss(module, (x.transpose(0, 1), y.T), None)[0], None


@pytest.mark.parametrize("stop", [1, 4, 5, 6, 12, 15, 17])
def test_a_shuffling_loader_resumes_in_its_order(stop):
    "A DataLoader that shuffles draws its order from torch's global state, at the start of each reading of 5 batches."
    data = items(np.random.default_rng(3))
    def run(state=None, callbacks=()):
        trainer = Trainer(Stacked(), loader_loss, lr=0.01, device="cpu", progress=False)
        if state: trainer.load_state_dict(state)
        trainer.fit(torch.utils.data.DataLoader(data, batch_size=4, shuffle=True), steps=18, callbacks=callbacks, resume=bool(state))
        return trainer
    kept = []
    whole = run(callbacks=[lambda trainer: kept.append(trainer.state_dict())])
    assert_equal(run(kept[stop - 1]).state_dict(), whole.state_dict(), but=("seconds",))
    assert kept[0]["data"]["start"]["torch"].tolist() != kept[5]["data"]["start"]["torch"].tolist()


def test_a_loader_that_draws_later_is_refused_when_resumed():
    loader = lambda: torch.utils.data.DataLoader(Jittered(), batch_size=2, shuffle=True)
    trainer = Trainer(Stacked(), loader_loss, device="cpu", progress=False)
    trainer.fit(loader(), steps=3)
    other = Trainer(Stacked(), loader_loss, device="cpu", progress=False)
    other.load_state_dict(trainer.state_dict())
    before = random_states()
    with pytest.raises(ValueError, match="batches: expected an order that is settled when a reading begins, got draws from the global random state of torch"):
        other.fit(loader(), steps=9, resume=True)
    assert random_states() == before


@pytest.mark.parametrize("change, complaint", [
    (lambda s: s["module"].update({"first.cell.weight_ih": torch.zeros(7, 2, dtype=torch.float64)}), r"module first.cell.weight_ih: expected \(6, 2\).*, got \(7, 2\)"),
    (lambda s: s["module"].update({"readout.bias": torch.zeros(3)}), "module readout.bias: expected .*float64, got .*float32"),
    (lambda s: s["module"].pop("readout.bias"), "module: .*readout.bias"),
    (lambda s: s.pop("random"), "state: .*random"),
    (lambda s: s["data"].pop("start"), "data: .*start"),
    (lambda s: s["data"]["start"].update(torch=torch.zeros(5, dtype=torch.uint8)), "random torch: expected"),
    (lambda s: s["random"].update(torch=torch.zeros(5, dtype=torch.uint8)), "random torch: expected"),
    (lambda s: s["best"].update({"readout.bias": torch.zeros(2, dtype=torch.float64)}), r"best readout.bias: expected \(3,\).*, got \(2,\)"),
    (lambda s: s["optimizer"]["state"]["0"].update(exp_avg=torch.zeros(7, 2, dtype=torch.float64)), r"optimizer 0 exp_avg: expected \(6, 2\) float64, got \(7, 2\) float64"),
    (lambda s: s["optimizer"]["param_groups"][0].pop("betas"), "optimizer: .*betas"),
    (lambda s: s["optimizer"]["param_groups"].pop(), "optimizer: expected 1 groups"),
    (lambda s: s.update(lr=0.5), "lr: expected None, got 0.5"),
    (lambda s: s["history"].pop("loss"), "history: .*loss"),
    (lambda s: s["history"].update(loss=s["history"]["loss"][1:]), "history: expected lists of one length"),
    (lambda s: s.update(module=3), "module: expected a dict, got int"),
    (lambda s: s.update(optimizer=None), "state: expected what state_dict gives"),
    (lambda s: s["optimizer"]["state"].update(extra={}), "state: expected what state_dict gives"),
    (lambda s: s["optimizer"]["state"].update({"99": {"exp_avg": torch.zeros(2)}}), "state: expected what state_dict gives"),
])
def test_a_state_that_does_not_fit_changes_nothing(change, complaint):
    trainer, batches = start(FULL, Reread, 9, "forward")
    trainer.fit(batches, **FULL["fit"])
    before, bad = trainer.state_dict(), trainer.state_dict()
    for value in bad["module"].values(): value += 1
    change(bad)
    with pytest.raises(ValueError, match=complaint):
        trainer.load_state_dict(bad)
    assert_equal(trainer.state_dict(), before)


def test_another_optimizer_or_schedule_is_refused():
    def trainer(**options): return Trainer(Stacked(), stacked_loss, device="cpu", progress=False, **options)
    ours = trainer(lr=0.1)
    ours.fit(stream(2))
    for options, name in ((dict(lr=0.1, optimizer=SGD), "optimizer"), (dict(lr=0.2), "lr"), (dict(lr=Plateau(0.1)), "lr")):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            trainer(**options).load_state_dict(ours.state_dict())
    with pytest.raises(ValueError, match="schedule: expected"):
        trainer(lr=Plateau(0.1)).load_state_dict(trainer(lr=lambda done: 0.1).state_dict())


# ---- callbacks


def test_callbacks_see_every_step_and_the_end():
    seen, trainer = [], Trainer(reader(), torch_loss, device="cpu", progress=False)
    note = lambda run: seen.append((len(run.history["step"]), run.history.stopped))
    trainer.fit(stream(3), callbacks=[note, note])
    assert seen == [(1, None)] * 2 + [(2, None)] * 2 + [(3, None)] * 2 + [(3, "batches")] * 2
    seen.clear()
    quiet(bowl, W, press_at(range(9), at=2), callbacks=(lambda run: seen.append((len(run.history["step"]), run.history.stopped, run.params["w"][0])),))
    assert [row[:2] for row in seen] == [(1, None), (2, None), (2, "interrupt")] and seen[0][2] != seen[1][2] == seen[2][2]


def test_the_last_callback_sees_the_best_weights():
    seen = []
    params, _ = quiet(bowl, W, [1], optimizer=sgd, lr=0.1, steps=20, validation=falling_then_rising, every=1, callbacks=[lambda run: seen.append(run.params)])
    assert_parity(seen[-1], params, tol=0)
    assert np.linalg.norm(seen[-2]["w"]) < np.linalg.norm(params["w"])


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_log(tmp_path):
    path, lengths = tmp_path / "log.csv", []
    trainer, batches = start(FULL, Reread, 9, "forward")
    log = CSVLog(path)
    trainer.fit(batches, **FULL["fit"], callbacks=[log, lambda run: lengths.append(len(rows(path)))])
    assert lengths == [*range(1, 10), 9]  # each step is there as soon as it is done
    fresh, batches = start(FULL, Reread)
    fresh.load_state_dict(trainer.state_dict())
    history = fresh.fit(batches, **FULL["fit"], callbacks=[CSVLog(path)], resume=True)
    table = rows(path)
    for name in ("step", "loss", "grad_norm", "lr", "seconds"):
        assert [float(row[name]) for row in table] == history[name]
    measured = {int(row["step"]): float(row["validation_loss"]) for row in table if row["validation_loss"]}
    assert measured == dict(zip(history["validation_step"], history["validation_loss"]))


def test_csv_log_of_two_runs_and_of_one_step(tmp_path):
    log = CSVLog(tmp_path / "log.csv")
    quiet(bowl, W, range(5), callbacks=[log])
    _, history = quiet(bowl, W, iter([1]), validation=falling_then_rising, callbacks=[log])
    row, = rows(log.path)
    assert row["step"] == "1" and float(row["validation_loss"]) == history["validation_loss"][0]


def test_history_plots_itself():
    _, history = quiet(bowl, W, range(9), validation=falling_then_rising, every=4)
    figure, ax = plt.subplots()
    history.plot(ax=ax, title="A run")
    lines = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    plt.close(figure)
    assert lines["training"] == [list(pair) for pair in zip(history["step"], history["loss"])]
    assert lines["validation"] == [list(pair) for pair in zip(history["validation_step"], history["validation_loss"])]


# ---- mixed precision


def float32(batches): return [(x.astype(np.float32), y) for x, y in batches]


@pytest.mark.parametrize("layer", [RNNLayer, BPTTLayer])
def test_bf16_keeps_the_weights_and_comes_close(layer):
    def run(precision, device):
        module, kinds = reader(dtype=torch.float32), set()
        module.layer = type(module.layer) and layer_like(module.layer, layer)
        def loss(module, batch, state):
            output, state = module.layer(batch[0], state)
            kinds.add(output.dtype)
            return torch.nn.functional.cross_entropy(module.readout(output).flatten(0, 1), batch[1].flatten()), state
        trainer = Trainer(module, loss, lr=0.01, max_norm=1.0, precision=precision, device=device, progress=False)
        history = trainer.fit(float32(stream(20)), validation=float32(stream(3, seed=9)), every=5)
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in module.parameters())
        assert all(v.dtype == torch.float32 for memory in trainer.optimizer.state.values() for v in memory.values())
        return history, kinds
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        (full, kinds), (mixed, mixed_kinds) = run("float32", device), run("bf16", device)
        assert (kinds, mixed_kinds) == ({torch.float32}, {torch.bfloat16})
        assert mixed["loss"] != full["loss"] and np.abs(np.array(mixed["loss"]) - full["loss"]).max() < 0.03
        assert np.abs(np.array(mixed["grad_norm"]) / full["grad_norm"] - 1).max() < 0.15


def layer_like(layer, kind):
    new = kind(2, 5)
    new.load_state_dict(layer.state_dict())
    return new


def test_bf16_gradients_of_the_hand_written_layer_are_those_of_autograd():
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((6, 4, 2)).astype(np.float32))
    by_hand = reader(dtype=torch.float32).layer
    by_autograd, grads = layer_like(by_hand, RNNLayer), []
    for layer in (by_hand, by_autograd):
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = layer(x)
        output.float().square().sum().backward()
        grads.append({name: p.grad for name, p in layer.named_parameters()})
    assert_parity(grads[0], grads[1], tol=2e-2)


def test_bf16_resumes_bit_for_bit():
    def trainer(): return Trainer(reader(dtype=torch.float32), torch_loss, precision="bf16", device="cpu", progress=False)
    whole, first, second = trainer(), trainer(), trainer()
    whole.fit(float32(stream(9)))
    first.fit(press_at(float32(stream(9)), at=4))
    second.load_state_dict(first.state_dict())
    second.fit(float32(stream(9)), resume=True)
    assert_equal(second.state_dict(), whole.state_dict(), but=("seconds",))


def test_precision_is_one_of_two():
    with pytest.raises(ValueError, match="precision: expected 'float32' or 'bf16', got 'fp16'"):
        Trainer(reader(), torch_loss, precision="fp16", progress=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_resumes_bit_for_bit():
    def trainer(): return Trainer(Stacked(), stacked_loss, device="cuda", progress=False)
    whole, first, second = trainer(), trainer(), trainer()
    before = torch.cuda.get_rng_state().tolist()
    whole.fit(stream(20))
    first.fit(press_at(stream(20), at=7))
    second.load_state_dict(first.state_dict())
    second.fit(stream(20), resume=True)
    assert_equal(second.state_dict(), whole.state_dict(), but=("seconds",))
    assert torch.cuda.get_rng_state().tolist() == before
