"""Execute every notebook without a network and compare its outputs with the committed ones.

    python tests/check_notebooks.py [notebook ...]

Prints seconds a notebook; a chapter (number 10 or higher) that takes longer than CHAPTER_SECONDS fails.
Chapters run alone with THREADS threads, foundations and pages two at a time with one thread each.
Nothing is written back: the notebooks on disk stay as they are. The rules of comparison are in notebook_outputs.py.
"""
import copy
import json
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

sys.path.insert(0, str(Path(__file__).parent))
from notebook_outputs import ESCAPE, compare_notebooks, is_skipped  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "nbs"
CHAPTER_SECONDS = float(os.environ.get("PROMPTBOOK_CHAPTER_SECONDS", 180))
THREADS = int(os.environ.get("PROMPTBOOK_THREADS", min(2, os.cpu_count() or 1)))
CELL_SECONDS = 1200


def is_chapter(path):
    """Chapters are numbered from 10; 00-09 are foundations, and pages carry no number."""
    return re.match(r"[1-9]\d_", path.name) is not None


def kernel_folder(folder):
    """A Jupyter path whose only kernel is this very Python, so that no other installed `python3` is taken."""
    spec = Path(folder) / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({
        "argv": [sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=40"],
        "display_name": "python3", "language": "python"}))
    return str(folder)


def environment(threads, folder):
    """What a notebook's kernel sees: no network, a known number of threads, an empty IPython profile."""
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests" / "offline"), str(ROOT), env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    env.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), OPENBLAS_NUM_THREADS=str(threads),
               PYDEVD_DISABLE_FILE_VALIDATION="1", TOKENIZERS_PARALLELISM="false", IN_TEST="1",
               IPYTHONDIR=str(Path(folder) / "ipython"), PROMPTBOOK_RESULTS=str(Path(folder) / "results"))
    return env


def execute(path, threads, folder):
    """One notebook: (seconds, error or None, differences)."""
    committed = nbformat.read(path, 4)
    fresh = copy.deepcopy(committed)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs = []
            if is_skipped(cell.source):
                cell.source = ""
    client = NotebookClient(fresh, timeout=CELL_SECONDS, startup_timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    start = time.time()
    try:
        client.execute(env=environment(threads, folder))
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return time.time() - start, str(error), []
    return time.time() - start, None, compare_notebooks(committed, fresh)


def report(path, seconds, error, differences):
    """Print one notebook's result; True if it is fine."""
    name = path.relative_to(ROOT)
    late = is_chapter(path) and seconds > CHAPTER_SECONDS
    bad = bool(error or differences or late)
    print(f"{seconds:7.1f} s  {name}{'  FAILED' if bad else ''}", flush=True)
    if error:
        text = ESCAPE.sub("", error).strip().splitlines()
        head, tail = text[:12], text[-4:] if len(text) > 12 else []  # the cell, and what went wrong
        print("\n".join("     " + line for line in [*head, *(["..."] if len(text) > 16 else []), *tail]))
    for number, line, sentence in differences:
        print(f"     cell {number} ({line}): {sentence}")
    if late:
        print(f"     a chapter may take {CHAPTER_SECONDS:.0f} s (PROMPTBOOK_CHAPTER_SECONDS changes this)")
    return not bad


def main(names):
    """Run the named notebooks, or all."""
    paths = [Path(n).resolve() for n in names] or sorted(p for p in NOTEBOOKS.rglob("*.ipynb") if not re.search(r"/[_.]", str(p.relative_to(ROOT))))
    start, fine = time.time(), True
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JUPYTER_PATH"] = kernel_folder(folder)
        small, chapters = [p for p in paths if not is_chapter(p)], [p for p in paths if is_chapter(p)]
        with ThreadPoolExecutor(2) as pool:
            for path, result in zip(small, pool.map(lambda p: execute(p, 1, folder), small)):
                fine &= report(path, *result)
        for path in chapters:
            fine &= report(path, *execute(path, THREADS, folder))
    print(f"{len(paths)} notebooks in {time.time() - start:.0f} s")
    if not fine:
        print("Where the fresh output is right, execute and save the notebook, run nbdev_clean, and commit it.")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
