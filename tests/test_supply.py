"""The packages that the project installs: licences, age of the bounds, and an audit that cannot pass unseen."""

from __future__ import annotations

import importlib.metadata
import re
from datetime import UTC, datetime, timedelta

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.supply import ages, audit, sbom

ALLOWED = re.compile(
    r"MIT(-0|-CMU)?|BSD(-[23]-Clause)?|0BSD|Apache(-2\.0)?|PSF-2\.0|ISC|Zlib|CC0-1\.0|BSL-1\.0|Unlicense|MPL-2\.0|"
    r"LLVM-exception"
)
"""Permissive licences, and MPL-2.0, whose conditions concern changed files only."""
CLASSIFIERS = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
}
READ_BY_HAND = {
    "protobuf": "BSD-3-Clause",
    "sigstore-models": "Apache-2.0",
}
"""Licences of packages that declare none in a form that a program can read; from the file LICENSE of each."""


def closure(*extras: str) -> set[str]:
    """Return the names of all installed packages that the project needs with these extras, on this machine."""
    found: set[str] = set()
    pending = [("reconstruction-anomaly", frozenset(extras))]
    while pending:
        name, wanted = pending.pop()
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in (*wanted, "")):
                continue
            try:
                importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                continue  # for another platform, or of an environment that is older than pyproject.toml
            key = re.sub(r"[-_.]+", "-", requirement.name).lower()
            if key not in found:
                found.add(key)
                pending.append((key, frozenset(requirement.extras)))
    return found - {"reconstruction-anomaly"}


def licence_of(name: str) -> str:
    """Return the licence of an installed package: its expression, classifiers or text."""
    metadata = importlib.metadata.metadata(name)
    if name in READ_BY_HAND:
        return READ_BY_HAND[name]
    if expression := metadata.get("License-Expression"):
        return str(expression)
    classifiers = [line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier") or [] if "License ::" in line]
    known = [CLASSIFIERS.get(each, each) for each in classifiers if each != "DFSG approved"]
    return " AND ".join(known) or str(metadata.get("License") or "none")


def is_allowed(expression: str) -> bool:
    """Return whether each licence of an expression is allowed; of alternatives, one suffices."""
    choices = re.split(r"\s+OR\s+", expression.strip("()"))
    return any(
        all(ALLOWED.fullmatch(each.strip("() ")) for each in re.split(r"\s+(?:AND|WITH)\s+", choice))
        for choice in choices
    )


@pytest.mark.parametrize("extra", ["serve", "train"])
def test_every_licence_is_allowed(extra):
    """All packages of the service and of training have a licence that permits to ship them."""
    names = closure(extra)
    assert {"fastapi", "starlette", "torch", "pydantic-core"} <= names
    assert {
        name: licence_of(name) for name in names if not is_allowed(licence_of(name).replace("Apache 2.0", "Apache-2.0"))
    } == {}


@pytest.mark.parametrize(
    "expression", ["GPL-3.0-only", "MIT AND AGPL-3.0", "none", "LGPL-2.1 OR GPL-2.0", "Proprietary", ""]
)
def test_other_licences_are_found(expression):
    """A licence that is not in the list is rejected, also as a part of an expression."""
    assert not is_allowed(expression)
    assert is_allowed(f"{expression or 'x'} OR MIT")


def test_a_skipped_package_fails_the_audit():
    """An audit with one package that was not looked up is a failure with the reason, not a success."""
    good = {"name": "a", "version": "1", "vulns": []}
    skipped = {"name": "b", "skip_reason": "not found"}
    assert audit.judge({"dependencies": [good]}, 1) == []
    (reason,) = audit.judge({"dependencies": [good, skipped]}, 2)
    assert reason.startswith("1 of 2 packages were not looked up: the advisory database cannot be reached")
    assert len(audit.judge({"dependencies": []}, 2)) == 1
    vulnerable = {"name": "c", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}
    assert audit.judge({"dependencies": [good, vulnerable]}, 2) == ["c 1: CVE-1, fixed in 2"]


def test_an_old_pin_is_found():
    """A pin is too old if it is a year old and a newer stable release exists."""
    now = datetime(2026, 6, 1, tzinfo=UTC)
    old, recent = now - timedelta(days=400), now - timedelta(days=300)
    released = {Version("1"): old, Version("2"): recent, Version("3rc1"): now}
    assert ages.judge("a", "1", released, now) == "a 1 is of 2025-04-27; the newest release is 2"
    assert ages.judge("a", "2", released, now) is None
    assert ages.judge("a", "1", {Version("1"): old, Version("2rc1"): recent}, now) is None
    assert ages.judge("a", "7", released, now) == "a 7: the index does not know this release"


def test_every_bounded_package_has_its_age_checked():
    """The check of ages reads the pin of each package that pyproject.toml bounds."""
    pins = ages.bounded()
    assert {"torch", "fastapi", "cryptography", "ruff", "pytest-asyncio"} <= pins.keys()
    assert all(Version(version) for version in pins.values())


def test_a_package_without_an_entry_is_found() -> None:
    """A package that the bill of materials lists in another version, or not at all, is named."""
    document = {"components": [{"name": "Some_package", "version": "1.0"}, {"name": "other", "version": "2"}]}
    assert sbom.missing(document, {("some-package", "1.0"), ("other", "2")}) == []
    assert sbom.missing(document, {("some-package", "1.1"), ("third", "3")}) == ["some-package==1.1", "third==3"]
