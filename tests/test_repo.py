"""The repository itself: metadata that must agree, a wheel that must be whole, a run time without notebook tools."""
import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, NBS = ROOT / "promptbook", ROOT / "nbs"
SHIPPED = [p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix in (".safetensors", ".json", ".jsonl", ".txt", ".csv", ".tsv", ".md")]
MEGABYTE = 1_000_000


def settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def lines(key):
    return [line.strip() for line in settings().get(key, "").splitlines() if line.strip()]


def notebooks():
    return sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def source(cell):
    return "".join(cell["source"])


def sidebar():
    spec = importlib.util.spec_from_file_location("check_site", ROOT / "tests" / "check_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    return list(module.entries(config["website"]["sidebar"]["contents"]))


def tracked():
    """Files under version control, and new ones that are not ignored; without git, all that are not built."""
    done = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]
    built = {".git", ".venv", "_proc", "_docs", "build", "__pycache__", ".pytest_cache", "results"}
    return [p for p in ROOT.rglob("*") if p.is_file() and not built & set(p.relative_to(ROOT).parts[:-1])]


# -- metadata ---------------------------------------------------------------------------------------------------------

def test_version_and_minimum_python_agree_everywhere():
    meta = settings()
    assert f'__version__ = "{meta["version"]}"' in (PACKAGE / "__init__.py").read_text()
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'requires-python=">={meta["min_python"]}"' in pyproject.replace(" = ", "=")
    assert re.search(rf'name ?= ?"{meta["lib_name"]}"', pyproject)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == meta["version"] and citation["license"] == "Apache-2.0" and citation["repository-code"] == meta["git_url"]


def test_conda_environment_has_the_pins_of_settings():
    pip = next(d["pip"] for d in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"] if isinstance(d, dict))
    for name in ("nbdev", "fastcore", "execnb"):
        assert [l for l in lines("dev_requirements") if l.startswith(name)] == [l for l in pip if l.startswith(name)]
    assert "-e .[dev]" in pip


def test_lock_satisfies_the_ranges_and_names_no_address():
    locked = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line), f"not an exact plain version: {line}"
            name, version = line.split("==")
            locked[name.lower().replace("_", "-")] = Version(version)
    for line in lines("requirements") + lines("dev_requirements"):
        need = Requirement(line)
        name = need.name.lower().replace("_", "-")
        if name in ("setuptools", "wheel"):
            continue  # build tools, which a lock leaves alone
        assert name in locked, f"constraints.txt lacks {name}: make lock"
        assert need.specifier.contains(locked[name]), f"{name} {locked[name]} is outside {line}"


def test_requirements_are_ranges_with_a_lower_bound():
    for line in lines("requirements"):
        kinds = {s.operator for s in Requirement(line).specifier}
        assert ">=" in kinds and "==" not in kinds, line


def test_every_third_party_import_is_declared():
    names = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml"}
    declared = {Requirement(l).name.lower() for key in settings() if key.endswith("requirements") and key != "dev_requirements" for l in lines(key)}
    unknown = {}
    for module in PACKAGE.glob("*.py"):
        for line in re.findall(r"^\s*(?:import|from)\s+([\w.]+(?:\s*,\s*[\w.]+)*)", module.read_text(encoding="utf-8"), re.M):
            for top in (part.strip().split(".")[0] for part in line.split(",")):
                if top and top != "promptbook" and top not in sys.stdlib_module_names and names.get(top, top).lower().replace("_", "-") not in {d.replace("_", "-") for d in declared} | {"ipython"}:
                    unknown.setdefault(top, module.name)
    assert not unknown, f"imported but not declared in settings.ini: {unknown}"


# -- run time ---------------------------------------------------------------------------------------------------------

