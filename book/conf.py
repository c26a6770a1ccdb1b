"""Sphinx configuration of the site. `build.py` prepares the sources and starts Sphinx with it."""
import base64
import configparser
import hashlib
import importlib.metadata
import inspect
import json
import shutil
import sys
from pathlib import Path

from docutils import nodes
from sphinx.pycode import ModuleAnalyzer

BOOK = Path(__file__).absolute().parent
ROOT = BOOK.parent
sys.path[:0] = [str(BOOK), str(ROOT)]  # the build shows this checkout, whatever else is installed

import docments  # noqa: E402
import pages  # noqa: E402

# ---- the project, from its one source of metadata
settings = configparser.ConfigParser()
settings.read(ROOT / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]
project = settings["title"]
author = settings["author"]
copyright = settings["copyright"]
version = release = settings["version"]

# ---- notebooks and their Markdown
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
exclude_patterns = ["**/_*", "**/.*"]
nb_execution_mode = "off"  # execute.py runs the notebooks; the site shows what they stored
nb_output_stderr = "remove"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
myst_dmath_double_inline = True
default_role = "literal"

# ---- API pages
autodoc_default_options = {"members": True, "undoc-members": True}
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # torch's own docstrings would drown ours
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
maximum_signature_line_length = 60
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

# ---- the look
html_theme = "furo"
html_title = project
html_static_path = ["static"]
templates_path = ["templates"]
html_css_files = ["fonts.css", "book.css"]
html_js_files = ["book.js"]
html_favicon = "static/favicon.svg"
html_logo = "static/logo.svg"
html_copy_source = False
html_show_sourcelink = False
html_show_search_summary = False  # Sphinx would fetch pages, which file:// forbids; book.js does it without
html_use_index = False
html_domain_indices = False
pygments_style = "github-light-colorblind"
pygments_dark_style = "github-dark-colorblind"

SERIF = "'Source Serif 4', Charter, 'Iowan Old Style', Georgia, serif"
SANS = "'Source Sans 3', -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
MONO = "'Source Code Pro', ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
FONTS = {"font-stack": SANS, "font-stack--headings": SANS, "font-stack--monospace": MONO, "font-stack--prose": SERIF}
html_theme_options = {
    "light_css_variables": {
        **FONTS,
        "color-brand-primary": "#0a5c8f",
        "color-brand-content": "#0a5c8f",
        "color-brand-visited": "#0a5c8f",
        "color-code-background": "#f6f7f9",
        "color-inline-code-background": "#f1f3f6",
        "color-background-secondary": "#f7f8fa",
        "color-figure-border": "#e3e6ea",
        "color-claim": "#0a5c8f",
        "color-api-name": "var(--color-foreground-primary)",
        "color-api-pre-name": "var(--color-foreground-secondary)",
        "color-sidebar-link-text": "var(--color-foreground-secondary)",
        "color-sidebar-link-text--top-level": "var(--color-foreground-secondary)",
        "color-sidebar-item-background--current": "var(--color-sidebar-item-background--hover)",
    },
    "dark_css_variables": {
        "color-brand-primary": "#7cc4f0",
        "color-brand-content": "#7cc4f0",
        "color-brand-visited": "#7cc4f0",
        "color-background-primary": "#14171b",
        "color-background-secondary": "#191d22",
        "color-code-background": "#1b2026",
        "color-inline-code-background": "#22282f",
        "color-figure-border": "#2c343d",
        "color-claim": "#7cc4f0",
        "color-api-name": "var(--color-foreground-primary)",
        "color-api-pre-name": "var(--color-foreground-secondary)",
    },
}

# ---- math: one file, no network (the SVG output needs no font files, so file:// works in every browser)
mathjax_path = "tex-svg-full.js"
mathjax3_config = {
    "svg": {"fontCache": "global", "scale": 1.0},
    "options": {"enableMenu": False},
    "tex": {"macros": {"R": r"\mathbb{R}"}},
}


def mathjax_file():
    """The one MathJax file of the package sphinx-mathjax-offline that the site uses."""
    files = importlib.metadata.files("sphinx-mathjax-offline") or []
    return next(Path(file.locate()) for file in files if file.name == "tex-svg-full.js")


