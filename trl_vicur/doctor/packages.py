"""Checks the packages that trl-vicur needs, without importing them, so that it can report missing ones."""

import platform
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


def check_packages() -> tuple[list[tuple[str, str]], list[str]]:
    """
    Compare the installed packages with the requirements in trl-vicur's metadata.

    Returns:
        `tuple[list[tuple[str, str]], list[str]]`: Each package with its installed and supported versions; and the
        requirements that are not met, as arguments for `pip install`.
    """
    found = [("python", platform.python_version()), ("trl-vicur", version("trl-vicur"))]
    unmet = []
    for requirement in map(Requirement, requires("trl-vicur") or []):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue  # belongs to an extra
        needed = f"supported: {requirement.specifier}" if requirement.specifier else "any version"
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            found.append((requirement.name, f"MISSING, {needed}"))
            unmet.append(str(requirement))
            continue
        if requirement.specifier.contains(installed, prereleases=True):
            found.append((requirement.name, f"{installed} ({needed})"))
        else:
            found.append((requirement.name, f"{installed} NOT SUPPORTED, {needed}"))
            unmet.append(str(requirement))
    return found, unmet
