"""Prints the project's dependencies with one extra, torch left out: `make` installs that first, by itself."""

import re
import sys
from pathlib import Path


def tomllib_or_tomli():
    try:
        import tomllib
    except ImportError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    return tomllib


project = tomllib_or_tomli().loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]


def expand(extra: str) -> list[str]:
    out = []
    for requirement in project["optional-dependencies"][extra]:
        inner = re.fullmatch(r"fera-ext\[(\w+)\]", requirement)
        out += expand(inner[1]) if inner else [requirement]
    return out


wanted = project["dependencies"] + (expand(sys.argv[1]) if len(sys.argv) > 1 else [])
print("\n".join(r for r in dict.fromkeys(wanted) if re.match(r"[\w-]+", r)[0] != "torch"))