def fonts_css():
    """The fonts as one style sheet with the files inside it: browsers refuse font files of file:// pages."""
    ranges = {"greek": "U+0370-03FF", "latin": "U+0000-00FF,U+0131,U+0152-0153,U+02BB-02DC,U+2000-206F,U+20AC,U+2122,U+2191,U+2193,U+2212,U+2215"}
    rules = []
    for file in sorted((BOOK / "fonts").glob("*.woff2")):
        name, subset, _, style = file.stem.rsplit("-", 3)
        family = {"source-serif-4": "Source Serif 4", "source-sans-3": "Source Sans 3", "source-code-pro": "Source Code Pro"}[name]
        data = base64.b64encode(file.read_bytes()).decode("ascii")
        rules.append(
            f"@font-face{{font-family:'{family}';font-style:{style};font-weight:200 900;font-display:block;"
            f"src:url(data:font/woff2;base64,{data}) format('woff2');unicode-range:{ranges[subset]}}}"
        )
    return "\n".join(rules) + "\n"


# ---- hooks
def read_source(app, docname, source):
    """A notebook enters Sphinx without nbdev's directives."""
    if app.env.doc2path(docname).suffix == ".ipynb":
        source[0] = json.dumps(pages.page(json.loads(source[0])))


def process_docstring(app, what, name, obj, options, lines):
    """A docstring enters Sphinx with its docments."""
    # nbdev makes a module's docstring of the first line of its chapter's claim; the page has the whole claim.
    lines[:] = [] if what == "module" else docments.api_lines(lines, obj)


def skip_member(app, what, name, obj, skip, options):
    """Leave out of a class what nobody documented."""
    if what == "module":
        return None
    own = inspect.unwrap(getattr(obj, "__func__", obj))
    if not (inspect.isroutine(own) or isinstance(own, property)):
        return True  # the fields of a data class: its parameters say it all
    return None if own.__doc__ or docments.docments(own) else True


def library_source(app, modname):
    """A module's source on the site: nbdev exports the directives of other tools, and leaves them there."""
    analyzer = ModuleAnalyzer.for_module(modname)
    tags = analyzer.find_tags()
    lines = ["" if pages.DIRECTIVE.match(line) else line for line in analyzer.code.split("\n")]
    return "\n".join(lines), tags


def page_context(app, pagename, templatename, context, doctree):
    """What page.html needs to link the notebook, the module and the part of a page."""
    notebook = app.srcdir / f"{pagename}.ipynb"
    context["book"] = {}
    if notebook.exists():
        content = pages.read(notebook)
        module = pages.exported_module(content)
        context["book"] = {
            "notebook": f"notebooks/{notebook.name}",
            "source": f"{settings['git_url']}/blob/{settings['branch']}/{settings['nbs_path']}/{notebook.name}",
            "part": pages.part_name(notebook),
            "number": pages.chapter_number(notebook),
            "module": module if module and (app.srcdir / "api" / f"{module}.md").exists() else None,
        }


def section_texts(doctree):
    """`[[anchor, title, text], ...]` of a page's sections, for the lines below a search result."""
    found = []
    for section in doctree.findall(nodes.section):
        own = [child for child in section.children if not isinstance(child, (nodes.section, nodes.title))]
        own.sort(key=lambda child: child.get("nb_element") == "cell_code")  # the prose explains: it comes before the code
        title = next((child.astext() for child in section.children if isinstance(child, nodes.title)), "")
        text = " ".join(child.astext() for child in own if not isinstance(child, (nodes.raw, nodes.comment)))
        found.append([f"#{section['ids'][0]}", title, " ".join(text.split())])
    return found


def write_assets(app):
    """What every page loads besides Sphinx's own files."""
    static = app.outdir / "_static"
    static.mkdir(parents=True, exist_ok=True)
    (static / "fonts.css").write_text(fonts_css(), encoding="utf-8")
    shutil.copyfile(BOOK / "fonts" / "OFL.txt", static / "fonts.LICENSE.txt")
    shutil.copyfile(mathjax_file(), static / "tex-svg-full.js")


def write_search_texts(app, exception):
    """The text of every section, loaded by the search page alone."""
    if exception is None:
        texts = {name: section_texts(app.env.get_doctree(name)) for name in sorted(app.env.found_docs)}
        text = json.dumps(texts, ensure_ascii=False, separators=(",", ":"))
        (app.outdir / "searchtexts.js").write_text(f"window.BOOK_TEXTS = {text};\n", encoding="utf-8")


def setup(app):
    hooks = b"".join(file.read_bytes() for file in (BOOK / "pages.py", BOOK / "docments.py"))
    app.add_config_value("book_hooks", hashlib.sha256(hooks).hexdigest(), "env")  # a changed hook reads all pages anew
    app.connect("source-read", read_source)
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("viewcode-find-source", library_source)
    app.connect("html-page-context", page_context)
    app.connect("builder-inited", write_assets)
    app.connect("build-finished", write_search_texts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
