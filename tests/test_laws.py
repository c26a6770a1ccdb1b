"""The laws of the house, each kept by a test, and each test shown to be able to fail.

1. One concept, one notebook, one module, one test file.
2. Case tells the implementation: lower_case is NumPy, CamelCase is PyTorch (or holds plain data).
3. The reading order is the import order.
4. The export is current.
5. The library stands alone.
"""
import ast
import dataclasses
import difflib
import importlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NUMBER = re.compile(r"(\d\d[a-z]?)_(\w+)")
STANDING_TESTS = {"laws", "wheel", "site", "evidence"}  # test files that belong to no chapter


@dataclasses.dataclass
class Chapter:
    "A notebook of the book: where it stands, which module it exports, and its cells."
    name: str    # 02_rnn
    module: str  # rnn, or "" where nothing is exported
    code: list   # the source of every code cell
    prose: list  # the source of every markdown cell
    cells: list  # the cells themselves

    @property
    def number(self):
        match = NUMBER.fullmatch(self.name)
        return match[1] if match else ""

    @property
    def title(self):
        match = NUMBER.fullmatch(self.name)
        return match[2] if match else self.name


def read_chapter(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        cell["source"] = "".join(cell["source"])
    code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    prose = [cell["source"] for cell in cells if cell["cell_type"] == "markdown"]
    exports = re.findall(r"^#\|\s*default_exp\s+(\S+)", "\n".join(code), re.MULTILINE)
    return Chapter(path.stem, " ".join(exports), code, prose, cells)


CHAPTERS = [read_chapter(path) for path in sorted((ROOT / "nbs").glob("[!_.]*.ipynb"))]
EXPORTED = [chapter for chapter in CHAPTERS if chapter.module]
MODULES = {path.stem: path for path in sorted((ROOT / "rnnbook").glob("[!_]*.py"))}
ORDER = {chapter.module: chapter.number for chapter in EXPORTED}
each_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.name)
each_exported = pytest.mark.parametrize("chapter", EXPORTED, ids=lambda chapter: chapter.name)


def run_python(code, **environment):
    "A fresh interpreter in the repository; its completed process."
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={**os.environ, **environment})


# ---- 1. One concept, one notebook, one module, one test file


def broken_names(chapters, modules, tests):
    "What breaks law 1 among notebooks, modules and test files."
    numbers = [chapter.number for chapter in chapters if chapter.number]
    exported = [chapter.module for chapter in chapters if chapter.module]
    known = {chapter.title for chapter in chapters} | STANDING_TESTS
    found = [f"{n}: two notebooks carry this number" for n in sorted(set(numbers)) if numbers.count(n) > 1]
    found += [f"{m}: two notebooks feed this module" for m in sorted(set(exported)) if exported.count(m) > 1]
    for chapter in chapters:
        if chapter.name != "index" and not chapter.number:
            found.append(f"{chapter.name}: expected a name such as 02_rnn")
        if chapter.module and chapter.module != chapter.title:
            found.append(f"{chapter.name}: exports {chapter.module}, expected {chapter.title}")
        if chapter.module and chapter.module not in tests:
            found.append(f"{chapter.name}: no tests/test_{chapter.module}.py")
    found += [f"rnnbook/{m}.py: no notebook exports it" for m in sorted(set(modules) - set(exported))]
    found += [f"rnnbook/{m}.py: not exported yet" for m in sorted(set(exported) - set(modules))]
    found += [f"tests/test_{t}.py: named after no chapter" for t in sorted(set(tests) - known)]
    return found


def test_law_1_names():
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert not broken_names(CHAPTERS, MODULES, tests)


