"""The wheel: what is in it, and that it works alone, in an environment with nothing but the run-time requirements.

The environment is built once from settings.ini and constraints.txt and kept in _build/; only the wheel is installed anew.
"""
import configparser
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["rnnbook", "setup.py", "pyproject.toml", "settings.ini", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md",
           "CITATION.cff", "constraints.txt"]


def run(*command, cwd=None, check=True):
    "Run a command outside the repository's own environment variables; its completed process."
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)
    if check and done.returncode:
        pytest.fail(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def requirements():
    config = configparser.ConfigParser(delimiters="=", interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]["requirements"].split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel built as a release is: from the source distribution, out of a copy of the working tree."
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    run(sys.executable, "-m", "build", "--no-isolation", folder, "--outdir", folder / "dist", cwd=folder)
    [wheel] = (folder / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def empty(wheel):
    "The interpreter of an environment that holds the run-time requirements and this wheel, and nothing else."
    recipe = json.dumps([sys.version, requirements(), (ROOT / "constraints.txt").read_text(encoding="utf-8")])
    folder = ROOT / "_build" / f"wheel-env-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        for old in folder.parent.glob("wheel-env-*"):
            shutil.rmtree(old)
        folder.parent.mkdir(exist_ok=True)
        run(sys.executable, "-m", "venv", folder)
        run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", *requirements())
        (folder / "complete").touch()
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--force-reinstall", wheel)
    run(python, "-m", "pip", "check")
    return python


def test_holds_the_library_and_its_metadata_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {f"rnnbook/{path.name}" for path in (ROOT / "rnnbook").iterdir() if path.suffix in (".py", ".mplstyle")}
    assert {name for name in names if name.startswith("rnnbook/")} == modules
    assert all(re.match(r"rnnbook/|rnnbook-[\d.]+\.dist-info/", name) for name in names), names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_metadata_comes_from_the_settings(wheel):
    archive = zipfile.ZipFile(wheel)
    [name] = [name for name in archive.namelist() if name.endswith("/METADATA")]
    metadata = archive.read(name).decode()
    for line in ("Name: rnnbook", "License-Expression: Apache-2.0", "Requires-Python: >=3.11", "Provides-Extra: dev",
                 "Provides-Extra: book", "Provides-Extra: data", *(f"Requires-Dist: {each}" for each in requirements())):
        assert line in metadata.splitlines()


def test_environment_has_no_notebook_tools(empty):
    code = "import importlib.util as u; print([n for n in ('nbdev', 'fastcore', 'IPython', 'jupyter_core', 'scipy', 'pytest') if u.find_spec(n)])"
    assert run(empty, "-c", code).stdout == "[]\n"


def test_every_module_imports_in_silence_and_under_three_seconds(empty, tmp_path):
    modules = sorted(path.stem for path in (ROOT / "rnnbook").glob("[!_]*.py"))
    code = "import " + ", ".join(f"rnnbook.{name}" for name in modules)
    times = []  # of the processor, which another program that keeps it busy does not lengthen
    for _ in range(3):  # the first run may still write caches: the best one counts
        before = os.times()
        done = run(empty, "-W", "error::DeprecationWarning:rnnbook", "-c", code, cwd=tmp_path)
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert (done.stdout, done.stderr) == ("", "")
    assert min(times) < 3, times


def readme_example():
    "The example in README.md and what it says the example prints."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [(code, printed)] = re.findall(r"```python\n(.*?)```\s+```text\n(.*?)```", text, re.DOTALL)
    return code, printed


def same(printed, expected):
    "Equal texts, where numbers may differ by one in the last digit shown."
    number = r"-?\d+\.\d+"
    if re.sub(number, "#", printed).split() != re.sub(number, "#", expected).split():
        return False
    pairs = zip(re.findall(number, printed), re.findall(number, expected))
    return all(abs(float(a) - float(b)) <= 1.01 * 10.0 ** -len(b.partition(".")[2]) for a, b in pairs)


def test_readme_example_prints_what_it_says(empty, tmp_path):
    code, expected = readme_example()
    assert len([line for line in code.splitlines() if line.strip() and "import" not in line]) <= 10
    done = run(empty, "-c", code, cwd=tmp_path)
    assert done.stderr == ""
    assert same(done.stdout, expected), f"README says\n{expected}\nand it prints\n{done.stdout}"


def test_a_wrong_readme_is_found():
    assert same("loss 1.2345\n", "loss 1.2346\n")
    assert not same("loss 1.2345\n", "loss 1.2349\n")
    assert not same("equal: True\n", "equal: False\n")


def test_console_command_explains_itself(empty, tmp_path):
    done = run(Path(empty).with_name("rnnbook-text"), "--help", cwd=tmp_path)
    assert "train" in done.stdout and "sample" in done.stdout and done.stderr == ""
