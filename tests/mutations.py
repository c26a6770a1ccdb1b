"""Would anyone notice? Classic mistakes are put into the recurrences and their gradients, one at a time, and the chapters and tests are run.

    .venv/bin/python tests/mutations.py                          print the table (about half a minute per row on an idle machine)
    .venv/bin/python tests/mutations.py --record tests/mutations.md

Each mistake is made in a temporary copy of the repository, in the notebook's cell and in the module exported from it. A
row is well when at least one chapter cell and one test fail. In a chapter a failed cell can make later ones fail, so the table
also names the first, by its place among the chapter's code cells. Not part of `make test`, which should pass.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = {"rnn": "nbs/02_rnn.ipynb", "bptt": "nbs/03_bptt.ipynb", "lstm": "nbs/10_lstm.ipynb"}

FORWARD, BACKWARD, FUNCTION = "rnn_forward", "rnn_backward", "RNNFunction, backward"
LSTM, LSTM_BACKWARD, CELL, LAYER = "lstm_forward", "lstm_backward", "LSTMCell", "CellLayer"
BLOCKS = ".reshape(-1, H, H).swapaxes(1, 2).reshape(-1, H)"  # each gate's W_hh transposed
MUTATIONS = [  # (mistake, where, module, the line as it is, the line with the mistake)
    ("transpose W_hh", FORWARD, "rnn", 'h[t] @ params["weight_hh_l0"].T)', 'h[t] @ params["weight_hh_l0"])'),
    ("transpose W_hh", BACKWARD, "bptt", 'd_h[t] += d_a[t] @ params["weight_hh_l0"]', 'd_h[t] += d_a[t] @ params["weight_hh_l0"].T'),
    ("transpose W_hh", FUNCTION, "bptt", "torch.addmm(arriving[t], d_a_t, weight_hh, out=d_h)", "torch.addmm(arriving[t], d_a_t, weight_hh.t(), out=d_h)"),
    ("drop a bias", FORWARD, "rnn", 'rows += params.get("bias_ih_l0", 0) + params.get("bias_hh_l0", 0)', 'rows += params.get("bias_ih_l0", 0)'),
    ("drop a bias", BACKWARD, "bptt", '{name: rows.sum(0) for name in ("bias_ih_l0", "bias_hh_l0") if name in params}', '{name: rows.sum(0) * (name == "bias_ih_l0") for name in ("bias_ih_l0", "bias_hh_l0") if name in params}'),
    ("drop a bias", "RNNFunction, forward", "bptt", "torch.addmm(bias_ih + bias_hh,", "torch.addmm(bias_ih,"),
    ("ignore lengths", FORWARD, "rnn", "if lengths is None: return x, None, None", "if True: return x, None, None"),
    ("ignore lengths", BACKWARD, "bptt", "d_h[T if lengths is None else lengths, np.arange(B)]", "d_h[T, np.arange(B)]"),
    ("ignore lengths", FUNCTION, "bptt", "d_output.masked_fill(~mask, 0)", "d_output"),
    ("truncate BPTT by one step", BACKWARD, "bptt", "for t in reversed(range(T)):", "for t in reversed(range(1, T)):"),
    ("truncate BPTT by one step", FUNCTION, "bptt", "for t in reversed(range(start, stop)):", "for t in reversed(range(max(start, 1), stop)):"),
    ("swap two time steps", FORWARD, "rnn", "for t in range(T):", "for t in sorted(range(T), key=lambda t: {0: 1, 1: 0}.get(t, t)):"),
    ("swap two time steps", BACKWARD, "bptt", "for t in reversed(range(T)):", "for t in sorted(range(T), key=lambda t: -{0: 1, 1: 0}.get(t, t)):"),
    ("swap two time steps", FUNCTION, "bptt", "for t in reversed(range(start, stop)):", "for t in sorted(range(start, stop), key=lambda t: -{0: 1, 1: 0}.get(t, t)):"),
    ("forget the f' factor", BACKWARD, "bptt", 'd_a = DERIVATIVES[tape["nonlinearity"]](h[1:])', "d_a = np.ones_like(h[1:])"),
    ("forget the f' factor", FUNCTION, "bptt", "d_a = TORCH_DERIVATIVES[nonlinearity](h[start + 1:stop + 1])", "d_a = torch.ones_like(h[start + 1:stop + 1])"),
    ("swap two gates", "lstm_forward and lstm_backward", "lstm", 'return [views[gate] for gate in "ifgo"]', 'return [views[gate] for gate in "figo"]'),
    ("swap two gates", "lstm_step", "lstm", 'a = dict(zip(order, np.split', 'a = dict(zip(order[::-1], np.split'),
    ("swap two gates", CELL, "lstm", "a_i, a_g, a_o = a[0], a[-2], a[-1]", "a_i, a_g, a_o = a[-1], a[-2], a[0]"),
    ("transpose W_hh", LSTM, "lstm", 'W_hh, W_hr = params["weight_hh_l0"].T', f'W_hh, W_hr = params["weight_hh_l0"]{BLOCKS}.T'),
    ("transpose W_hh", LSTM_BACKWARD, "lstm", 'W_hh, W_hr = params["weight_hh_l0"],', f'W_hh, W_hr = params["weight_hh_l0"]{BLOCKS},'),
    ("transpose W_hh", CELL, "lstm", "torch.addmm(projected, h, self.weight_hh.T)", "torch.addmm(projected, h, self.weight_hh.unflatten(0, (self.gates, -1)).mT.flatten(0, 1).T)"),
    ("drop b_hh", LSTM, "lstm", 'rows += params.get("bias_ih_l0", 0) + params.get("bias_hh_l0", 0)', 'rows += params.get("bias_ih_l0", 0)'),
    ("drop b_hh", LSTM_BACKWARD, "lstm", "if name in params: grads[name] = rows.sum(0)", 'if name in params: grads[name] = rows.sum(0) * (name == "bias_ih_l0")'),
    ("drop b_hh", "LSTMCell, project", "rnn", "bias = self.bias_ih + self.bias_hh if self.bias else None", "bias = self.bias_ih if self.bias else None"),
    ("ignore lengths", LSTM, "lstm", "x, mask, lengths = hide_padding(x, lengths)", "x, mask, lengths = hide_padding(x, None)"),
    ("ignore lengths", LSTM_BACKWARD, "lstm", "d_s[T if lengths is None else lengths, np.arange(B)]", "d_s[T, np.arange(B)]"),
    ("ignore lengths", LAYER, "lstm", "if mask is not None: new = tuple(", "if False: new = tuple("),
    ("forget the carry of dc", LSTM_BACKWARD, "lstm", "d_c[t] += d_c[t + 1] * f[t]", "d_c[t] += 0"),
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
    path = folder / CHAPTERS[module]
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


def run(module, function, old, new):
    "The chapter cells and the tests that fail with one mistake made (with none if `old` is None)."
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("rnnbook", "nbs", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        for part in ("settings.ini", "pyproject.toml"):
            shutil.copy(ROOT / part, folder)
        if old is not None:
            mutate(folder, module, function, old, new)
        related = list(CHAPTERS)[list(CHAPTERS).index(module):] if module else CHAPTERS  # what comes before cannot notice
        cells = failures(folder, [CHAPTERS[name] for name in related])
        tests = failures(folder, [f"tests/test_{name}.py" for name in related])
    return cells, tests


def describe_cells(cells):
    "Such as `02_rnn: 3, first cell 12`."
    found = []
    for path in CHAPTERS.values():
        numbers = [int(cell.rsplit(" ", 1)[1]) for cell in cells if cell.startswith(path)]
        if numbers:
            found.append(f"{Path(path).stem}: {len(numbers)}, first cell {min(numbers)}")
    return "; ".join(found) or "**none**"


def describe_tests(tests):
    "Such as `test_rnn: 12; test_bptt: 140`."
    counts = {module: sum(f"test_{module}.py" in test for test in tests) for module in CHAPTERS}
    return "; ".join(f"test_{module}: {count}" for module, count in counts.items() if count) or "**none**"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", help="also write the table to this Markdown file")
    parser.add_argument("--only", default="", help="run only the mistakes whose name or place holds this text")
    options = parser.parse_args()
    heads = {BACKWARD: "def rnn_backward(", FUNCTION: "def _gradients(", "RNNFunction, forward": "def _states(",
             LSTM: "def lstm_forward(", LSTM_BACKWARD: "def lstm_backward(", CELL: "class LSTMCell(", LAYER: "class CellLayer(",
             "lstm_forward and lstm_backward": "def _by_gate(", "lstm_step": "def lstm_step(", "LSTMCell, project": "class RecurrentCell("}
    cells, tests = run(None, None, None, None)
    if cells or tests:
        raise SystemExit(f"without any mistake these fail already: {cells + tests}")
    lines = ["| mistake | made in | chapter cells that fail | tests that fail |", "|---|---|---|---|"]
    unnoticed = 0
    print("\n".join(lines), flush=True)
    for mistake, where, module, old, new in MUTATIONS:
        if options.only not in f"{mistake} {where}":
            continue
        special = {"lengths is None: return": "def hide_padding(", "d_output.masked_fill": "def _arriving("}
        if module == "lstm": special = {"rows += params": "def _project(", "grads[name] = rows": "def _parameter_gradients("}
        function = next((head for part, head in special.items() if part in old), heads.get(where, "def rnn_forward("))
        cells, tests = run(module, function, old, new)
        unnoticed += not (cells and tests)
        lines.append(f"| {mistake} | `{where.partition(',')[0]}`{where.partition(',')[1]}{where.partition(',')[2]} | {describe_cells(cells)} | {describe_tests(tests)} |")
        print(lines[-1], flush=True)
    if options.record:
        text = f"# Mutations\n\nWritten by `tests/mutations.py`, whose first lines say what is done. Python {sys.version.split()[0]}.\n\n"
        Path(options.record).write_text(text + "\n".join(lines) + "\n", encoding="utf-8")
    sys.exit(f"{unnoticed} unnoticed" if unnoticed else 0)


if __name__ == "__main__":
    main()
