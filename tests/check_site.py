"""Would every link of the site work? Checked without Quarto, which ignores broken links and missing sidebar entries.

nbdev prepares the pages in a copy of the repository (a stub stands in for `quarto`, which is not needed for that);
then every link, anchor, picture, sidebar entry and stylesheet must lead to something that exists.
"""
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from check_sync import copy_tree  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^(```+|~~~+).*?^\1\s*$", re.M | re.S)
MD_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")


class Tags(HTMLParser):
    """Targets and ids of raw HTML."""

    def __init__(self):
        super().__init__()
        self.targets, self.ids, self.without_alt = [], set(), 0

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        for name in ("href", "src"):
            if attrs.get(name):
                self.targets.append(attrs[name])
        for name in ("id", "name"):
            if attrs.get(name):
                self.ids.add(attrs[name])
        if tag == "img" and "alt" not in attrs:
            self.without_alt += 1


def joined(value):
    """nbformat keeps long strings as lists of lines."""
    return "".join(value) if isinstance(value, list) else value


def heading_id(text):
    """The identifier that Pandoc gives a heading, or the explicit one."""
    explicit = re.search(r"\{[^}]*#([\w:.-]+)[^}]*\}\s*$", text)
    if explicit:
        return explicit.group(1)
    text = re.sub(r"\{[^}]*\}\s*$", "", text)
    text = MD_LINK.sub(r"\2", text)
    text = re.sub(r"<[^>]*>|[`*]", "", text)
    text = re.sub(r"[^\w\s.-]", "", text).strip().lower()
    return re.sub(r"^[^a-zA-Z]+", "", re.sub(r"\s+", "-", text)) or "section"


def texts(notebook):
    """Every piece of Markdown or HTML that a page shows: (kind, text)."""
    for cell in notebook["cells"]:
        source = joined(cell["source"])
        if cell["cell_type"] in ("markdown", "raw"):
            yield "md", source
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/markdown" in data:
                yield "md", joined(data["text/markdown"])
            elif "text/html" in data:
                yield "html", joined(data["text/html"])


def read_page(path):
    """(ids, link targets, pictures without alternative text) of one processed notebook."""
    ids, targets, bare = set(), [], 0
    for kind, text in texts(json.loads(path.read_text(encoding="utf-8"))):
        if kind == "md":
            text = FENCE.sub("", text)
            seen = {}
            for line in re.findall(r"^#{1,6}\s+(.+?)\s*$", text, re.M):
                name = heading_id(line)
                ids.add(name)
                seen[name] = seen.get(name, 0) + 1
            plain = re.sub(r"(`+)(?:(?!\1).)+\1", "", text)
            ids.update(re.findall(r"\{[^}]*#([\w:.-]+)[^}]*\}", plain))
            for picture, label, target in MD_LINK.findall(plain):
                targets.append(target)
                targets += [t for _, _, t in MD_LINK.findall(label)]
                bare += bool(picture) and not label.strip()
            text = plain
        tags = Tags()
        tags.feed(text)
        ids |= tags.ids
        targets += tags.targets
        bare += tags.without_alt
    return ids, targets, bare