@pytest.mark.parametrize("chapters, modules, tests, complaint", [
    ([("02_rnn", "rnn")], ["rnn"], [], "no tests/test_rnn.py"),
    ([("02_rnn", "rnn")], [], ["rnn"], "not exported yet"),
    ([("02_rnn", "recurrent")], ["recurrent"], ["recurrent"], "expected rnn"),
    ([("02_rnn", "rnn"), ("02_gru", "gru")], ["rnn", "gru"], ["rnn", "gru"], "two notebooks carry this number"),
    ([("02_rnn", "rnn"), ("03_rnn", "rnn")], ["rnn"], ["rnn"], "two notebooks feed this module"),
    ([("rnn", "")], [], [], "expected a name such as"),
    ([], ["utils"], [], "no notebook exports it"),
    ([], [], ["various"], "named after no chapter"),
])
def test_law_1_can_fail(chapters, modules, tests, complaint):
    chapters = [Chapter(name, module, [], [], []) for name, module in chapters]
    assert any(complaint in line for line in broken_names(chapters, modules, tests))


# ---- 2. Case tells the implementation

# lower_case names that touch PyTorch on purpose: they lead from one implementation to the other, check tensors, or run a command.
BRIDGES = {
    "rnn": {"numpy_params", "check_input", "check_state"},
    "lstm": {"initial_state"},
    "testing": {"assert_parity", "parity_tolerance"},
}
IN_PLACE = re.compile(r"(?!__)\w*[a-z]_")  # a tensor method that changes its tensor


def parameters(function):
    "The parameters of a function's syntax tree, by name."
    every = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    return {argument.arg: argument for argument in every}


def root(node):
    "The name at the root of `a.b[c].d`, here `a`; None if there is none."
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def changed_arguments(function):
    "The names of parameters that the function writes into."
    names = parameters(function)
    rebound = {target.id for node in ast.walk(function) if isinstance(node, ast.Assign)
               for target in ast.walk(ast.Tuple(node.targets)) if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store)}
    changed = set()
    for node in ast.walk(function):
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.Delete)):
            targets = node.targets if not isinstance(node, ast.AugAssign) else [node.target]
            for target in targets:
                for part in ast.walk(target):
                    if isinstance(part, (ast.Subscript, ast.Attribute)) and not isinstance(part.ctx, ast.Load):
                        changed.add(root(part))
            if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
                annotation = getattr(names.get(node.target.id), "annotation", None)
                if not (isinstance(annotation, ast.Name) and annotation.id in ("int", "float", "str", "bool")):
                    changed.add(node.target.id)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and IN_PLACE.fullmatch(node.func.attr):
            changed.add(root(node.func))
    return (changed & set(names)) - rebound


def broken_functions(source, bridges=()):
    "What breaks law 2 among the public functions of a module's source."
    found = []
    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef) or function.name.startswith("_"):
            continue
        name = function.name
        body = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
        torch = any(node.id == "torch" for node in body)
        if name != name.lower():
            found.append(f"{name}: expected a lower_case name for a function")
        if torch and not name.endswith("_") and name not in bridges:
            found.append(f"{name}: a lower_case function uses PyTorch")
        if not name.endswith("_") and changed_arguments(function):
            found.append(f"{name}: changes its argument {', '.join(sorted(changed_arguments(function)))}")
    return found


def broken_class(thing):
    "What is wrong with a public class by law 2, or None."
    import torch
    plain = dataclasses.is_dataclass(thing) or issubclass(thing, (dict, BaseException)) or hasattr(thing, "_fields")
    torchlike = issubclass(thing, (torch.nn.Module, torch.optim.Optimizer, torch.autograd.Function)) or thing.__name__ == "Trainer"
    if not re.fullmatch(r"[A-Z][A-Za-z0-9]*", thing.__name__):
        return f"{thing.__name__}: expected a CamelCase name for a class"
    if not (plain or torchlike):
        return f"{thing.__name__}: neither PyTorch nor a holder of plain data"


@each_exported
def test_law_2_functions(chapter):
    assert not broken_functions(MODULES[chapter.module].read_text(encoding="utf-8"), BRIDGES.get(chapter.module, ()))


