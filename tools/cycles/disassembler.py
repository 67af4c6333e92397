"""cuobjdump and nvdisasm: found, fetched and run."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools import cuda_check, cuda_toolkit

NAMES = ("cuobjdump", "nvdisasm")
FOLDER = cuda_check.ROOT / "build" / "cuda_tools"
MEND = (
    "install the whole CUDA toolkit, set CUDA_BINUTILS to a folder with both, or run "
    "`make cuda-cycles`, which fetches them from the wheel of triton"
)


class MissingError(Exception):
    """Why the machine code can't be read, and how to fix it."""


def find(home: Path | None) -> Path:
    """The folder of both tools: CUDA_BINUTILS, the toolkit's, one on PATH, the fetched one."""
    named = os.environ.get("CUDA_BINUTILS")
    if named and not _has_tools(Path(named)):
        raise MissingError(f"CUDA_BINUTILS={named} has no {' and '.join(NAMES)}: {MEND}")
    on_path = shutil.which(NAMES[0])
    folders = [
        Path(named) if named else None,
        home / "bin" if home else None,
        Path(on_path).parent if on_path else None,
        FOLDER,
    ]
    for folder in folders:
        if folder and _has_tools(folder):
            return folder
    raise MissingError(f"there are no {' and '.join(NAMES)}: {MEND}")


def _has_tools(folder: Path) -> bool:
    return all(os.access(folder / name, os.X_OK) for name in NAMES)


def fetch() -> Path:
    """Takes both tools from the wheel of triton into build/cuda_tools."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
        result = subprocess.run([*command, "triton"], capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("triton-*.whl"))
        if result.returncode or not wheels:
            why = (result.stdout + result.stderr).strip()
            raise MissingError(f"pip can't download the wheel of triton ({why}): {MEND}")
        FOLDER.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name in NAMES:
                at = f"triton/backends/nvidia/bin/{name}"
                if at not in wheel.namelist():
                    raise MissingError(f"{wheels[0].name} has no {at}: {MEND}")
                partial = FOLDER / f"{name}.{os.getpid()}"
                partial.write_bytes(wheel.read(at))
                partial.chmod(0o755)
                partial.rename(FOLDER / name)
    return FOLDER


def disassembled(tools: Path, cubin: Path) -> str:
    """The SASS of a cubin, without the instructions' encodings."""
    path = f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"
    result = subprocess.run(
        [str(tools / NAMES[0]), "-sass", str(cubin)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": path},
    )
    if result.returncode or "Function :" not in result.stdout:
        raise MissingError(f"{tools / NAMES[0]} can't read {cubin}: {result.stderr.strip()}")
    # An instruction is "/*0010*/ S2R R4, SR_TID.X ; /* 0x... */", with more of its encoding below.
    text = re.sub(r"(?m);\s*/\* 0x[0-9a-f]+ \*/$", ";", result.stdout)
    return re.sub(r"(?m)^\s*/\* 0x[0-9a-f]+ \*/\n", "", text)


def _state(source: Path) -> bytes:
    """All on which a source's machine code depends, but the compiler: it and what it includes."""
    seen: dict[Path, bytes] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path in seen or not path.exists():  # the toolkit has the others
            continue
        seen[path] = path.read_bytes()
        names = re.findall(rb'(?m)^\s*#include "([^"]+)"', seen[path])
        waiting += [(path.parent / name.decode()).resolve() for name in names]
    return b"".join(path.name.encode() + seen[path] for path in sorted(seen))


def kernels(arch: str, jobs: int, cache: Path) -> dict[str, str]:
    """The SASS of each function in csrc/cuda/persistent_*.cu for one arch, by its short name."""
    home = cuda_toolkit.find_home()
    if home is None:
        raise MissingError("there is no nvcc: set CUDA_HOME to a CUDA toolkit's root")
    tools = find(home)
    version = cuda_toolkit.find_version(home)
    cache.mkdir(parents=True, exist_ok=True)

    def one(source: Path) -> str:
        key = hashlib.sha256(_state(source) + repr((version, cuda_check.FLAGS, arch)).encode())
        stored = cache / f"{source.stem}-{arch}-{key.hexdigest()[:16]}.sass"
        if not stored.exists():
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder) / "cubin"
                relative = source.relative_to(cuda_check.ROOT)
                succeeded, output = cuda_check.compiled(home / "bin/nvcc", relative, arch, cubin)
                if not succeeded:
                    raise MissingError(f"nvcc can't compile {relative} for {arch}:\n{output}")
                text = disassembled(tools, cubin)
            for old in cache.glob(f"{source.stem}-{arch}-*.sass"):
                old.unlink(missing_ok=True)
            partial = stored.with_suffix(f".{os.getpid()}")
            partial.write_text(text)
            partial.rename(stored)
        return stored.read_text()

    sources = sorted((cuda_check.ROOT / "csrc/cuda").glob("persistent_*.cu"))
    with ThreadPoolExecutor(jobs) as pool:
        texts = list(pool.map(one, sources))
    from tools.cycles import sass

    found: dict[str, str] = {}
    for text in texts:
        parts = list(sass.split(text))
        names = cuda_check.demangled("\n".join(name for name, _ in parts)).splitlines()
        found.update({cuda_check.short(n): body for n, (_, body) in zip(names, parts, strict=True)})
    return found
