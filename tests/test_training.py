"The training loop: one path in NumPy and PyTorch, every way to stop, and what must not be touched."
import functools
import math
import signal
import threading

import numpy as np
import pytest
import torch

from rnnbook.bptt import BPTTLayer, rnn_backward
from rnnbook.feedforward import linear_backward, linear_forward, softmax_cross_entropy, softmax_cross_entropy_backward
from rnnbook.gradients import clip_grad_norm
from rnnbook.optimizers import SGD, Adagrad, Adam, adagrad, adam, sgd
from rnnbook.rnn import numpy_params, rnn_forward
from rnnbook.testing import assert_parity
from rnnbook.training import Diverged, History, Trainer, train

quiet = functools.partial(train, progress=False)


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
    params, by_numpy = train(numpy_loss, numpy_params(module), stream(), optimizer=numpy_optimizer, **options)
    by_torch = Trainer(module, torch_loss, optimizer=torch_optimizer, device="cpu", **options).fit(stream())
    for name in ("step", "loss", "grad_norm", "lr"):
        assert len(by_numpy[name]) == len(by_torch[name]) == 30
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
    with pytest.raises(Diverged, match=r"step 5: .*gradient norm.* at step 1\)") as caught:
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
    with pytest.raises(Diverged, match="step 5"):
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
            if trainer.history is None and presses:
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
    (dict(steps=0), "steps"), (dict(steps=-3), "steps"), (dict(seconds=0), "seconds"), (dict(seconds=math.nan), "seconds"),
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
    assert out == "device: cpu\n" and "3/3" in err and "loss" in err and "0/0 s" in err


def test_the_bar_is_drawn_seldom(capsys):
    train(bowl, W, range(20000))
    assert capsys.readouterr().err.count("\r") < 200


def test_history_is_a_dict_of_lists():
    history = History()
    assert dict(history) == {"step": [], "loss": [], "grad_norm": [], "lr": [], "seconds": []}
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
