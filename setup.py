"""Builds the package from settings.ini, the one place for its metadata."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
meta = config["DEFAULT"]


def lines(key):
    """The non-empty lines of a multi-line setting."""
    return [line.strip() for line in meta.get(key, "").splitlines() if line.strip()]


# every `<name>_requirements` setting becomes the extra <name>
extras = {key[: -len("_requirements")]: lines(key) for key in meta if key.endswith("_requirements")}
minimum = int(meta["min_python"].split(".")[1])

setup(
    name=meta["lib_name"],
    version=meta["version"],
    description=meta["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8") if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=meta["author"],
    author_email=meta["author_email"],
    url=meta["git_url"],
    project_urls={"Documentation": meta["doc_host"] + meta["doc_baseurl"]},
    keywords=meta["keywords"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Intended Audience :: Education",
        "Natural Language :: English",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        *[f"Programming Language :: Python :: 3.{minor}" for minor in range(minimum, 14)],
    ],
    packages=find_packages(include=[meta["lib_path"], meta["lib_path"] + ".*"]),
    # weights of the zoo with their cards, committed result rows, small hand-written data sets
    package_data={meta["lib_path"]: ["zoo_models/**", "results/*.jsonl", "results/**/*.jsonl", "data/**", "*.json"]},
    include_package_data=False,
    zip_safe=False,
    python_requires=">=" + meta["min_python"],
    install_requires=lines("requirements"),
    extras_require=extras,
    entry_points={
        "console_scripts": lines("console_scripts"),
        "nbdev": [f"{meta['lib_path']}={meta['lib_path']}._modidx:d"],
    },
)