def prepare(folder):
    """The processed pages of a copy of the repository in `folder`."""
    copy_tree(folder)
    stub = folder / "stub" / "quarto"
    stub.parent.mkdir()
    stub.write_text("#!/bin/sh\nexit 0\n")
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    env = dict(os.environ, PATH=f"{stub.parent}{os.pathsep}{os.environ['PATH']}")
    done = subprocess.run([sys.executable, "-c", "import sys; sys.argv = ['nbdev_proc_nbs', '--n_workers', '0']\nfrom nbdev.quarto import nbdev_proc_nbs\n"
                           "if __name__ == '__main__': nbdev_proc_nbs()"], cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        causes = dict.fromkeys(line for line in lines if re.match(r"\w+Error\b", line))
        sys.exit("nbdev cannot prepare the pages: " + "; ".join(causes) + "\n" + "\n".join(lines[-5:]))
    pages = folder / "_proc"
    missing = {p.relative_to(folder / "nbs") for p in (folder / "nbs").rglob("*.ipynb") if not re.search(r"/[_.]", str(p.relative_to(folder)))} - {p.relative_to(pages) for p in pages.rglob("*.ipynb")}
    if missing:
        sys.exit(f"nbdev could not prepare {', '.join(map(str, sorted(missing)))}:\n{done.stdout}{done.stderr}")
    return pages


def html_name(notebook):
    """The page's name on the site: nbdev drops the number."""
    return re.sub(r"^\d+[a-zA-Z0-9]*_", "", notebook.name.lower()).replace(".ipynb", ".html")


def check_pages(pages, site):
    """Problems with links, anchors and pictures, one sentence each. `site` is the site's address."""
    notebooks = sorted(pages.rglob("*.ipynb"))
    read = {p: read_page(p) for p in notebooks}
    by_html = {html_name(p): p for p in notebooks}
    found = []
    for page, (ids, targets, bare) in read.items():
        name = page.relative_to(pages)
        if bare:
            found.append(f"{name}: {bare} pictures without alternative text")
        for target in dict.fromkeys(targets):
            path, _, anchor = target.partition("#")
            if target.startswith(site):
                path = path[len(site):].strip("/")
                goal = by_html.get(path or "index.html")
                if goal is None:
                    found.append(f"{name}: the site has no page {target}")
                    continue
            elif re.match(r"[a-z][a-z0-9+.-]*:", target):
                continue  # elsewhere on the web, or data inside the page
            elif path == "":
                goal = page
            else:
                goal = (page.parent / path).resolve()
                if goal.suffix == ".html" and goal.name in by_html:
                    goal = by_html[goal.name]
                if not goal.exists():
                    found.append(f"{name}: {target} does not exist")
                    continue
            if anchor and goal in read and anchor not in read[goal][0] and anchor.lower() not in {i.lower() for i in read[goal][0]}:
                found.append(f"{name}: {goal.name} has no anchor #{anchor}")
    return found


def entries(items):
    """All (text, href) of a sidebar or navbar, flattened."""
    for item in items:
        if isinstance(item, str):
            yield item, item
            continue
        yield item.get("text") or item.get("section", ""), item.get("href")
        yield from entries(item.get("contents", []) + item.get("menu", []))


def check_config(config, pages):
    """Problems with what _quarto.yml names."""
    site, html = config["website"], config["format"]["html"]
    found = []
    side = [(text, href) for text, href in entries(site["sidebar"]["contents"])]
    bar = list(entries(site["navbar"].get("left", []) + site["navbar"].get("right", [])))
    for text, href in side + bar:
        if href and not href.startswith("http") and not (pages / href).exists():
            found.append(f"_quarto.yml: {text!r} leads to {href}, which does not exist")
    listed = {href for _, href in side if href}
    for page in sorted(pages.rglob("*.ipynb")):
        if str(page.relative_to(pages)) not in listed:
            found.append(f"_quarto.yml: the sidebar lacks {page.relative_to(pages)}")
    for text, href in side:
        if href and "(to come)" in text:
            found.append(f"_quarto.yml: {text!r} is there, so it is not to come any more")
    files = [f for theme in html["theme"].values() for f in theme if f.endswith(".scss")] + [html["css"], site["favicon"], site["navbar"]["logo"]]
    found += [f"_quarto.yml: {f} does not exist" for f in files if not (pages / f).exists()]
    return found


def main():
    """0 if nothing is broken."""
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    meta = settings["DEFAULT"]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        pages = prepare(folder)
        problems = check_config(yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8")), pages)
        problems += check_pages(pages, meta["doc_host"] + meta["doc_baseurl"])
        number = len(list(pages.rglob("*.ipynb")))
        target = ROOT / "nbs" / "nbdev.yml"
        made = (folder / "nbs" / "nbdev.yml").read_text()
        if not target.exists() or target.read_text() != made:
            problems.append("nbs/nbdev.yml does not follow from settings.ini: run nbdev_proc_nbs or make site, and commit it")
        pointer = (pages / "_quarto.yml").read_text()
        if "../_quarto.yml" not in pointer or "nbdev.yml" not in pointer:
            problems.append("nbs/_quarto.yml must name ../_quarto.yml and nbdev.yml as its metadata-files")
    print("\n".join(problems) if problems else f"{number} pages: every link, anchor, picture and sidebar entry leads somewhere")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