@each_exported
def test_law_2_classes_and_constants(chapter):
    module = importlib.import_module(f"rnnbook.{chapter.module}")
    public = {name: getattr(module, name) for name in module.__all__}
    classes = [thing for thing in public.values() if isinstance(thing, type)]
    assert not [line for line in map(broken_class, classes) if line]
    constants = [name for name, thing in public.items() if not callable(thing)]
    assert all(name == name.upper() for name in constants), constants


@pytest.mark.parametrize("source, complaint", [
    ("def rnn_forward(x):\n    return torch.tanh(x)", "uses PyTorch"),
    ("def Forward(x):\n    return x", "expected a lower_case name"),
    ("def scale(x):\n    x[0] = 1\n    return x", "changes its argument x"),
    ("def scale(x):\n    x *= 2\n    return x", "changes its argument x"),
    ("def scale(params):\n    params['w'] -= 1", "changes its argument params"),
    ("def scale(params):\n    params['w'].mul_(2)", "changes its argument params"),
])
def test_law_2_can_fail(source, complaint):
    assert any(complaint in line for line in broken_functions(source))


@pytest.mark.parametrize("source", [
    "def scale(x):\n    x = x.copy()\n    x[0] = 1\n    return x",
    "def scale_(x):\n    with torch.no_grad(): x.mul_(2)",
    "def count(n: int):\n    n -= 1\n    return n",
    "def fill(x):\n    y = x + 1\n    y[0] = x[1]\n    return y",
])
def test_law_2_lets_pass(source):
    assert not broken_functions(source)


def test_law_2_rejects_a_class_of_neither_kind():
    assert "neither" in broken_class(type("Helper", (), {}))
    assert "CamelCase" in broken_class(type("helper", (dict,), {}))


# ---- 3. The reading order is the import order


def book_imports(source, package="rnnbook"):
    "Every import from the book in a piece of code, as (module, names); also those inside functions."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == package:
                    yield alias.name.partition(".")[2], [alias.name]
        elif isinstance(node, ast.ImportFrom):
            inside = node.level == 1
            if inside or (node.module or "").split(".")[0] == package:
                module = node.module or "" if inside else node.module.partition(".")[2]
                names = [alias.name for alias in node.names]
                if module:
                    yield module, names
                else:  # from rnnbook import rnn
                    yield from ((name, [name]) for name in names)


def broken_imports(source, number, order):
    "What breaks law 3 in the code of the chapter with this number."
    found = []
    for module, names in book_imports(source):
        if "*" in names:
            found.append(f"from {module} import *: expected explicit names")
        elif module not in order:
            found.append(f"{module}: no chapter exports it")
        elif not order[module] < number:
            found.append(f"{module} is chapter {order[module]}: expected one before {number}")
    return found


def late_imports(source):
    "Imports of a module's top level that stand behind its last function or class."
    body = ast.parse(source).body
    last = max((i for i, node in enumerate(body) if isinstance(node, (ast.FunctionDef, ast.ClassDef))), default=len(body))
    return [ast.unparse(node) for node in body[last:] if isinstance(node, (ast.Import, ast.ImportFrom))]


@each_exported
def test_law_3_module(chapter):
    source = MODULES[chapter.module].read_text(encoding="utf-8")
    assert not broken_imports(source, chapter.number, ORDER)
    assert not late_imports(source)


@each_chapter
def test_law_3_notebook(chapter):
    number = chapter.number or "zz"  # the index may show anything
    assert not [line for source in chapter.code for line in broken_imports(source, number, ORDER)]


@each_chapter
def test_imports_in_cells_of_their_own(chapter):
    "An import cell holds imports, and at most the call that sets the look or a constant; code cells hold no import."
    for source in chapter.code:
        body = ast.parse(source).body
        imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
        others = [node for node in body if node not in imports]
        if imports:
            assert not any(isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.For, ast.With)) for node in others), "imports stand in a cell of their own:\n" + source


