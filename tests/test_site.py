"""The site: what the build makes of a notebook, and the built pages in a real browser, opened from file://."""
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).absolute().parent.parent
pytest.importorskip("sphinx", reason="the site's tools are not installed: pip install -e '.[book]'")
sys.path.insert(0, str(ROOT / "book"))
import docments  # noqa: E402
import pages  # noqa: E402

sys.path.remove(str(ROOT / "book"))  # its build.py must not stand in for the package of that name

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


def code(source, *outputs):
    return {"cell_type": "code", "metadata": {}, "source": source, "outputs": list(outputs)}


def said(text, name="stdout"):
    return {"output_type": "stream", "name": name, "text": text}


# ---- from a notebook to a page


def test_directives_leave_and_take_effect():
    notebook = {
        "metadata": {},
        "cells": [
            {"cell_type": "markdown", "metadata": {}, "source": "# Title\n\n> A claim\n> in two lines."},
            code("#| default_exp sample"),
            code("#| hide\nsecret = 1"),
            code("#| export\n#| hide\nalso_secret = 1"),
            code("#| export\ndef f(x): return x"),
            code("#| echo: false\nprint(1)", said("1\n")),
            code("#| eval: false\nraise ValueError"),
            code("#| code-fold: true\n#| code-summary: \"Solution: two\"\nprint(2)", said("2\n")),
            code("#| code-fold: true\nprint(3)", said("3\n")),
            code("# NBVAL_IGNORE_OUTPUT\nprint(4)  # stays", said("4\n"), said("a bar", "stderr")),
            code(["#| exporti\n", "x = '#| not a directive'\n", "#| nor this"]),
        ],
    }
    before = json.dumps(notebook)
    cells = pages.page(notebook)["cells"][1:]
    assert json.dumps(notebook) == before
    assert [cell["source"] for cell in cells] == [
        "def f(x): return x",
        "print(1)",
        "raise ValueError",
        "print(2)",
        "print(3)",
        "print(4)  # stays",
        "x = '#| not a directive'\n#| nor this",
    ]
    tags = [cell["metadata"]["tags"] for cell in cells]
    assert tags == [[], ["remove-input"], [], ["hide-cell"], ["hide-input"], [], []]
    assert cells[3]["metadata"]["mystnb"]["code_prompt_show"] == "Solution: two"
    assert [output["name"] for output in cells[5]["outputs"]] == ["stdout"]
    assert pages.exported_module(notebook) == "sample"
    assert pages.title_and_claim(notebook) == ("Title", "A claim in two lines.")


def test_reading_order_and_parts():
    names = ["10_lstm", "02_rnn", "01a_datasets", "index", "01_sequences", "00_notation", "40_text"]
    ordered = sorted((f"{name}.ipynb" for name in names), key=pages.natural_order)
    assert [Path(name).stem for name in ordered] == ["index", "00_notation", "01_sequences", "01a_datasets", "02_rnn", "10_lstm", "40_text"]
    assert [pages.part_name(f"{name}.ipynb") for name in ("00a_plotting", "09_debugging", "10_lstm", "90_papers", "index")] == [
        "Before you start",
        "I · Foundations",
        "II · Memory",
        "VI · Frontier and evidence",
        None,
    ]


def sample(
    x,  # (T, B, I) input with `code` and $h_t$
    state=None,  # (1, B, H) or None: zeros, * and _ are safe_
    *rest,  # more
    # a comment above
    scale: float = 1.0,
    lengths: tuple = (
        1,
        2,
    ),  # (B,) lengths
    **options,  # of the cell
) -> tuple:  # output (T, B, H), state (1, B, H)
    """One line that says what it does to `x`, as clip_grad_norm_ does.

    Raises ValueError if `x` has the wrong shape,
    and says which.

    Source: Elman (1990), equation 2.
    """


def test_docments_become_fields():
    lines = docments.api_lines((sample.__doc__ or "").replace("\n    ", "\n").split("\n"), sample)
    assert lines[0] == "One line that says what it does to \\ ``x``\\ , as clip\\_grad\\_norm\\_ does."
    fields = [line for line in lines if line.startswith(":")]
    assert fields == [
        ":param x: ``(T, B, I)`` input with \\ ``code``\\  and \\ :math:`h_t`\\ ",
        ":param state: ``(1, B, H)`` or None: zeros, \\* and \\_ are safe\\_",
        ":param \\*rest: more",
        ":param scale: a comment above",
        ":param lengths: ``(B,)`` lengths",
        ":param \\*\\*options: of the cell",
        ":returns: output (T, B, H), state (1, B, H)",
        ":Raises: ValueError if \\ ``x``\\  has the wrong shape, and says which.",
        ":Source: Elman (1990), equation 2.",
    ]


