"""Run notebooks: `python book/execute.py nbs _build/nbs` runs copies of all of them, two at a time, in natural order.

`python book/execute.py --in-place nbs/02_rnn.ipynb` runs one and stores its outputs in it, without any other metadata.
Each runs in a kernel of this very Python, in the folder of the original, so that relative paths mean what they say.
The first error stops everything and is shown with its notebook and its cell.
"""
import argparse
import asyncio
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

import pages

ROOT = Path(__file__).absolute().parent.parent
JOBS = 2
KERNELSPEC = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}


class Failure(Exception):
    """A notebook that did not run to its end; the text says where."""


class Progress:
    """One line per finished notebook and, on a terminal, one line that shows what is running."""

    def __init__(self, total):
        self.total, self.done, self.running, self.live = total, 0, {}, sys.stdout.isatty()

    def show(self, text=None):
        status = "   ".join(f"{name} {cell}" for name, cell in self.running.items())
        if self.live:
            print(end=f"\r\033[K{text + chr(10) if text else ''}{status[: shutil.get_terminal_size().columns - 1]}", flush=True)
        elif text:
            print(text, flush=True)

    def cell(self, name, index, total):
        self.running[name] = f"{index + 1}/{total}"
        self.show()

    def finish(self, name, seconds):
        self.running.pop(name, None)
        self.done += 1
        self.show(f"[{self.done:>{len(str(self.total))}}/{self.total}] {seconds:6.1f} s  {name}")


def clean(notebook):
    """Drop what a run leaves behind besides outputs: counts, times, ids, all states of a progress bar but the last."""
    notebook.metadata = nbformat.from_dict(KERNELSPEC)
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        for output in cell.outputs:
            if "execution_count" in output:
                output["execution_count"] = None
            if output.output_type == "stream" and output.name == "stderr":
                output["text"] = "\n".join(line.split("\r")[-1] for line in output["text"].split("\n"))
        cell.outputs = [output for output in cell.outputs if output.output_type != "stream" or output["text"].strip()]
    return notebook


def describe(name, notebook, error):
    """What went wrong, in which cell of which notebook."""
    number, cell = next(
        ((n, c) for n, c in enumerate(notebook.cells) if any(o.output_type == "error" for o in c.get("outputs", []))),
        (None, None),
    )
    if cell is None:
        return f"{name}: {type(error).__name__}: {error}"
    output = next(o for o in cell.outputs if o.output_type == "error")
    trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(output.traceback))
    source = "\n".join(f"    {line}" for line in cell.source.split("\n"))
    return f"{name}, cell {number}:\n\n{source}\n\n{trace}\n\n{name}, cell {number}: {output.ename}: {output.evalue}"


class ThisPython(AsyncKernelManager):
    """A kernel of this very Python, not of a kernelspec that the user has under the same name."""

    def __init__(self, **options):
        # Sockets in a folder of our own: no ports, and nobody else can connect.
        self.sockets = tempfile.TemporaryDirectory(prefix="nb")
        address = str(Path(self.sockets.name) / "kernel")
        super().__init__(**options, kernel_spec_manager=KernelSpecManager(kernel_dirs=[]), transport="ipc", ip=address)


async def execute(path, progress, threads):
    """Run one notebook; returns it with its outputs, clean."""
    started, name = time.perf_counter(), path.stem
    notebook = nbformat.read(path, as_version=4)
    unrun = [cell for cell in notebook.cells if pages.split_directives(cell.source)[0].get("eval") == "false"]
    tags = [cell.metadata.get("tags") for cell in unrun]
    for cell in unrun:
        cell.metadata["tags"], cell.outputs = ["skip-execution"], []
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[variable] = os.environ.get(variable, str(threads))  # notebooks side by side share the cores
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        kernel_manager_class=ThisPython,
        timeout=900,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_start=lambda cell, cell_index: progress.cell(name, cell_index, len(notebook.cells)),
    )
    with tempfile.TemporaryFile("w+", errors="replace") as said:  # what the kernel itself says, told only if it dies
        try:
            await client.async_execute(env={**os.environ, **environment}, stderr=said)
        except (CellExecutionError, CellTimeoutError) as error:
            raise Failure(describe(path.name, notebook, error)) from None
        except DeadKernelError as error:
            said.seek(0)
            cell = progress.running.get(name, "?")
            raise Failure(f"{path.name}, cell {cell}: {error}\n{said.read()[-4000:]}".rstrip()) from None
    for cell, before in zip(unrun, tags):
        cell.metadata["tags"] = before or []
        if not before:
            del cell.metadata["tags"]
    progress.finish(name, time.perf_counter() - started)
    return clean(notebook)