@pytest.mark.parametrize("source, complaint", [
    ("from rnnbook.lstm import LSTMCell", "expected one before"),
    ("from rnnbook.rnn import RNNCell", "expected one before"),
    ("from .lstm import LSTMCell", "expected one before"),
    ("import rnnbook.lstm", "expected one before"),
    ("from rnnbook import lstm", "expected one before"),
    ("def f():\n    from rnnbook.lstm import LSTMCell", "expected one before"),
    ("from rnnbook.testing import *", "explicit names"),
    ("from rnnbook.utils import helper", "no chapter exports it"),
])
def test_law_3_can_fail(source, complaint):
    order = {"testing": "00b", "sequences": "01", "datasets": "01a", "rnn": "02", "lstm": "10"}
    assert any(complaint in line for line in broken_imports(source, "02", order))
    assert not broken_imports("from rnnbook.sequences import one_hot\nfrom rnnbook.datasets import load", "02", order)
    assert late_imports("def f(): pass\nimport torch") and not late_imports("import torch\ndef f(): pass")


# ---- 4. The export is current


def export_into(folder):
    "A copy of the notebooks and settings under `folder`, exported there; the new package's folder."
    shutil.copy(ROOT / "settings.ini", folder)
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".*", "__pycache__"))
    environment = {name: value for name, value in os.environ.items() if name != "IN_TEST"}
    code = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True, timeout=120)
    return folder / "rnnbook"


def differences(old, new):
    "A unified diff between the Python files of two folders."
    lines = []
    for name in sorted({path.name for path in [*old.glob("*.py"), *new.glob("*.py")]}):
        texts = [(folder / name).read_text(encoding="utf-8").splitlines() if (folder / name).exists() else []
                 for folder in (old, new)]
        lines += difflib.unified_diff(*texts, f"committed/{name}", f"exported/{name}", lineterm="")
    return lines


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export_into(tmp_path_factory.mktemp("export"))


def test_law_4_export_is_current(exported):
    lines = differences(ROOT / "rnnbook", exported)
    assert not lines, "run `make export`:\n" + "\n".join(lines[:40])


def test_law_4_can_fail(exported, tmp_path):
    edited = shutil.copytree(exported, tmp_path / "edited")
    module = edited / f"{EXPORTED[0].module}.py"
    module.write_text(module.read_text(encoding="utf-8") + "\nedited = True\n", encoding="utf-8")
    (edited / "leftover.py").write_text("old = True\n", encoding="utf-8")
    lines = differences(exported, edited)
    assert "+edited = True" in lines and "+old = True" in lines


# ---- 5. The library stands alone

TOOLS = ("nbdev", "fastcore", "execnb", "ghapi", "IPython", "ipywidgets", "ipykernel", "jupyter_core", "jupyter_client",
         "notebook", "nbformat", "nbclient", "nbconvert", "traitlets", "pytest", "hypothesis", "sphinx")

IMPORT_ALL = """
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {tools!r}: raise ImportError("not there at run time: " + name)
sys.meta_path.insert(0, Blocked())
for name in {modules!r}: importlib.import_module("rnnbook." + name)
"""

SNAPSHOT = """
import locale, logging, os, pickle, random, signal, sys, warnings
import matplotlib, numpy, torch
def snapshot():
    return dict(
        numpy_random=pickle.dumps(numpy.random.get_state()), torch_random=torch.get_rng_state().tolist(),
        python_random=random.getstate(), default_dtype=torch.get_default_dtype(), threads=torch.get_num_threads(),
        grad=torch.is_grad_enabled(), deterministic=torch.are_deterministic_algorithms_enabled(),
        matmul=torch.get_float32_matmul_precision(), rc=dict(matplotlib.rcParams), numpy_errors=numpy.geterr(),
        numpy_print=str(numpy.get_printoptions()), warnings=list(map(str, warnings.filters)),
        environment=dict(os.environ), folder=os.getcwd(), logging=(logging.root.level, list(logging.root.handlers)),
        hook=sys.excepthook, display=sys.displayhook, interrupt=signal.getsignal(signal.SIGINT), locale=locale.setlocale(locale.LC_ALL),
        recursion=sys.getrecursionlimit(),
    )
def changed(before):
    after = snapshot()
    return [name for name in before if before[name] != after[name]]
"""


