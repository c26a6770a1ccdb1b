"""Draw the picture on README's first screen: `.venv/bin/python book/readme_figure.py` (about four minutes on two cores).

A recurrent network of our own learns Python from the standard library's source. Then it reads the function that computes it, and
each character is colored by the activation of one unit: the one that, on held-out text, goes most with an open bracket.
"""
import html
import inspect
from pathlib import Path

import numpy as np
import torch

from rnnbook.character_model import CharRNN
from rnnbook.datasets import python_source
from rnnbook.plotting import COLORS
from rnnbook.rnn import rnn_forward
from rnnbook.sequences import Vocabulary, stream_batches
from rnnbook.training import Trainer

OUT = Path(__file__).parent / "static" / "readme.svg"
HIDDEN, STEPS, SEED = 256, 4000, 0


def learn():
    """A trained network, its vocabulary, and the text held out."""
    train, heldout = python_source()
    vocabulary = Vocabulary.from_text(train)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = CharRNN(len(vocabulary), HIDDEN)
    trainer = Trainer(model, CharRNN.loss, lr=lambda share: 4e-3 * (1 - share) + 1e-5, max_norm=1.0, device="cpu")
    trainer.fit(list(stream_batches(vocabulary.encode(train), 64, 64)), steps=STEPS)
    return model, vocabulary, heldout


@torch.no_grad()
def states(model, vocabulary, text):
    """Every unit's activation after each character, (N, H)."""
    ids = torch.from_numpy(vocabulary.encode(text))
    one_hot = torch.nn.functional.one_hot(ids, len(vocabulary)).float()  # (N, V)
    return model.layer(one_hot[:, None])[0][:, 0].numpy()


def inside_brackets(text):
    """1 after each character with a bracket open on its line, 0 elsewhere, (N,)."""
    inside, depth = np.zeros(len(text)), 0
    for n, character in enumerate(text):
        depth = 0 if character == "\n" else max(0, depth + (character in "([{") - (character in ")]}"))
        inside[n] = depth > 0
    return inside


def excerpt():
    """The heart of `rnn_forward`: from the first line of its loop's preparation to its return."""
    lines = inspect.getsource(rnn_forward).splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("    h = np.empty"))
    return "\n".join(line[4:] for line in lines[start:])


def mix(color, share):
    """The color on white paper, as hex; share 1 is the color itself."""
    return "#" + "".join(f"{round(255 + share * (int(color[i:i + 2], 16) - 255)):02x}" for i in (1, 3, 5))


def draw(text, values, title, notes):
    """Text as an SVG on a white card, each character on the color of its value from -1 to 1."""
    wide, high, left, top = 8.4, 24, 28, 74
    lines = text.split("\n")
    width, height = 2 * left + wide * max(map(len, lines)), top + high * len(lines) + 24 + 20 * len(notes)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{html.escape(title)}">',
        '<rect width="100%" height="100%" rx="14" fill="#ffffff" stroke="#d0d7de"/>',
        f'<text x="{left}" y="42" font-family="Helvetica,Arial,sans-serif" font-size="19" font-weight="600" fill="#222222">{html.escape(title)}</text>',
    ]
    n = 0
    for row, line in enumerate(lines):
        y = top + high * row
        for column in range(len(line)):
            value = round(float(values[n + column]), 1)
            color = mix(COLORS["g"], value) if value >= 0 else mix(COLORS["h"], -0.3 * value)
            parts.append(f'<rect x="{left + wide * column:.1f}" y="{y}" width="{wide + 0.3:.1f}" height="{high - 3}" fill="{color}"/>')
        if line.strip():
            indent = len(line) - len(line.lstrip())
            body = line.strip().replace("  ", "\u00a0\u00a0")  # SVG would fold the spaces
            parts.append(
                f'<text x="{left + wide * indent:.1f}" y="{y + 15.5}" textLength="{wide * len(body):.1f}" fill="#222222" '
                f'font-family="ui-monospace,Menlo,Consolas,DejaVu Sans Mono,monospace" font-size="14">{html.escape(body)}</text>'
            )
        n += len(line) + 1
    for row, note in enumerate(notes):
        y = top + high * len(lines) + 18 + 20 * row
        parts.append(f'<text x="{left}" y="{y}" font-family="Helvetica,Arial,sans-serif" font-size="13" fill="#595959">{html.escape(note)}</text>')
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def main():
    model, vocabulary, heldout = learn()
    activations, target = states(model, vocabulary, heldout), inside_brackets(heldout)
    correlation = np.array([np.corrcoef(unit, target)[0, 1] for unit in activations.T])  # (H,)
    unit = int(abs(correlation).argmax())
    text, before = excerpt(), "def rnn_forward(x, params, state):\n"  # what the network has read when the excerpt begins
    values = np.sign(correlation[unit]) * states(model, vocabulary, before + text)[len(before):, unit]
    notes = [
        "A recurrent network learned from Python's standard library. Here it reads the NumPy code of its own forward pass.",
        f"Each character shows unit {unit} of {HIDDEN} after it: orange above zero, blue below. On text the network has not seen,",
        f"the unit's correlation with \u201ca bracket is open on this line\u201d is {abs(correlation[unit]):.2f}.",
    ]
    OUT.write_text(draw(text, values, "Nobody told this unit what a bracket is", notes), encoding="utf-8")
    print(*notes, f"Written to {OUT}", sep="\n")


if __name__ == "__main__":
    main()
