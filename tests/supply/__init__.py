"""Checks of the packages that the project installs: known vulnerabilities, age of the bounds."""
