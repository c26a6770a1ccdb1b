"""From a notebook as nbdev wants it to a page as a reader wants it.

nbdev's directives (`#| export`, `#| hide`, ...) tell tools what to do with a cell. No reader should see them:
`page` strips them and turns what they ask for into the tags that MyST-NB understands.
"""
import json
import re
from pathlib import Path

DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(?P<key>[\w-]+)\s*:?\s*(?P<value>.*?)\s*$")
# Words for nbval; they stand at the top of a cell or anywhere in it and mean nothing to a reader.
NBVAL = re.compile(r"^\s*#\s*(NBVAL_\w+|PYTEST_VALIDATE_\w+)\s*$")

PARTS = (  # The number of a chapter gives its part: (first number after the part, its name).
    (1, "Before you start"),
    (10, "I · Foundations"),
    (20, "II · Memory"),
    (30, "III · Attention and beyond"),
    (40, "IV · Craft"),
    (70, "V · Applications"),
    (100, "VI · Frontier and evidence"),
)


def natural_order(path):
    """Sort key: `2_x` before `10_x`, `01_x` before `01a_x`, `index` first."""
    stem = Path(path).stem
    return stem != "index", [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", stem)]


def notebooks(folder):
    """The notebooks of `folder` that are pages, in reading order; names that begin with _ are not pages."""
    found = [path for path in Path(folder).glob("*.ipynb") if not path.name.startswith(("_", "."))]
    return sorted(found, key=natural_order)


def chapter_number(path):
    """`02` of `02_rnn.ipynb`, `01a` of `01a_datasets.ipynb`, None of a page without a number."""
    match = re.match(r"(\d+[a-z]?)_", Path(path).name)
    return match and match[1]


def part_name(path):
    """The part a chapter belongs to, None for a page without a number."""
    number = chapter_number(path)
    return number and next(name for end, name in PARTS if int(re.match(r"\d+", number)[0]) < end)


def split_directives(source):
    """The directives at the top of a cell as a dict, and the source without them and without nbval's comments."""
    directives, lines = {}, source.split("\n")
    start = 1 if lines and lines[0].startswith("%%") else 0
    while start < len(lines) and (match := DIRECTIVE.match(lines[start])):
        directives[match["key"]] = match["value"].strip("\"'")
        del lines[start]
    lines = [line for line in lines if not NBVAL.match(line)]
    return directives, "\n".join(lines).strip("\n")


def page_cell(cell):
    """A code cell as the site shows it, or None where the site shows nothing."""
    directives, source = split_directives("".join(cell["source"]))
    if "hide" in directives or not source.strip():
        return None
    metadata = {"tags": list(cell.get("metadata", {}).get("tags", []))}
    if directives.get("echo") == "false":
        metadata["tags"].append("remove-input")
    if directives.get("output") == "false":
        metadata["tags"].append("remove-output")
    if directives.get("code-fold") in ("true", "show"):
        summary = directives.get("code-summary", "Show the code")
        # A solution hides its output too, or the answer would stand there unasked.
        solution = summary.lower().startswith(("solution", "answer"))
        metadata["tags"].append("hide-cell" if solution else "hide-input")
        metadata["mystnb"] = {"code_prompt_show": summary, "code_prompt_hide": summary}
    outputs = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
    return {**cell, "source": source, "metadata": metadata, "outputs": outputs}


def page(notebook):
    """A notebook (a dict, left as it is) as the site shows it."""
    cells = [page_cell(cell) if cell["cell_type"] == "code" else cell for cell in notebook["cells"]]
    language = {"name": "python", "pygments_lexer": "ipython3"}
    return {
        **notebook,
        "metadata": {**notebook.get("metadata", {}), "language_info": language},
        "cells": [cell for cell in cells if cell is not None],
    }


def title_and_claim(notebook):
    """The H1 of a notebook and the sentence that follows it after `>`."""
    text = "\n".join("".join(cell["source"]) for cell in notebook["cells"][:3] if cell["cell_type"] == "markdown")
    title = re.search(r"^# (.+)$", text, re.M)
    claim = re.search(r"^>[ \t]*(.+(?:\n>.*)*)", text, re.M)
    return (
        title[1].strip() if title else "",
        re.sub(r"\s*\n>\s*", " ", claim[1]).strip() if claim else "",
    )


def read(path):
    """A notebook as a dict."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def exported_module(notebook):
    """`rnn` where a cell says `#| default_exp rnn`, else None."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and (match := re.search(r"^#\s*\|\s*default_exp\s+(\S+)", "".join(cell["source"]), re.M)):
            return match[1]
    return None


def dump(notebook):
    """The text of a notebook file."""
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
