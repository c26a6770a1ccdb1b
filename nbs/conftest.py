"""How nbval sees the chapters: cleaned notebooks count as run, and cells marked `#| eval: false` are skipped."""
import re

from nbval.plugin import IPyNbCell

collect_ignore_glob = ["_*.ipynb"]  # the template


def pytest_collection_modifyitems(items):
    for item in items:
        if not isinstance(item, IPyNbCell):
            continue
        # nbdev_clean keeps outputs and drops execution counts; nbval fails such a cell, in lax mode too.
        if item.cell.execution_count is None:
            item.cell.execution_count = 0
        if re.search(r"^#\|\s*eval:\s*false", item.cell.source, re.MULTILINE):
            item.options["skip"] = True
