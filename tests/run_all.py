"""Everything `make test` does, one step after another, with the network blocked throughout.

    python tests/run_all.py [step ...]      steps: sync, unit, site, notebooks; default: all of them

Every step runs even when an earlier one failed; the last lines say which failed and how long each took.
"""
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = {
    "sync": ("modules exported, notebooks clean", ["tests/check_sync.py"]),
    "unit": ("unit tests", ["-m", "pytest", "tests", "--durations=10"]),
    "site": ("links, anchors, sidebar and pictures of the site", ["tests/check_site.py"]),
    "notebooks": ("all notebooks executed, outputs compared", ["tests/check_notebooks.py"]),
}


def main(names):
    """Run the named steps; 0 if all are fine."""
    unknown = [n for n in names if n not in STEPS]
    if unknown:
        print(f"no step called {unknown[0]!r}; there are: {', '.join(STEPS)}")
        return 2
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(p for p in [str(ROOT / "tests" / "offline"), env.get("PYTHONPATH", "")] if p)
    # tools such as nbdev are found beside this very Python
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    results = []
    for name in names or STEPS:
        title, command = STEPS[name]
        print(f"\n== {name}: {title}", flush=True)
        start = time.time()
        code = subprocess.run([sys.executable, *command], cwd=ROOT, env=env).returncode
        results.append((name, code, time.time() - start))
    print()
    for name, code, seconds in results:
        print(f"{seconds:7.1f} s  {name:10s} {'fine' if code == 0 else 'FAILED'}")
    failed = [name for name, code, _ in results if code]
    if failed: print(f"failed: {', '.join(failed)}. Repeat one with: python tests/run_all.py {failed[0]}")
    print(f"{len(results) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
