"""Print the requirements of the extras that are named, as pyproject.toml states them: one list, kept in one place."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
for extra in sys.argv[1:]:
    for line in project["optional-dependencies"][extra]:
        if not line.startswith(project["name"]):
            sys.stdout.write(line + "\n")
