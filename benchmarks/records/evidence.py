"""Long runs, recorded: what a chapter shows without running it. `make evidence` is this script.

    python benchmarks/records/evidence.py [NAME ...] [--again] [--jobs N] [--minutes M]

runs the named scripts of this folder, or all, one after the other, and ends with a list of what is complete and what is not. Each script may be
called by itself with the same options. A record is the JSON file beside its script; a run enters it as soon as it has ended, so that an
interrupted record goes on where it stopped. A complete record is left as it is; `--again` measures it anew.
"""
import argparse
import datetime
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

import numpy as np
import torch


def machine():
    "The kind of machine, in words."
    name = platform.machine()
    if Path("/proc/cpuinfo").is_file():
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
        if found: name = f"{found[1].strip()} ({name})"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores, {name}, {platform.system()}"


def options(description, jobs=2):
    "The options that every script of this folder knows."
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="measure all runs anew")
    parser.add_argument("--jobs", type=int, default=jobs, help="runs at a time, with one thread each; 1 for as many threads as torch takes")
    parser.add_argument("--minutes", type=float, default=60, help="start no run after so many minutes (60)")
    return parser


def write(path, record):
    "The whole file or, if something breaks, the old one."
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _one_thread(): torch.set_num_threads(1)


def _results(measure, todo, workers, deadline):
    "Pairs (job, result) as they come; none is started after the deadline."
    if workers == 1:
        for job in todo:
            if time.monotonic() < deadline: yield job, measure(**job)
        return
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"): os.environ[name] = "1"  # read by the processes at their start
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _one_thread) as pool:
        todo, running, broken = list(todo), {}, None
        while True:
            while todo and len(running) < workers and not broken and time.monotonic() < deadline:
                job = todo.pop(0)
                running[pool.submit(measure, **job)] = job
            if not running: break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                if future.exception(): broken = future.exception()  # the others under way are still of use
                else: yield job, future.result()
        if broken: raise broken


def run_record(script, about, jobs, measure, chosen):
    """Measure every job that the record of `script` does not hold yet; return the record, a dict.

    script   `__file__` of the calling script; the record is the .json beside it
    about    dict of JSON values that hold for all runs (settings, sources); a record with other ones is begun anew
    jobs     list of dicts of JSON values: the settings of each run, the random seed among them
    measure  function(**job) -> dict of JSON values, the results; at the top level of the script, which must guard its `main()`
    chosen   what `options(...).parse_args()` gave

    An unfinished record of another machine or of other versions is begun anew as well: runs within one record compare.
    The record holds `runs`, each with its job's entries and its results, in the order of `jobs`, and `not_run`, the jobs that are missing.
    """
    path, about, jobs = Path(script).with_suffix(".json"), json.loads(json.dumps(about)), json.loads(json.dumps(jobs))
    here = dict(machine=machine(), versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__})
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and not chosen.again else {}
    same = all(record.get(key) == value for key, value in about.items())
    find = lambda job: next((run for run in record.get("runs", []) if job.items() <= run.items()), None)
    if not same or (not all(map(find, jobs)) and any(record.get(key) != value for key, value in here.items())): record = {}
    todo = [job for job in jobs if not find(job)]
    if not todo:
        print(f"{path.name}: complete, {len(jobs)} runs of {record['date']}")
        return record
    if not record: record = {"command": f"python benchmarks/records/{Path(script).name}", **here, **about, "runs": []}
    print(f"{path.name}: {len(todo)} of {len(jobs)} runs to do", flush=True)
    for job, result in _results(measure, todo, chosen.jobs, time.monotonic() + 60 * chosen.minutes):
        record["runs"].append({**job, **result})
        record["runs"] = [run for run in map(find, jobs) if run]
        record |= dict(date=datetime.date.today().isoformat(), not_run=[job for job in jobs if not find(job)])
        write(path, record)
        print(f"{len(jobs) - len(record['not_run'])}/{len(jobs)}", json.dumps(record["runs"][record["runs"].index({**job, **result})])[:200], flush=True)
    return record


def main():
    parser = options(__doc__, jobs=None)
    parser.add_argument("names", nargs="*", help="the records to build (all)")
    chosen, folder = parser.parse_args(), Path(__file__).parent
    scripts = sorted(path for path in folder.glob("*.py") if path.name != Path(__file__).name)
    unknown = set(chosen.names) - {path.stem for path in scripts}
    if unknown: parser.error(f"no such record: {', '.join(sorted(unknown))}; there are {', '.join(path.stem for path in scripts)}")
    failed = []
    for path in scripts:
        if chosen.names and path.stem not in chosen.names: continue
        print(f"== {path.stem}", flush=True)
        passed_on = [f"--minutes={chosen.minutes}", *(["--again"] if chosen.again else []), *([f"--jobs={chosen.jobs}"] if chosen.jobs else [])]
        if subprocess.run([sys.executable, str(path), *passed_on]).returncode: failed.append(path.stem)
    print("== what there is")
    for path in scripts:
        file = path.with_suffix(".json")
        record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"runs": []}
        missing = f"; not run: {json.dumps(record['not_run'])}" if record.get("not_run") else ""
        print(f"{path.stem}: {len(record['runs'])} runs, {record.get('date', 'none yet')}{missing}{'; FAILED just now' if path.stem in failed else ''}")
    return bool(failed)


if __name__ == "__main__": sys.exit(main())