def test_law_5_imports_without_tools_and_in_silence():
    done = run_python(IMPORT_ALL.format(tools=set(TOOLS), modules=list(MODULES)))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_law_5_sets_no_global_state():
    imports = "\n".join(f"import rnnbook.{name}" for name in MODULES)
    libraries = "import pooch, safetensors.torch, tqdm, matplotlib.pyplot"  # what they set is theirs
    done = run_python(f"{SNAPSHOT}\n{libraries}\nbefore = snapshot()\n{imports}\nprint(changed(before))")
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_law_5_can_fail():
    statements = {
        "numpy_random": "numpy.random.seed(0)", "torch_random": "torch.manual_seed(0)",
        "default_dtype": "torch.set_default_dtype(torch.float64)", "rc": "matplotlib.rcParams['lines.linewidth'] = 9",
        "warnings": "warnings.filterwarnings('ignore')", "numpy_errors": "numpy.seterr(all='raise')",
        "environment": "os.environ['RNNBOOK_DATA'] = 'elsewhere'",
    }
    code = SNAPSHOT + "".join(f"\nbefore = snapshot()\n{statement}\nprint(*changed(before))" for statement in statements.values())
    assert run_python(code).stdout.split() == list(statements)


def test_law_5_block_can_fail():
    code = IMPORT_ALL.format(tools={"nbdev"}, modules=[]) + "\nimport nbdev"
    assert "not there at run time: nbdev" in run_python(code).stderr


FORBIDDEN = {
    r"\bimport \*": "import *",
    r"^\s*(import|from) pickle\b": "pickle",
    r"filterwarnings\(\s*['\"]ignore['\"]\s*\)": "a blanket filterwarnings",
    r"\bif False:": "if False",
    r"tqdm\.(auto|notebook)": "tqdm.auto",
    r"np\.random\.(seed|rand|randn|randint|normal|uniform|choice|shuffle|permutation)\(": "NumPy's global generator",
}


def smells(source):
    return [name for pattern, name in FORBIDDEN.items() if re.search(pattern, source, re.MULTILINE)]


@each_chapter
def test_code_hides_no_state(chapter):
    assert not [name for source in chapter.code for name in smells(source)]


def test_hidden_state_is_found():
    for line in ("from tqdm.auto import tqdm", "import pickle", "np.random.seed(0)", "warnings.filterwarnings('ignore')"):
        assert len(smells(line)) == 1


# ---- The chapters: whole, clean, and shown in the table


def undocumented(source):
    "Public functions and classes of a module's source without a docstring, and functions' parameters without a comment."
    lines, found, tree = source.splitlines(), [], ast.parse(source)
    if not (ast.get_docstring(tree) or "").endswith("."):  # nbdev takes the first line of the chapter's claim
        found.append("the module: expected the chapter's claim, a sentence in one line")
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            found.append(f"{node.name}: no docstring")
        for argument in parameters(node).values() if isinstance(node, ast.FunctionDef) else ():
            if "#" not in lines[argument.end_lineno - 1][argument.end_col_offset:]:
                found.append(f"{node.name}: no comment for {argument.arg}")
    return found


@each_exported
def test_everything_public_is_documented(chapter):
    assert not undocumented(MODULES[chapter.module].read_text(encoding="utf-8"))


def test_missing_documentation_is_found():
    source = '"A claim."\ndef f(\n    x, # (B, I) input\n    y,\n): "Docstring."\n\nclass C:\n    size = 1\n'
    assert undocumented('"A claim that"\n') == ["the module: expected the chapter's claim, a sentence in one line"]
    assert undocumented(source) == ["f: no comment for y", "C: no docstring"]


