"The keeper of records: nothing is measured twice, an interrupted record goes on, and what is missing is listed."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

KEEPER = Path(__file__).parents[1] / "benchmarks" / "records" / "evidence.py"
SCRIPT = '''"A record for the test."
import os, evidence, torch
def measure(length, seed):
    if os.path.exists("broken") and seed == 1: raise OSError("no more")
    with open("measured", "a") as log: log.write(f"{length} {seed}\\n")
    return dict(loss=length / (seed + 1), threads=torch.get_num_threads())
def main():
    chosen = evidence.options(__doc__).parse_args()
    about = dict(hidden=int(os.environ.get("HIDDEN", 3)))
    evidence.run_record(__file__, about, [dict(length=n, seed=s) for n in (5, 10) for s in range(2)], measure, chosen)
if __name__ == "__main__": main()
'''


@pytest.fixture
def folder(tmp_path):
    shutil.copy(KEEPER, tmp_path)
    (tmp_path / "sample.py").write_text(SCRIPT)
    return tmp_path


def run(folder, *options, script="sample.py", **environment):
    return subprocess.run([sys.executable, script, *options], cwd=folder, env=os.environ | environment, capture_output=True, text=True)


def measured(folder): return (folder / "measured").read_text().split("\n")[:-1] if (folder / "measured").exists() else []


def test_record_goes_on_where_it_stopped(folder):
    (folder / "broken").touch()
    assert run(folder, "--jobs=1").returncode != 0 and measured(folder) == ["5 0"]
    record = json.loads((folder / "sample.json").read_text())
    assert len(record["runs"]) == 1 and record["not_run"] == [{"length": 5, "seed": 1}, {"length": 10, "seed": 0}, {"length": 10, "seed": 1}]
    whole = run(folder, script="evidence.py")
    assert whole.returncode == 1 and "FAILED" in whole.stdout and "not run" in whole.stdout  # a failure is said, at the end and by the exit status
    (folder / "broken").unlink()
    whole = run(folder, script="evidence.py")
    assert whole.returncode == 0 and sorted(measured(folder)) == ["10 0", "10 1", "5 0", "5 1"]  # each once, whatever broke in between
    record = json.loads((folder / "sample.json").read_text())
    assert [(r["length"], r["seed"], r["loss"]) for r in record["runs"]] == [(5, 0, 5.0), (5, 1, 2.5), (10, 0, 10.0), (10, 1, 5.0)]
    assert record["hidden"] == 3 and not record["not_run"] and record["runs"][-1]["threads"] == 1
    assert {"command", "machine", "versions", "date"} <= record.keys()


def test_complete_stays_until_asked_or_changed(folder):
    run(folder, "--jobs=1")
    before = (folder / "sample.json").read_text()
    assert "complete, 4 runs" in run(folder, "--jobs=1").stdout and (folder / "sample.json").read_text() == before and len(measured(folder)) == 4
    run(folder, "--jobs=1", "--again")
    assert len(measured(folder)) == 8
    run(folder, "--jobs=1", HIDDEN="4")  # other settings: another record
    assert len(measured(folder)) == 12 and json.loads((folder / "sample.json").read_text())["hidden"] == 4


def test_no_run_starts_after_the_minutes(folder):
    assert run(folder, "--jobs=1", "--minutes=0").returncode == 0
    assert not measured(folder)


def test_unknown_name(folder):
    asked = run(folder, "nothing", script="evidence.py")
    assert asked.returncode == 2 and "no such record: nothing; there are sample" in asked.stderr


def test_every_script_keeps_a_complete_record():
    for script in KEEPER.parent.glob("*.py"):
        if script == KEEPER: continue
        record = json.loads(script.with_suffix(".json").read_text())
        assert record["runs"] and {"command", "machine", "versions", "date"} <= record.keys(), script.name
