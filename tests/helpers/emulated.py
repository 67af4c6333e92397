"""Builds csrc/cuda for the emulator: the same kernels and the same host code, without a GPU."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "tests" / "emulator"
BUILD = ROOT / "build" / "emulator"
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
COMPILER = os.environ.get("CXX", "g++").split()
COMMON = shlex.split(
    "-g1 -O2 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unused-parameter -Wno-unknown-pragmas "
    "-fno-strict-aliasing"
)
# For other programs: without the libraries preloaded by `make sanitize`.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
# A GPU faults on a misaligned access. These flags trap on one, by an illegal instruction.
ALIGNED = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]


def key_of(command: Sequence[str], dependencies: Path, texts: dict[Path, bytes]) -> str:
    """Changes with the command, and with the texts of a compiler's list of dependencies."""
    key = hashlib.sha256(shlex.join(command).encode())
    if dependencies.exists():
        words = shlex.split(dependencies.read_text().replace("\\\n", " "))[1:]  # after the target
        paths = {Path(os.path.normpath(word)) for word in words} & texts.keys()
        assert paths, f"{dependencies} lists none of the project's files"
        for path in sorted(paths):
            key.update(f"{path} {len(texts[path])} ".encode() + texts[path])
    return key.hexdigest()[:16]


def compile_all(sources: Sequence[tuple[Path, Sequence[str]]], output: Path) -> list[Path]:
    """Compiles sources, each with its own flags; reuses up-to-date object files."""
    output.mkdir(parents=True, exist_ok=True)
    # As they are before the compiler reads them: do not edit them meanwhile.
    files = [p for folder in (ROOT / "csrc", EMULATOR) for p in folder.rglob("*") if p.is_file()]
    texts = {path: path.read_bytes() for path in files}

    def one(source: Path, flags: Sequence[str]) -> Path:
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        command = [*COMPILER, *COMMON, *flags, *language, "-c", str(source)]
        dependencies = output / f"{source.stem}.d"
        target = output / f"{source.stem}-{key_of(command, dependencies, texts)}.o"
        if not target.exists():
            partial = output / f"{source.stem}.{os.getpid()}"
            listed = ["-MMD", "-MF", f"{partial}.d"]
            subprocess.run([*command, *listed, "-o", str(partial)], check=True)
            for old in output.glob(f"{source.stem}-*.o"):
                old.unlink(missing_ok=True)
            Path(f"{partial}.d").rename(dependencies)
            target = output / f"{source.stem}-{key_of(command, dependencies, texts)}.o"
            partial.rename(target)
        return target

    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda job: one(*job), sources))


def kernel_flags(csrc: Path = ROOT / "csrc") -> list[str]:
    return ["-std=c++17", *ALIGNED, f"-I{csrc}", f"-I{EMULATOR}"]


def build_ops() -> Path:
    """Builds the library with torch.ops.fusedrnn_emulated for the running torch."""
    import torch
    from torch.utils.cpp_extension import include_paths

    standard = "c++20" if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12) else "c++17"
    torch_flags = [f"-std={standard}", f"-I{EMULATOR}", *(f"-I{p}" for p in include_paths())]
    torch_flags.append(f"-DFUSEDRNN_TORCH_VERSION={torch.__version__}")
    cuda = ROOT / "csrc" / "cuda"
    host = [
        ROOT / "csrc" / "layer.cpp",
        *(cuda / f"{name}.cpp" for name in ("ops_cuda", "persistent", "stepwise", "variant")),
        EMULATOR / "device.cpp",
        EMULATOR / "register.cpp",
    ]
    kernels = [*KERNELS, cuda / "plan.cpp", EMULATOR / "emulator.cpp"]
    objects = compile_all(
        [*((p, torch_flags) for p in host), *((p, kernel_flags()) for p in kernels)], BUILD / "ops"
    )
    library = BUILD / f"ops-{hashlib.sha256(str(objects).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        libraries = f"-L{Path(torch.__file__).parent / 'lib'}"
        partial = library.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [*COMPILER, "-shared", *map(str, objects), libraries, "-lc10", "-ltorch_cpu", "-o",
             str(partial)],
            check=True,
        )  # fmt: skip
        for old in BUILD.glob("ops-*.so"):
            old.unlink(missing_ok=True)
        partial.rename(library)
    return library


if __name__ == "__main__":
    print(build_ops())
    sys.exit(0)
