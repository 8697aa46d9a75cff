"""Write the map of the papers, generated from the catalogue, between the markers of README.md."""
import re
import sys
from pathlib import Path

from promptbook.catalog import readme_table

README = Path(__file__).resolve().parent.parent / "README.md"
SECTION = re.compile(r"(<!-- catalog:start -->\n).*?(\n<!-- catalog:end -->)", re.S)


def updated(text):
    """`text` with a fresh map; raises ValueError where the markers are missing."""
    if len(SECTION.findall(text)) != 1:
        raise ValueError("README.md needs one pair of markers: <!-- catalog:start --> and <!-- catalog:end -->")
    table = readme_table().strip()
    return SECTION.sub(lambda m: f"{m.group(1)}{table}{m.group(2)}", text)


if __name__ == "__main__":
    old = README.read_text(encoding="utf-8")
    new = updated(old)
    README.write_text(new, encoding="utf-8")
    sys.exit(print("README.md is up to date" if old == new else "README.md written"))