# ---- running notebooks


def run_notebooks(*arguments):
    command = [sys.executable, str(ROOT / "book" / "execute.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def notebook_file(path, *sources):
    cells = [{**code(source), "execution_count": None, "id": f"c{n}"} for n, source in enumerate(sources)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def test_execute_runs_copies_and_leaves_the_originals(tmp_path):
    pytest.importorskip("ipykernel", reason="no kernel to run notebooks in: pip install -e '.[dev]'")
    first = notebook_file(tmp_path / "nbs" / "01_one.ipynb", "import rnnbook, sys\nprint(sys.executable)", "#| eval: false\n1 / 0")
    notebook_file(tmp_path / "nbs" / "_template.ipynb", "1 / 0")
    before = first.read_bytes()
    result = run_notebooks(tmp_path / "nbs", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "[1/1]" in result.stdout and "01_one" in result.stdout
    assert first.read_bytes() == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["01_one.ipynb"]
    cells = pages.read(tmp_path / "out" / "01_one.ipynb")["cells"]
    assert "".join(cells[0]["outputs"][0]["text"]).strip() == sys.executable
    assert cells[0]["execution_count"] is None and cells[1]["outputs"] == []


def test_execute_stops_with_the_notebook_and_the_cell(tmp_path):
    pytest.importorskip("ipykernel", reason="no kernel to run notebooks in: pip install -e '.[dev]'")
    notebook_file(tmp_path / "nbs" / "01_bad.ipynb", "x = 1", "assert x == 2, 'x is wrong'")
    notebook_file(tmp_path / "nbs" / "02_slow.ipynb", "import time\ntime.sleep(100)")
    result = run_notebooks(tmp_path / "nbs", tmp_path / "out")
    assert result.returncode == 1
    assert "01_bad.ipynb, cell 1: AssertionError: x is wrong" in result.stderr
    assert "assert x == 2" in result.stderr and "\x1b[" not in result.stderr


def test_execute_names_the_files_that_notebooks_leave(tmp_path):
    pytest.importorskip("ipykernel", reason="no kernel to run notebooks in: pip install -e '.[dev]'")
    notebook_file(tmp_path / "nbs" / "01_messy.ipynb", "open('left.txt', 'w').close()")
    result = run_notebooks(tmp_path / "nbs", tmp_path / "out")
    assert result.returncode == 1 and "left.txt" in result.stderr


# ---- the built site


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The site of the stored outputs: what RNNBOOK_SITE names, or built here."""
    if given := os.environ.get("RNNBOOK_SITE"):
        folder = Path(given).absolute()
        assert (folder / "index.html").exists(), f"RNNBOOK_SITE: expected a built site, found no index.html in {folder}"
        return folder
    folder = tmp_path_factory.mktemp("site") / "html"
    command = [sys.executable, str(ROOT / "book" / "build.py"), "--source", str(ROOT / "nbs"), "--out", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (folder / "index.html").as_uri() in result.stdout
    return folder


@pytest.fixture(scope="session")
def chapters():
    return [path for path in pages.notebooks(ROOT / "nbs") if path.stem != "index"]


def test_every_notebook_and_module_has_a_page(site, chapters):
    modules = [path.stem for path in (ROOT / "rnnbook").glob("*.py") if not path.name.startswith("_")]
    expected = [f"{path.stem}.html" for path in chapters] + [f"api/{name}.html" for name in modules]
    assert expected and not [name for name in expected if not (site / name).exists()]
    assert not list(site.glob("_template*"))


def test_the_home_page_lists_every_chapter(chapters):
    home = "\n".join("".join(cell["source"]) for cell in pages.read(ROOT / "nbs" / "index.ipynb")["cells"])
    listed = re.findall(r"^\| \[([^\]]+)\]\((\w+\.ipynb)\) \| .{20,} \|$", home, re.M)
    assert listed == [(pages.title_and_claim(pages.read(path))[0], path.name) for path in chapters]


def test_every_page_offers_its_notebook(site, chapters):
    for path in chapters:
        html = (site / f"{path.stem}.html").read_text(encoding="utf-8")
        link = re.search(r'<a class="notebook-download" href="([^"]+)" download>', html)
        offered = pages.read(site / unquote(link[1]))
        assert [cell["source"] for cell in offered["cells"]] == [cell["source"] for cell in pages.read(path)["cells"]]
        assert re.search(rf'<a class="notebook-source" href="https://[^"]+/nbs/{path.name}">', html)


def test_links_between_pages_lead_somewhere(site):
    broken = []
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        for link in re.findall(r'<(?:a|link|script|img)\b[^>]*?\b(?:href|src)="([^"]+)"', html):
            target, _, anchor = unquote(link).partition("#")
            if re.match(r"[a-z]+:", link) or target.startswith("data:"):
                continue
            target = (page.parent / target.split("?")[0]) if target else page
            if not target.exists():
                broken.append(f"{page.name}: {link}")
            elif anchor and target.suffix == ".html" and f'id="{anchor}"' not in target.read_text(encoding="utf-8"):
                broken.append(f"{page.name}: {link}")
    assert not broken, broken


def test_nothing_is_loaded_from_elsewhere(site):
    loads = re.compile(r'<(?:script|img|iframe|source)\b[^>]*\bsrc="https?:|<link\b[^>]*stylesheet[^>]*href="https?:|url\(["\']?https?:|@import')
    assert not [page.name for page in [*site.rglob("*.html"), *site.rglob("*.css")] if loads.search(page.read_text(encoding="utf-8"))]


# ---- in the browser


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[book]'")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    with sync_api.sync_playwright() as playwright:
        if not path and not Path(playwright.chromium.executable_path).exists():
            pytest.skip(f"no browser: none of {', '.join(names)} is on the PATH, nor one of playwright's own")
        started = playwright.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        yield started
        started.close()


def settle(page):
    """Wait until the math is set and the fonts are there."""
    page.wait_for_load_state("load")
    page.evaluate("() => (window.MathJax && MathJax.startup ? MathJax.startup.promise : null)")
    page.evaluate("() => document.fonts.ready.then(() => null)")


OBSERVE = """() => {
  const article = document.querySelector("article");
  const scrolls = (element) => {
    for (let box = element; box && box !== article; box = box.parentElement)
      if (["auto", "scroll", "hidden", "clip"].includes(getComputedStyle(box).overflowX)) return true;
    return false;
  };
  const wide = [...article.querySelectorAll("*")].filter((element) => {
    const box = element.getBoundingClientRect();
    return box.width && box.right > innerWidth + 1 && !scrolls(element.parentElement) && !element.closest("svg, mjx-assistive-mml");
  });
  const raw = [];
  const walk = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const inside = walk.currentNode.parentElement;
    if (inside.closest("pre, code, mjx-container, script, style, .cell_output")) continue;
    if (/\\\\[a-zA-Z(\\[]|\\$\\$/.test(walk.currentNode.data)) raw.push(walk.currentNode.data.trim().slice(0, 80));
  }
  return {
    width: document.documentElement.scrollWidth,
    wide: wide.slice(0, 5).map((element) => `${element.tagName}.${element.className} ${element.textContent.slice(0, 40)}`),
    math: article.querySelectorAll(".math").length,
    drawn: [...article.querySelectorAll(".math")].filter((element) => element.querySelector("mjx-container > svg")).length,
    failed: [...article.querySelectorAll("mjx-merror, [data-mjx-error]")].map((element) => element.textContent),
    raw,
    directives: (article.textContent.match(/^\\s*#\\|.*$/gm) || []).slice(0, 3),
    broken: [...document.images].filter((image) => !image.complete || !image.naturalWidth).map((image) => image.src),
  };
}"""


@pytest.fixture(scope="session")
def observed(browser, site):
    """Each page at a phone's width: what it says, asks for and measures."""
    found = {}
    with browser.new_context(viewport={"width": 390, "height": 844}, offline=True) as context:
        for file in sorted(site.rglob("*.html")):
            page, messages, requests = context.new_page(), [], []
            page.on("console", lambda message, log=messages: log.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error, log=messages: log.append(str(error)))
            page.on("request", lambda request, log=requests: log.append(request.url))
            page.on("requestfailed", lambda request, log=messages: log.append(f"failed: {request.url}"))
            page.goto(file.as_uri())
            settle(page)
            page.evaluate("() => document.querySelectorAll('article details').forEach((details) => (details.open = true))")
            page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
            found[str(file.relative_to(site))] = {**page.evaluate(OBSERVE), "messages": messages, "requests": requests}
            page.close()
    return found


def complaints(observed, key):
    return {name: page[key] for name, page in observed.items() if page[key]}


def test_pages_open_without_an_error(observed):
    assert not complaints(observed, "messages")
    assert not complaints(observed, "broken")


def test_no_request_leaves_the_machine(observed):
    away = {name: [url for url in page["requests"] if not url.startswith(("file:", "data:", "blob:"))] for name, page in observed.items()}
    assert not {name: urls for name, urls in away.items() if urls}


def test_math_is_rendered(observed):
    assert not complaints(observed, "failed")
    assert not complaints(observed, "raw")
    assert not {name: (page["drawn"], page["math"]) for name, page in observed.items() if page["drawn"] != page["math"]}
    assert sum(page["math"] for page in observed.values()) > 50


def test_no_page_scrolls_sideways_on_a_phone(observed):
    assert not complaints(observed, "wide")
    assert not {name: page["width"] for name, page in observed.items() if page["width"] > 390}


def test_no_directive_is_visible(observed):
    assert not complaints(observed, "directives")


def test_search_finds_truncated_backpropagation(browser, site):
    with browser.new_context() as context:
        page = context.new_page()
        page.goto((site / "index.html").as_uri())
        page.fill("input.sidebar-search", "truncated backpropagation")
        page.press("input.sidebar-search", "Enter")
        page.wait_for_selector("#search-results h2:has-text('Search Results')")
        page.wait_for_selector("ul.search li p.context")
        found = page.eval_on_selector_all("ul.search > li", "items => items.map(i => [i.querySelector('a').getAttribute('href'), i.textContent])")
        hits = [text for link, text in found if link.startswith("03_bptt.html#")]
        assert hits and any("truncated" in text.lower() for text in hits), found
        page.click("ul.search li a[href^='03_bptt.html#']")
        page.wait_for_load_state("load")
        assert Path(unquote(page.url.partition("#")[0])).name == "03_bptt.html"


def test_solutions_unfold(browser, site, chapters):
    seen = 0
    with browser.new_context() as context:
        page = context.new_page()
        for chapter in chapters:
            page.goto((site / f"{chapter.stem}.html").as_uri())
            folds = page.locator("article div.cell details.hide")
            for index in range(folds.count()):
                fold = folds.nth(index)
                if not re.search("solution|answer", fold.locator("summary").inner_text(), re.I):
                    continue
                inside = fold.locator(".cell_input")
                assert not inside.is_visible()
                fold.locator("summary").click()
                assert inside.is_visible() and inside.inner_text().strip()
                seen += 1
    assert seen >= 3


def test_api_pages_show_parameters_and_shapes(browser, site):
    missing, shapes = [], 0
    with browser.new_context() as context:
        page = context.new_page()
        for file in sorted((site / "api").glob("*.html")):
            module = importlib.import_module(f"rnnbook.{file.stem}")
            page.goto(file.as_uri())
            for name in module.__all__:
                obj = getattr(module, name)
                if getattr(obj, "__module__", None) != module.__name__:
                    continue
                shown = page.locator(f"[id='rnnbook.{file.stem}.{name}'] + dd")
                text = shown.inner_text() if shown.count() else ""
                plain = lambda words: re.sub(r"[\W_]+", "", re.sub(r"[`$\\]|\$[^$]*\$", "", words))  # noqa: E731
                for parameter, comment in docments.docments(obj).items():
                    # The first words: math and typographic quotes look different on the page.
                    start = plain(re.split(r"[$`'\"]", comment)[0])[:40]
                    if start not in plain(text) or (parameter != "return" and parameter.split(",")[0].strip("*") not in text):
                        missing.append(f"{file.stem}.{name}: {parameter}")
                    shapes += bool(re.match(r"\(\w+,", comment))
        assert not missing, missing
        assert shapes > 10
        page.goto((site / "api" / "rnn.html").as_uri())
        forward = page.locator("[id='rnnbook.rnn.rnn_forward'] + dd")
        assert "(T, B, I)" in forward.locator("li", has_text="x").first.inner_text()
        assert "Returns" in forward.inner_text() and "(T, B, H)" in forward.inner_text()


def test_light_and_dark(browser, site):
    seen = {}
    for scheme in ("light", "dark"):
        with browser.new_context(color_scheme=scheme) as context:
            page = context.new_page()
            page.goto((site / "02_rnn.html").as_uri())
            settle(page)
            seen[scheme] = page.evaluate(
                """() => {
                  const luminance = (color) => color.match(/[\\d.]+/g).slice(0, 3).reduce((sum, part) => sum + +part / 765, 0);
                  const style = (selector) => getComputedStyle(document.querySelector(selector));
                  return {
                    page: luminance(style("body").backgroundColor),
                    text: luminance(style("article p").color),
                    figure: luminance(style("article .cell_output img, article .cell_output svg").backgroundColor),
                    serif: document.fonts.check("16px 'Source Serif 4'"),
                  };
                }"""
            )
    assert seen["light"]["page"] > 0.9 and seen["light"]["text"] < 0.3
    assert seen["dark"]["page"] < 0.2 and seen["dark"]["text"] > 0.7
    assert seen["light"]["figure"] == seen["dark"]["figure"] == 1
    assert seen["light"]["serif"] and seen["dark"]["serif"]