def body_lines(source):
    "The lines of a cell that do something: no blank lines or comments, no signatures (they are documentation), no docstrings."
    lines = {i for i, line in enumerate(source.splitlines(), 1) if line.strip() and not line.lstrip().startswith("#")}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            lines -= set(range(node.lineno + 1, node.body[0].lineno))
            if ast.get_docstring(node) is not None:
                lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def broken_anatomy(chapter):
    "What a numbered chapter with a module lacks of the agreed form."
    text, found = "\n".join(chapter.prose), []
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    if not re.match(r"# .+\n+> .+", chapter.prose[0] if chapter.prose else ""):
        found.append("the first cell: expected `# Title` and `> claim`")
    for name in ("What you will learn", "What you learned", "Exercises", "References"):
        if name not in headings:
            found.append(f"no heading `## {name}`")
    lengths = [length for length in map(body_lines, chapter.code) if length]
    limits = [34 if re.search("^class ", source, re.MULTILINE) else 28 for source in chapter.code]  # a class cannot be split
    too_long = any(body_lines(source) > limit for source, limit in zip(chapter.code, limits))
    if too_long or (lengths and statistics.median(lengths) > 5.5):
        longest = max(chapter.code, key=body_lines).splitlines()
        found.append(f"cells: expected a median of at most 5 lines and none above about 25, "
                     f"got {statistics.median(lengths)} and {max(lengths)} ({' '.join(longest[:2])})")
    checks = sum(len(re.findall(r"^\s*(?:assert\b|assert_\w+\(|with assert_raises|gradient_check\()", source, re.MULTILINE)) for source in chapter.code)
    if checks < 10:
        found.append(f"assertions: expected 10 or more, got {checks}")
    return found


@each_exported
def test_chapter_is_whole(chapter):
    assert not broken_anatomy(chapter)


def test_an_incomplete_chapter_is_found():
    chapter = Chapter("02_rnn", "rnn", ["x = 1\n" * 40], ["# Title\n\nno claim"], [])
    assert [line.split(":")[0] for line in broken_anatomy(chapter)] == ["the first cell", *[f"no heading `## {name}`" for name in (
        "What you will learn", "What you learned", "Exercises", "References")], "cells", "assertions"]


TEMPLATE = read_chapter(ROOT / "nbs" / "_template.ipynb")


def test_template_is_a_chapter_that_runs():
    assert not broken_anatomy(TEMPLATE)
    exported = "\n".join(source for source in TEMPLATE.code if source.startswith("#| export"))
    assert not broken_functions(exported) and not broken_imports("\n".join(TEMPLATE.code), "02", ORDER)
    done = run_python("\n".join(TEMPLATE.code), MPLBACKEND="agg")
    assert done.returncode == 0, done.stderr
    assert TEMPLATE.module not in MODULES  # its leading underscore keeps it out of the library


@pytest.mark.parametrize("chapter", [*CHAPTERS, TEMPLATE], ids=lambda chapter: chapter.name)
def test_notebook_is_clean_and_run(chapter):
    "Outputs are stored, no cell holds an error, execution counts and metadata are clean, no path of a machine shows."
    code = [cell for cell in chapter.cells if cell["cell_type"] == "code"]
    for cell in chapter.cells:
        assert set(cell["metadata"]) <= {"tags"}, cell["metadata"]
    for cell in code:
        assert cell["execution_count"] is None, cell["source"]
        assert not any(output["output_type"] == "error" for output in cell["outputs"]), cell["source"]
    assert not code or chapter.name == "index" or any(cell["outputs"] for cell in code)
    assert not re.findall(r"/(?:work|root|tmp|home|Users)/[\w./-]+", json.dumps(chapter.cells))


def test_readme_lists_every_chapter_by_its_title():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(.+)\]\(nbs/(\w+)\.ipynb\) \|", text, re.MULTILINE)
    assert listed == [(chapter.prose[0].splitlines()[0].removeprefix("# "), chapter.name) for chapter in CHAPTERS if chapter.name != "index"]


def test_versions_agree():
    import configparser
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    version = settings["DEFAULT"]["version"]
    assert importlib.import_module("rnnbook").__version__ == version
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f'name = "{settings["DEFAULT"]["lib_name"]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
