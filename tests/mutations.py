"""Would anyone notice? Classic mistakes are put into the recurrences and their gradients, one at a time, and the module's chapter and tests are run.

    .venv/bin/python tests/mutations.py                          print the table (about ten seconds per row on an idle machine)
    .venv/bin/python tests/mutations.py --record tests/mutations.md

Each mistake is made in a temporary copy of the repository, in the notebook's cell and in the module exported from it. A
row is well when at least one cell of that chapter and one of its tests fail. In a chapter a failed cell can make later ones fail, so the
table also names the first, by its place among the chapter's code cells. Not part of `make test`, which should pass.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = {path.stem.partition("_")[2]: f"nbs/{path.name}" for path in (ROOT / "nbs").glob("[0-9]*.ipynb")}

BLOCKS = ".reshape(-1, H, H).swapaxes(1, 2).reshape(-1, H)"  # each gate's W_hh transposed
MUTATIONS = [  # (module, function, mistake, the line as it is, the line with the mistake)
    ("rnn", "def rnn_forward(", "transpose W_hh", 'h[t] @ params["weight_hh_l0"].T)', 'h[t] @ params["weight_hh_l0"])'),
    ("bptt", "def rnn_backward(", "transpose W_hh", 'd_h[t] += d_a[t] @ params["weight_hh_l0"]', 'd_h[t] += d_a[t] @ params["weight_hh_l0"].T'),
    ("bptt", "def _gradients(", "transpose W_hh", "torch.addmm(arriving[t], d_a_t, weight_hh, out=d_h)", "torch.addmm(arriving[t], d_a_t, weight_hh.t(), out=d_h)"),
    ("rnn", "def rnn_forward(", "drop a bias", 'rows += params.get("bias_ih_l0", 0) + params.get("bias_hh_l0", 0)', 'rows += params.get("bias_ih_l0", 0)'),
    ("bptt", "def rnn_backward(", "drop a bias", '{name: rows.sum(0) for name in ("bias_ih_l0", "bias_hh_l0") if name in params}', '{name: rows.sum(0) * (name == "bias_ih_l0") for name in ("bias_ih_l0", "bias_hh_l0") if name in params}'),
    ("bptt", "def _states(", "drop a bias", "torch.addmm(bias_ih + bias_hh,", "torch.addmm(bias_ih,"),
    ("rnn", "def hide_padding(", "ignore lengths", "if lengths is None: return x, None, None", "if True: return x, None, None"),
    ("bptt", "def rnn_backward(", "ignore lengths", "d_h[T if lengths is None else lengths, np.arange(B)]", "d_h[T, np.arange(B)]"),
    ("bptt", "def _arriving(", "ignore lengths", "d_output.masked_fill(~mask, 0)", "d_output"),
    ("bptt", "def rnn_backward(", "truncate BPTT by one step", "for t in reversed(range(T)):", "for t in reversed(range(1, T)):"),
    ("bptt", "def _gradients(", "truncate BPTT by one step", "for t in reversed(range(start, stop)):", "for t in reversed(range(max(start, 1), stop)):"),
    ("rnn", "def rnn_forward(", "swap two time steps", "for t in range(T):", "for t in sorted(range(T), key=lambda t: {0: 1, 1: 0}.get(t, t)):"),
    ("bptt", "def rnn_backward(", "swap two time steps", "for t in reversed(range(T)):", "for t in sorted(range(T), key=lambda t: -{0: 1, 1: 0}.get(t, t)):"),
    ("bptt", "def _gradients(", "swap two time steps", "for t in reversed(range(start, stop)):", "for t in sorted(range(start, stop), key=lambda t: -{0: 1, 1: 0}.get(t, t)):"),
    ("bptt", "def rnn_backward(", "forget the f' factor", 'd_a = DERIVATIVES[tape["nonlinearity"]](h[1:])', "d_a = np.ones_like(h[1:])"),
    ("bptt", "def _gradients(", "forget the f' factor", "d_a = TORCH_DERIVATIVES[nonlinearity](h[start + 1:stop + 1])", "d_a = torch.ones_like(h[start + 1:stop + 1])"),
    ("lstm", "def _by_gate(", "swap two gates", 'return [views[gate] for gate in "ifgo"]', 'return [views[gate] for gate in "figo"]'),
    ("lstm", "def lstm_step(", "swap two gates", "a = dict(zip(order, np.split", "a = dict(zip(order[::-1], np.split"),
    ("lstm", "class LSTMCell(", "swap two gates", "a_i, a_g, a_o = a[0], a[-2], a[-1]", "a_i, a_g, a_o = a[-1], a[-2], a[0]"),
    ("lstm", "def lstm_forward(", "transpose W_hh", 'W_hh, W_hr = params["weight_hh_l0"].T', f'W_hh, W_hr = params["weight_hh_l0"]{BLOCKS}.T'),
    ("lstm", "def lstm_backward(", "transpose W_hh", 'W_hh, W_hr = params["weight_hh_l0"],', f'W_hh, W_hr = params["weight_hh_l0"]{BLOCKS},'),
    ("lstm", "class LSTMCell(", "transpose W_hh", "torch.addmm(projected, h, self.weight_hh.T)", "torch.addmm(projected, h, self.weight_hh.unflatten(0, (self.gates, -1)).mT.flatten(0, 1).T)"),
    ("lstm", "def _project(", "drop b_hh", 'rows += params.get("bias_ih_l0", 0) + params.get("bias_hh_l0", 0)', 'rows += params.get("bias_ih_l0", 0)'),
    ("lstm", "def _parameter_gradients(", "drop b_hh", "if name in params: grads[name] = rows.sum(0)", 'if name in params: grads[name] = rows.sum(0) * (name == "bias_ih_l0")'),
    ("rnn", "class RecurrentCell(", "drop b_hh", "bias = self.bias_ih + self.bias_hh if self.bias else None", "bias = self.bias_ih if self.bias else None"),
    ("lstm", "def lstm_forward(", "ignore lengths", "x, mask, lengths = hide_padding(x, lengths)", "x, mask, lengths = hide_padding(x, None)"),
    ("lstm", "def lstm_backward(", "ignore lengths", "d_s[T if lengths is None else lengths, np.arange(B)]", "d_s[T, np.arange(B)]"),
    ("lstm", "class CellLayer(", "ignore lengths", "if mask is not None: new = tuple(", "if False: new = tuple("),
    ("lstm", "def lstm_backward(", "forget the carry of dc", "d_c[t] += d_c[t + 1] * f[t]", "d_c[t] += 0"),
    ("gru", "def gru_step(", "swap two gates", "r, z = rz[:, :H], rz[:, H:]", "z, r = rz[:, :H], rz[:, H:]"),
    ("gru", "def gru_forward(", "swap two gates", "rz, (r, z, n) = gates", "rz, (z, r, n) = gates"),
    ("gru", "class GRUCell(", "swap two gates", "r, z = torch.sigmoid(a_rz + u_rz)", "z, r = torch.sigmoid(a_rz + u_rz)"),
    ("gru", "def gru_forward(", "transpose W_hh", 'params["weight_hh_l0"].T\n', f'params["weight_hh_l0"]{BLOCKS}.T\n'),
    ("gru", "def _walk_after(", "transpose W_hh", "d_u[t].reshape(-1, len(W_hh)) @ W_hh", "d_u[t].reshape(-1, len(W_hh)) @ W_hh.reshape(3, len(W_hh) // 3, -1).swapaxes(1, 2).reshape(len(W_hh), -1)"),
    ("gru", "def _walk_before(", "transpose W_hh", "d_a[t, :, 2] @ W_hh[2 * H:]", "d_a[t, :, 2] @ W_hh[2 * H:].T"),
    ("gru", "class GRUCell(", "transpose W_hh", "linear(seen, self.weight_hh, self.bias_hh)", "linear(seen, self.weight_hh.unflatten(0, (3, -1)).mT.flatten(0, 1), self.bias_hh)"),
    ("gru", "def _project(", "drop b_hh", "rows += b_ih + np.where(waits, 0, b_hh)", "rows += b_ih"),
    ("gru", "def gru_forward(", "drop b_hh", "m[t] = u[:, 2 * H:] + b_hn", "m[t] = u[:, 2 * H:]"),
    ("gru", "def gru_backward(", "drop b_hh", '"bias_hh_l0": d_u}', '"bias_hh_l0": d_a}'),
    ("gru", "class GRUCell(", "drop b_hh", "linear(seen, self.weight_hh, self.bias_hh)", "linear(seen, self.weight_hh)"),
    ("gru", "def gru_forward(", "reset before for after", "n[t] += r[t] * m[t]", "n[t] += (r[t] * h[t]) @ W_hh[:, 2 * H:] + b_hn"),
    ("gru", "def gru_backward(", "reset before for after", 'walk = _walk_after if tape["reset_after"] else _walk_before', "walk = _walk_before"),
    ("gru", "class GRUCell(", "reset before for after", "n = torch.tanh(torch.addcmul(a_n, r, m))", "n = torch.tanh(a_n + torch.nn.functional.linear(r * seen, self.weight_hh, self.bias_hh).split(blocks, -1)[1])"),
    ("gru", "def gru_forward(", "ignore lengths", "x, mask, lengths = hide_padding(x, lengths)", "x, mask, lengths = hide_padding(x, None)"),
    ("gru", "def gru_backward(", "ignore lengths", "d_h[T if lengths is None else lengths, np.arange(B)]", "d_h[T, np.arange(B)]"),
    ("gru", "def _walk_after(", "forget the carry of dh", "d_h[t] += z[t] * d_h[t + 1]", "d_h[t] += 0"),
    ("bidirectional", "def _turned_steps", "off by one in the reverse pass", "np.where(inside, ends - 1 - t, t)", "np.where(inside, np.maximum(ends - 2 - t, 0), t)"),
    ("bidirectional", "def _turned_steps", "ignore lengths", "if lengths is None: return None", "if True: return None"),
    ("bidirectional", "def _turner", "off by one in the reverse pass", "steps.T if batch_first else steps * B", "steps.T if batch_first else (steps - 1).clamp(0) * B"),
    ("bidirectional", "def _turner", "ignore lengths", "if lengths is None: return lambda", "if True: return lambda"),
    ("bidirectional", "def bidirectional_backward", "forget one direction's share of the input", 'forward.pop("x") + _turn(reverse.pop("x"), steps)', 'forward.pop("x") + 0 * _turn(reverse.pop("x"), steps)'),
    ("bidirectional", "def bidirectional_backward", "forget to turn the gradient", "d_reverse = _turn(d_reverse, steps)", "pass"),
    ("bidirectional", "class Bidirectional", "forget to turn the output back", "_merged(output, turn(reverse), self.merge", "_merged(output, reverse, self.merge"),
    ("bidirectional", "def _shares", "pass the mean on whole", "(d_output / 2, d_output / 2)", "(d_output, d_output)"),
    ("bidirectional", "def _both", "swap two directions' states", "concatenate(pair, 0) for pair in zip(_parts(forward), _parts(reverse))", "concatenate(pair, 0) for pair in zip(_parts(reverse), _parts(forward))"),
    ("stacked", "def recurrent_forward(", "swap layers' states", "_rows(state, start, stop)", "_rows(state, sum(map(_directions, layers)) - stop, sum(map(_directions, layers)) - start)"),
    ("stacked", "def recurrent_forward(", "swap layers' states at the end", "final = _joined(finals, np.concatenate)", "final = _joined(finals[::-1], np.concatenate)"),
    ("stacked", "def recurrent_backward(", "swap the gradients of layers' states", "states.setdefault(name, []).insert(0, grad)", "states.setdefault(name, []).append(grad)"),
    ("stacked", "def recurrent_backward(", "forget dropout on the way back", 'd_below = d_below * layer["dropped"]', "d_below = d_below * 1"),
    ("stacked", "def recurrent_backward(", "forget the residual connection on the way back", "d_below = d_below + d", "d_below = d_below + 0"),
    ("stacked", "def recurrent_forward(", "drop what leads around a layer", "if skip: x = x + below", "if skip: x = x + seen"),
    ("stacked", "def recurrent_forward(", "ignore lengths", "x, mask, lengths = hide_padding(x, lengths)", "x, mask, lengths = hide_padding(x, None)"),
    ("stacked", "class Stacked(", "swap layers' states", "return x, _joined(finals, torch.cat)", "return x, _joined(finals[::-1], torch.cat)"),
    ("stacked", "class Stacked(", "drop behind the last layer", "return x, _joined(finals, torch.cat)", "return self.dropout(x), _joined(finals, torch.cat)"),
    ("stacked", "class Stacked(", "ignore lengths", "_rows(state, start, stop), lengths=lengths)", "_rows(state, start, stop))"),
    ("regularization", "def zoneout_forward(", "zoneout on the wrong state", "z_s * s + (1 - z_s) * s_new", "(1 - z_s) * s + z_s * s_new"),
    ("regularization", "class Zoneout(", "zoneout on the wrong state", "z_s * s + (1 - z_s) * s_new", "(1 - z_s) * s + z_s * s_new"),
    ("regularization", "class Zoneout(", "no expectation in eval", 'z = self.probability\n', 'z = (0,) * len(self.sizes)\n'),
    ("regularization", "def zoneout_backward(", "forget the carry", "d = [z_s * d_s + grads[name]", "d = [grads[name]"),
    ("regularization", "def recurrent_dropout_backward(", "forget the mask", 'grads["weight_hh_l0"] * mask[rows].sum(0)', 'grads["weight_hh_l0"]'),
    ("regularization", "class RecurrentDropout(", "a new mask at each step", "projected.new_ones(projected.shape[-2], self.sizes[0])", "projected.new_ones(*projected.shape[:-1], self.sizes[0])"),
    ("regularization", "class RecurrentDropout(", "drop what a GRU carries", "if self.by_keyword: return", "if False: return"),
    ("regularization", "def layer_norm_backward(", "take sigma for fixed", " - n * along", ""),
    ("regularization", "def _walk_back(", "ignore lengths", "inside = True if mask is None else mask[t]", "inside = True"),
    ("nn", "def _connect", "a layer's weights in the wrong order", "zip(layers[::2], layers[1::2])", "zip(layers[1::2], layers[::2])"),
    ("nn", "def _flat_weights(", "a layer's weights in the wrong order", "return sum(self.all_weights, [])", "return sum(self.all_weights[::-1], [])"),
    ("nn", "def _borrowing", "borrow layer 0 everywhere", "name + self.suffix", "name + '_l0'"),
    ("nn", "def _run(", "ignore lengths", "if lengths is None or not len(lengths): return self._kernel", "if True: return self._kernel"),
    ("nn", "def _run_packed(", "leave states sorted", "if back is not None: state", "if False: state"),
    ("nn", "def _loop(", "let no mode reach the cells", "if network.training != self.training: network.train(self.training)", "pass"),
    ("nn", "_ORDERS", "swap two gates", 'onnx="iofg"', 'onnx="ifog"'),
    ("nn", "def to_keras", "drop b_hh", "else sum(arrays[2:]))", "else arrays[2])"),
]


def mutate(folder, module, function, old, new):
    "Make the mistake in the exported module and in the notebook's cell, at its first place behind the function's head."
    def replaced(text, where):
        head = text.find(function)
        if head < 0 or old not in text[head:]:
            raise SystemExit(f"{where}: no longer holds {old!r} behind {function!r}; mend MUTATIONS")
        return text[:head] + text[head:].replace(old, new, 1)

    path = folder / "rnnbook" / f"{module}.py"
    path.write_text(replaced(path.read_text(encoding="utf-8"), path.name), encoding="utf-8")
    path = folder / NOTEBOOKS[module]
    notebook = json.loads(path.read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    index = next((i for i, source in enumerate(sources) if source.startswith("#| export") and function in source and old in source), None)
    if index is None:
        raise SystemExit(f"{path.name}: no exported cell holds {old!r}; mend MUTATIONS")
    notebook["cells"][index]["source"] = replaced(sources[index], path.name)
    path.write_text(json.dumps(notebook), encoding="utf-8")


def failures(folder, targets):
    "What fails among tests or notebook cells in that copy, as pytest names it."
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=no", "--nbval-lax", "--nbval-current-env", "-p", "no:cacheprovider", *targets]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest could not run:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return re.findall(r"^(?:FAILED|ERROR) (\S+::[^\n]*?)(?: - .*)?$", done.stdout, re.MULTILINE)


def run(module, function=None, old=None, new=None):
    "The cells of the module's chapter and its tests that fail with one mistake made (with none if `old` is None)."
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("rnnbook", "nbs", "tests", "benchmarks"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        for part in ("settings.ini", "pyproject.toml"):
            shutil.copy(ROOT / part, folder)
        if old is not None:
            mutate(folder, module, function, old, new)
        return failures(folder, [NOTEBOOKS[module]]), failures(folder, [f"tests/test_{module}.py"])


def describe(cells):
    "Such as `3, first cell 12`."
    return f"{len(cells)}, first cell {min(int(cell.rsplit(' ', 1)[1]) for cell in cells)}" if cells else "**none**"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", help="also write the table to this Markdown file")
    parser.add_argument("--only", default="", help="run only the mistakes whose name, module or place holds this text")
    parser.add_argument("--jobs", type=int, default=2, help="copies at a time (2)")
    options = parser.parse_args()
    chosen = [row for row in MUTATIONS if options.only in " ".join(row[:3])]
    lines = ["| mistake | made in | chapter cells that fail | tests that fail |", "|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    unnoticed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for module, (cells, tests) in zip(modules := sorted({row[0] for row in chosen}), pool.map(run, modules)):
            if cells or tests: raise SystemExit(f"{module}: without any mistake these fail already: {cells + tests}")
        for (module, head, mistake, _, _), (cells, tests) in zip(chosen, pool.map(lambda row: run(row[0], row[1], *row[3:]), chosen)):
            unnoticed += not (cells and tests)
            place = re.search(r"(?:def |class )?(\w+)", head)[1]
            chapter = Path(NOTEBOOKS[module]).stem
            lines.append(f"| {mistake} | {chapter}, `{place}` | {describe(cells)} | {len(tests) or '**none**'} |")
            print(lines[-1], flush=True)
    if options.record:
        text = f"# Mutations\n\nWritten by `tests/mutations.py`, whose first lines say what is done. Python {sys.version.split()[0]}.\n\n"
        Path(options.record).write_text(text + "\n".join(lines) + "\n", encoding="utf-8")
    sys.exit(f"{unnoticed} unnoticed" if unnoticed else 0)


if __name__ == "__main__":
    main()
