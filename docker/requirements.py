"""Print the requirements of extras as pyproject.toml lists them; `project` stands for those of the wheel itself."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
lists = {"project": project["dependencies"], **project["optional-dependencies"]}
for name in sys.argv[1:]:
    for line in lists[name]:
        if not line.startswith(project["name"]):
            sys.stdout.write(line + "\n")
