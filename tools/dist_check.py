"""Checks the output from `make dist`: the sdist has all files, the wheel only the package.

The wheel's version names the torch that is installed here if FUSEDRNN_LOCAL_VERSION=1.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from tools import local_version

ROOT = Path(__file__).parent.parent
# Files added to an sdist by setuptools, and build files.
OF_SETUPTOOLS = re.compile(r"PKG-INFO|setup\.cfg|fusedrnn\.egg-info/.*")
BINARY = f"fusedrnn/_C{EXTENSION_SUFFIXES[0]}"
BUILT = {BINARY, "fusedrnn/_build.py"}


def tracked() -> set[str]:
    """The repository's files."""
    command = ("git", "-C", str(ROOT), "ls-files", "-z")
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).exists()}


def compare(archive: str, found: set[str], expected: set[str]) -> list[str]:
    """The names missing in `found`, and its surplus names."""
    missing = [f"{archive} lacks {name}" for name in sorted(expected - found)]
    return missing + [f"{archive} has {name}" for name in sorted(found - expected)]


def check_sdist(path: Path, files: set[str]) -> list[str]:
    """An sdist's problems; it should have `files` and nothing else."""
    with tarfile.open(path) as archive:
        names = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
    return compare(path.name, {n for n in names if not OF_SETUPTOOLS.fullmatch(n)}, files)


def check_wheel(path: Path, files: set[str]) -> list[str]:
    """A wheel's problems; it should have the package's part of `files`."""
    package = {name for name in files if name.startswith("fusedrnn/")} | BUILT
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        folder = next(n for n in names if n.endswith(".dist-info/METADATA")).rsplit("/", 1)[0]
        metadata = Parser().parsestr(archive.read(f"{folder}/METADATA").decode())
        wheel = Parser().parsestr(archive.read(f"{folder}/WHEEL").decode())
        built = constants(archive.read("fusedrnn/_build.py").decode()) if names >= BUILT else {}
    notes = {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE", "top_level.txt"}
    problems = compare(path.name, names, package | {f"{folder}/{name}" for name in notes})
    return problems + check_metadata(path, metadata, wheel) + check_torch(path, built)


def constants(module: str) -> dict[str, object]:
    """The constants that a module's text assigns, by name."""
    found: dict[str, object] = {}
    for node in ast.parse(module).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found[ast.unparse(target)] = ast.literal_eval(node.value)
    return found


def check_torch(path: Path, built: dict[str, object]) -> list[str]:
    """The problems of the torch in a wheel, whose _build.py has these constants."""
    running, problems = str(torch.__version__), []
    if built.get("torch_version") != running:
        problems.append(
            f"{path.name} was built for torch {built.get('torch_version')}, not {running}"
        )
    _, named, local = path.name.split("-")[1].partition("+")
    if named and torch.version.cuda and not built.get("cuda"):
        problems.append(f"{path.name} names CUDA and has no CUDA kernels")
    if named and local != local_version.local_version(running, torch.version.cuda):
        problems.append(f"{path.name} does not name torch {running}")
    return problems


def expected_version() -> str:
    """pyproject.toml's version, with a local version if the environment asks for it."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    version: str = re.findall(r'^version = "(.+)"', pyproject, re.M)[0]
    local = local_version.requested(
        str(torch.__version__), torch.version.cuda, has_cuda_kernels=True
    )
    return f"{version}+{local}" if local else version


def check_metadata(path: Path, metadata: Message, wheel: Message) -> list[str]:
    """The problems in a wheel's metadata."""
    name, version, python, abi, platform = path.stem.split("-")
    expected = {
        "Name": name,
        "Version": expected_version(),
        "License-Expression": "Apache-2.0",
        "License-File": "LICENSE",
        "Requires-Python": ">=3.10",
        "Description-Content-Type": "text/markdown",
    }
    problems = [
        f"{path.name}: {field} is {metadata[field]}, not {value}"
        for field, value in expected.items()
        if metadata[field] != value
    ]
    if metadata["Version"] != version:
        problems.append(f"{path.name}: Version is {metadata['Version']}")
    readme = (ROOT / "README.md").read_text()
    if str(metadata.get_payload()).strip() != readme.strip():
        problems.append(f"{path.name}: the description is not README.md")
    needs = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    problems += [f"{path.name} has pip install {need}" for need in needs]
    here = f"cp{sys.version_info.major}{sys.version_info.minor}"
    tag = f"{python}-{abi}-{platform}"
    if (python, abi) != (here, here) or platform == "any" or wheel["Tag"] != tag:
        problems.append(f"{path.name}: the tag is {tag}, and {wheel['Tag']} inside")
    if wheel["Root-Is-Purelib"] != "false":
        problems.append(f"{path.name} is marked as pure Python")
    return problems


def main() -> int:
    """Checks the only sdist and wheel in a folder; returns 1 if there are problems."""
    folder = Path(sys.argv[1])
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    files = tracked()
    problems = check_sdist(sdist, files) + check_wheel(wheel, files)
    for path in (sdist, wheel):
        print(f"{path}  {path.stat().st_size / 1e6:.2f} MB")
    for problem in problems:
        print(f"FAILED {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