def test_package_runs_without_notebook_tools():
    """Every module imports where nbdev, Jupyter and fastcore do not exist."""
    code = textwrap.dedent("""
        import importlib, pkgutil, sys
        BLOCKED = {"nbdev", "fastcore", "execnb", "jupyter", "jupyterlab", "notebook", "nbclient", "nbformat", "nbconvert", "ipykernel", "jupyter_client", "jupyter_core", "IPython", "ipywidgets"}
        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in BLOCKED: raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)
        sys.meta_path.insert(0, Block())
        import promptbook
        names = [m.name for m in pkgutil.walk_packages(promptbook.__path__, "promptbook.")]
        for name in names: importlib.import_module(name)
        print(len(names), "modules")
    """)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr


def test_network_guard_blocks_all_but_this_machine():
    code = textwrap.dedent("""
        import asyncio, socket
        def refused(f, *a):
            try: f(*a)
            except OSError as e: return "blocked" in str(e)
            return False
        assert refused(socket.create_connection, ("192.0.2.1", 80), 1)
        assert refused(socket.getaddrinfo, "example.com", 443)
        assert refused(socket.gethostbyname, "example.com")
        assert refused(socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto, b"x", ("192.0.2.1", 53))
        assert refused(socket.socket(socket.AF_INET).connect_ex, ("192.0.2.1", 80))
        try: asyncio.run(asyncio.open_connection("192.0.2.1", 80)); raise SystemExit("asyncio got out")
        except OSError as e: assert "blocked" in str(e), e
        server = socket.create_server(("127.0.0.1", 0))
        socket.create_connection(server.getsockname()).close()
        assert socket.getaddrinfo("localhost", 80)
        import subprocess, sys
        inner = "import socket\\ntry: socket.create_connection(('192.0.2.1', 80), 1)\\nexcept OSError as e: print('blocked' in str(e))"
        assert subprocess.run([sys.executable, "-c", inner], capture_output=True, text=True).stdout.strip() == "True"
    """)
    env = dict(os.environ, PYTHONPATH=str(ROOT / "tests" / "offline"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


# -- what is shipped --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built without a network from a copy, so that the working tree stays clean."""
    import shutil
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    copy.mkdir()
    for name in ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, copy / name)
    shutil.copytree(PACKAGE, copy / "promptbook", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def test_wheel_holds_weights_rows_and_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    missing = [str(p.relative_to(ROOT)) for p in SHIPPED if p.relative_to(ROOT).as_posix() not in names]
    assert not missing, f"not in the wheel (see package_data in setup.py): {missing}"
    assert not [n for n in names if n.startswith(("nbs/", "tests/"))]
    points = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "promptbook = promptbook.cli:main" in points and "[nbdev]" in points
    extras = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert {"dev", "ray", "full"} <= set(re.findall(r"Provides-Extra: (\w+)", extras)) and re.search(r"^License(-Expression)?: Apache-2.0$", extras, re.M)


def test_installed_wheel_works_away_from_the_repository(wheel, tmp_path):
    """Installed into an empty folder, the package finds its data, and its zoo if the repository has one."""
    target = tmp_path / "site"
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = "import promptbook.catalog as c, promptbook, pathlib; assert len(c.papers()) == 51; print(pathlib.Path(promptbook.__file__).parent)"
    if (PACKAGE / "zoo_models").exists():
        code += "; from promptbook.zoo import load, ZOO; [load(p.name) for p in sorted(ZOO.iterdir()) if (p / 'config.json').exists() or (p / 'unet').is_dir()]"
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(target), str(ROOT / "tests" / "offline")]), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip().splitlines()[-1]) == target / "promptbook"


def test_sizes():
    large = [f"{p.name} {p.stat().st_size / MEGABYTE:.1f} MB" for p in notebooks() if p.stat().st_size > 2 * MEGABYTE]
    assert not large, f"notebooks may have 2 MB: {large}"
    zoo = {p: sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) for p in PACKAGE.glob("zoo_models/*") if p.is_dir()}
    assert all(size <= 8 * MEGABYTE for size in zoo.values()), zoo
    assert sum(zoo.values()) <= 40 * MEGABYTE