def write(notebook, path):
    """Write a notebook as nbdev does: one space of indentation, a line feed at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    nbformat.write(notebook, temporary)
    temporary.replace(path)


async def execute_all(paths, target, jobs):
    """Run notebooks, `jobs` at a time; the first failure stops the rest."""
    progress, gate = Progress(len(paths)), asyncio.Semaphore(jobs)
    threads = max(1, (os.cpu_count() or 1) // jobs)

    async def one(path):
        async with gate:
            write(await execute(path, progress, threads), target(path))

    tasks = [asyncio.create_task(one(path)) for path in paths]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        progress.running.clear()
        progress.show()
        raise


def run(coroutine):
    """Run a coroutine in a thread of its own, so that an interruption reaches us and not nbclient's handlers."""
    loop, finished = asyncio.new_event_loop(), threading.Event()

    async def watched():
        try:
            return await coroutine
        finally:
            finished.set()

    threading.Thread(target=loop.run_forever, daemon=True).start()
    future = asyncio.run_coroutine_threadsafe(watched(), loop)
    try:
        return future.result()
    except KeyboardInterrupt:
        loop.set_exception_handler(lambda *_: None)  # kernels that die on request are no news
        future.cancel()
        finished.wait(timeout=20)  # the kernels are being ended
        raise


def files_of(folder):
    """Every visible file below a folder, to see afterwards what the notebooks left in it."""
    hidden = (".", "__pycache__")
    return {path for path in folder.rglob("*") if path.is_file() and not any(part.startswith(hidden) for part in path.relative_to(folder).parts)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", type=Path, help="folder of the notebooks")
    parser.add_argument("target", nargs="?", type=Path, help="folder for the executed copies")
    parser.add_argument("--in-place", type=Path, metavar="NOTEBOOK", help="run this notebook and store its outputs in it")
    parser.add_argument("--jobs", type=int, default=JOBS, help=f"notebooks at a time (default: {JOBS})")
    options = parser.parse_args()
    if (options.in_place is None) == (options.target is None):
        parser.error("expected SOURCE and TARGET, or --in-place NOTEBOOK")
    started, before = time.perf_counter(), set()
    if options.in_place:
        paths, target = [options.in_place.absolute()], lambda path: path
        if not paths[0].exists():
            parser.error(f"--in-place: expected a notebook, found none at {options.in_place}")
    else:
        source, folder = options.source.absolute(), options.target.absolute()
        paths, target = pages.notebooks(source), lambda path: folder / path.name
        if not paths:
            parser.error(f"source: expected a folder with notebooks, found none in {options.source}")
        before = files_of(source)
        for stale in folder.glob("*.ipynb"):
            stale.unlink()
        print(f"Running {len(paths)} notebooks, {options.jobs} at a time.", flush=True)
    try:
        run(execute_all(paths, target, 1 if options.in_place else options.jobs))
    except Failure as failure:
        print(f"\n{failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    if not options.in_place:
        if left := sorted(path for path in files_of(source) - before if folder not in path.parents):
            print(f"The notebooks left files in {source}: {', '.join(path.name for path in left)}", file=sys.stderr)
            return 1
        print(f"{len(paths)} notebooks ran in {time.perf_counter() - started:.0f} s.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
