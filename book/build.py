"""Build the site: `python book/build.py --source nbs --out _build/html`.

`nbs` renders the outputs the notebooks store (seconds); `_build/nbs` holds the copies that execute.py made.
"""
import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pages
from docments import rst

BOOK = Path(__file__).absolute().parent
ROOT = BOOK.parent


def write(path, content):
    """Write a file unless it already says so; Sphinx reads only what changed."""
    content = content.encode("utf-8") if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)
    return path


def plain(markdown):
    """A title as the sidebar can show it: links, code marks and emphasis gone."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown).replace("`", "").replace("*", "")


def toctrees(chapters, modules):
    """The hidden tables of contents that make the sidebar: a part each, then the library."""
    parts = {}
    for path in chapters:
        if part := pages.part_name(path):
            title = plain(pages.title_and_claim(pages.read(path))[0]) or path.stem
            parts.setdefault(part, []).append(f"{title} <{path.stem}>")
    if modules:
        parts["The library"] = [f"{'rnnbook.' + name} <api/{name}>" for name in modules]
    blocks = ["```{toctree}\n:hidden:\n:caption: %s\n\n%s\n```" % (part, "\n".join(entries)) for part, entries in parts.items()]
    return "\n\n".join(blocks)


def exported_values(file):
    """`(name, comment)` of what a module exports besides functions and classes; the comment stands behind it or above."""
    lines = file.read_text(encoding="utf-8").split("\n")
    found, exported = [], []
    for node in ast.parse("\n".join(lines)).body:
        for name in [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]:
            if name == "__all__":
                exported = ast.literal_eval(node.value)
            behind = re.search(r"[\])}\"'\d]\s*#\s*(.+)$", lines[node.end_lineno - 1])
            above = re.match(r"#\s*(?!\s|%%|\|)(.+)", lines[node.lineno - 2])
            found.append((name, (behind or above or ["", ""])[1]))
    return [(name, comment) for name, comment in found if name in exported]


def api_page(package, module, chapter):
    """The page of a module: what its chapter claims, where that is, then every name the module exports."""
    intro = ""
    if chapter:
        title, claim = pages.title_and_claim(pages.read(chapter))
        claim = re.sub(r"\]\((\w+\.ipynb)", r"](../\1", claim)
        intro = f"> {claim}\n\nExplained, derived and tested in the chapter [{plain(title)}](../{chapter.name}).\n\n"
    members = f".. automodule:: {package.name}.{module}\n   :ignore-module-all:\n"  # what a module passes on stands on its own page
    for name, comment in exported_values(package / f"{module}.py"):
        members += f"\n.. py:data:: {package.name}.{module}.{name}\n\n   {rst(comment)}\n"
    members = f"```{{eval-rst}}\n{members}```\n"
    return f"# {package.name}.{module}\n\n{intro}{members}"


def prepare(source, folder, package):
    """Fill `folder` with what Sphinx reads; returns the notebooks, and whether the pages are those of the last time."""
    chapters = pages.notebooks(source)
    if not any(path.stem == "index" for path in chapters):
        raise SystemExit(f"{source}: expected notebooks with an index.ipynb, found {len(chapters)} notebooks")
    explained = {pages.exported_module(pages.read(path)): path for path in chapters}
    modules = {path.stem for path in package.glob("*.py") if not path.name.startswith("_")}
    # The library's pages follow the chapters; a module without a chapter comes last.
    ordered = [name for name in explained if name in modules] + sorted(modules - set(explained))
    before, written = set(folder.rglob("*.*")), set()
    for path in chapters:
        notebook = pages.read(path)
        if path.stem == "index":
            cell = {"cell_type": "markdown", "id": "toctrees", "metadata": {}, "source": toctrees(chapters, ordered)}
            notebook = {**notebook, "cells": [*notebook["cells"], cell]}
        written.add(write(folder / path.name, pages.dump(notebook)))
    for name in ordered:
        written.add(write(folder / "api" / f"{name}.md", api_page(package, name, explained.get(name))))
    for path in before - written:
        path.unlink()
    return chapters, before == written


def build(source, out):
    """Build the site of the notebooks in `source` into `out`; returns Sphinx's exit status."""
    source, out = Path(source).absolute(), Path(out).absolute()
    work = out.parent / f"{out.name}-work"  # Sphinx's sources and caches: one set for each site
    chapters, same_pages = prepare(source, work / "source", ROOT / "rnnbook")
    if not same_pages:  # links to pages that came or went are in pages that did not change
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(work / "doctrees", ignore_errors=True)
    downloads = out / "notebooks"
    shutil.rmtree(downloads, ignore_errors=True)
    for path in chapters:
        write(downloads / path.name, path.read_bytes())
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q"]
    command += ["-c", str(BOOK), "-d", str(work / "doctrees"), str(work / "source"), str(out), "-W", "--keep-going"]
    status = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}).returncode
    if status:  # or the next run would skip the pages that are at fault, and call itself clean
        shutil.rmtree(work / "doctrees", ignore_errors=True)
    return status


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default=ROOT / "nbs", help="folder of the notebooks (default: nbs)")
    parser.add_argument("--out", default=ROOT / "_build" / "html", help="folder of the site (default: _build/html)")
    options = parser.parse_args()
    status = build(options.source, options.out)
    index = Path(options.out).absolute() / "index.html"
    if status:
        print(f"The site has warnings (above); what could be built lies in {index.parent}", file=sys.stderr)
        return status
    print(f"The book is ready. Open it in a browser:\n  {index.as_uri()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