def test_weights_are_safetensors_only():
    other = [p for p in PACKAGE.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib")]
    assert not other, f"only safetensors are shipped: {other}"


# -- pages ------------------------------------------------------------------------------------------------------------

def test_readme_map_is_the_generated_one():
    from update_readme import README, updated
    text = README.read_text(encoding="utf-8")
    assert updated(text) == text, "the README's map is out of date: python tests/update_readme.py"


def test_readme_links_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8") + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    missing = [t for t in targets if not t.startswith(("http", "#")) and not (ROOT / t.split("#")[0]).exists()]
    assert not missing


def test_readme_python_is_the_home_pages():
    """The ten lines of the README run on the home page, where their output is checked: both name the same experiment."""
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S).group(1)
    home = "\n".join(source(c) for c in json.loads((NBS / "index.ipynb").read_text())["cells"] if c["cell_type"] == "code")
    code = [l.strip() for l in block.splitlines() if l.strip() and not re.match(r"rows = |print\(", l)]
    assert len(code) <= 10 and all(l in home for l in code), "the README's Python and the home page's differ"
    compile(block, "README.md", "exec")


def test_sidebar_and_notebooks_agree():
    entries = sidebar()
    linked = [href for _, href in entries if href]
    assert len(linked) == len(set(linked)), "a notebook is listed twice"
    there = {p.relative_to(NBS).as_posix() for p in notebooks()}
    assert set(linked) == there, f"listed but missing: {sorted(set(linked) - there)}; there but not listed: {sorted(there - set(linked))}"


def test_all_chapters_stand_in_the_sidebar_in_order():
    catalog = json.loads((PACKAGE / "data" / "catalog.json").read_text(encoding="utf-8"))
    numbers = [m.group(1) for text, _ in sidebar() if (m := re.match(r"(\d\d) · ", text))]
    assert numbers == sorted(numbers)
    from promptbook.catalog import papers
    assert {c.split("_")[0] for c in papers().chapter} | {"20"} == {n for n in numbers if n >= "10"}, catalog.keys()


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.name)
def test_notebook_is_presentable(path):
    book = json.loads(path.read_text(encoding="utf-8"))
    link = f"{settings()['git_url'].replace('https://github.com', 'https://colab.research.google.com/github')}/blob/main/nbs/{path.name}"
    first = next(source(c) for c in book["cells"] if c["cell_type"] == "markdown")
    assert first.startswith("# "), "the first Markdown cell holds the title"
    colab = re.findall(r"https://colab\.research\.google\.com/github/[^\s)\"]+", "\n".join(source(c) for c in book["cells"]))
    if re.match(r"[1-9]\d_", path.name):
        assert link in first, f"the first Markdown cell lacks the badge to open the chapter in Colab: {link}"
    assert not [c for c in colab if "/blob/" in c and c != link], "the Colab badge leads to another notebook"
    for number, cell in enumerate(book["cells"]):
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error", f"cell {number} has an error among its outputs"
            text = "".join(output.get("text", "")) if output["output_type"] == "stream" and output["name"] == "stderr" else ""
            assert "Warning" not in text and "Traceback" not in text, f"cell {number} has a warning among its outputs: {text[:200]}"
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {}), f"cell {number} holds a widget, which the site cannot show"


def test_no_machine_paths():
    """Nothing in the repository says on whose machine it was made."""
    # patterns are put together here so that this file does not contain them
    pattern = re.compile("|".join(["/home" + r"/(?!user/|you/|runner/)\w+", "/root" + "/", "/Users" + r"/(?!you/)\w+", r"(?<![\w.~$}/-])/work" + "/", r"[A-Z]:\\Users" + r"\\\w+", "/tmp" + r"/(?:tmp|bash_jobs)\w*"]))
    found = []
    for path in tracked():
        if path.suffix in (".safetensors", ".png", ".ico") or path.name == "LICENSE":
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if path.suffix == ".ipynb":  # pictures are long and random
            text = re.sub(r'"image/png": "[^"]*"', "", text)
        text = re.sub(r"data:image/[\w+.-]+;base64,[A-Za-z0-9+/=\\n]+", "", text)
        found += [f"{path.relative_to(ROOT)}: {m.group(0)}" for m in pattern.finditer(text)]
    assert not found, found[:10]
