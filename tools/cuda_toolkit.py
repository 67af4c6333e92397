"""Whether setup.py builds the CUDA kernels, with which toolkit and for which architectures.

Environment: FUSEDRNN_CUDA=0 builds for the CPU only. Where CUDA can't be built, 1 is an error; if
unset, the build is for the CPU. CUDA_HOME or CUDA_PATH names the toolkit, TORCH_CUDA_ARCH_LIST the
architectures.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

DEFAULT_HOME = Path("/usr/local/cuda")
# Without a GPU to ask: Ampere, Hopper and Blackwell, with the last's PTX for later GPUs.
DEFAULT_ARCHS = ("8.0", "9.0", "10.0")
OLDEST_ARCH = "8.0"  # the first to multiply bfloat16 and TF32
OLDEST_TOOLKIT = "12.1"  # the first with st.async in ptxas, from PTX ISA 8.1
# CUDA library headers included by torch's headers.
LIBRARY_HEADERS = {
    "cublas_v2.h": "cublas",
    "cusparse.h": "cusparse",
    "cusolverDn.h": "cusolver",
}


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit, and its targets: sm_80 is code, compute_100 is PTX."""

    home: Path
    version: str
    archs: list[str]
    libraries: tuple[Path, ...] = ()  # headers of cuBLAS and others, missing in `home`


class MissingError(Exception):
    """Why the CUDA kernels can't be built, and how to fix it."""


def find_home() -> Path | None:
    """The toolkit's root, which has bin/nvcc."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        if not (Path(named) / "bin/nvcc").is_file():
            raise MissingError(
                f"{named}, which CUDA_HOME or CUDA_PATH names, has no bin/nvcc: "
                "set CUDA_HOME to the root of a CUDA toolkit, or unset both"
            )
        return Path(named)
    if (DEFAULT_HOME / "bin/nvcc").is_file():
        return DEFAULT_HOME
    if nvcc := shutil.which("nvcc"):
        # nvcc may be a script around the real one, which prints its folder.
        found = re.search(r"_HERE_=(.+)", _ask(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull))
        if found and (Path(found[1]) / "nvcc").is_file():
            return Path(found[1]).parent
    return None


def find_version(home: Path) -> str:
    """A toolkit's release, such as 13.0; MissingError if it is too old."""
    found = re.search(r"release (\d+\.\d+)", answer := _ask(str(home / "bin/nvcc"), "--version"))
    if not found:
        raise MissingError(
            f"{home}/bin/nvcc --version tells no release, but {answer.strip()!r}: reinstall it"
        )
    if _parts(found[1]) < _parts(OLDEST_TOOLKIT):
        raise MissingError(
            f"{home} is CUDA {found[1]} and the kernels need {OLDEST_TOOLKIT} or later: install a "
            "later toolkit and set CUDA_HOME to its root"
        )
    return found[1]


def find(torch_version: str, torch_cuda: str | None) -> Toolkit | None:
    """The toolkit to build with, or None for the CPU only. `torch_cuda`: torch.version.cuda."""
    setting = os.environ.get("FUSEDRNN_CUDA", "")
    if setting not in ("", "0", "1"):
        raise SystemExit(
            f"FUSEDRNN_CUDA={setting} is neither 1 (build the CUDA kernels) nor 0 (don't): "
            "unset it to build them where that can be done"
        )
    if setting == "0":
        return None
    try:
        if os.environ.get("FUSEDRNN_SANITIZE") == "1":
            raise MissingError(
                "FUSEDRNN_SANITIZE=1 is for the CPU's kernels alone: unset it for CUDA"
            )
        home, version = _fitting(torch_version, torch_cuda)
        os.environ["CUDA_HOME"] = str(home)  # torch.utils.cpp_extension reads it on import
        archs = find_archs(home, version)
        libraries = find_libraries(home, version)
    except MissingError as why:
        if setting == "1":
            raise SystemExit(f"FUSEDRNN_CUDA=1, but {why}") from None
        print(f"fusedrnn is built for the CPU only: {why}")
        return None
    return Toolkit(home, version, archs, libraries)


def _fitting(torch_version: str, torch_cuda: str | None) -> tuple[Path, str]:
    """Root and release of a toolkit able to build for this torch."""
    if torch_cuda is None:
        raise MissingError(
            f"torch {torch_version} is no CUDA build: install one that is, then build again"
        )
    mend = (
        f"install CUDA {torch_cuda}'s toolkit (from NVIDIA's repository: apt-get install "
        f"cuda-toolkit-{torch_cuda.replace('.', '-')}) and set CUDA_HOME to its root"
    )
    home = find_home()
    if home is None:
        raise MissingError(f"there is no nvcc in CUDA_HOME, in {DEFAULT_HOME} or on PATH: {mend}")
    version = find_version(home)
    if version.split(".")[0] != torch_cuda.split(".")[0]:
        raise MissingError(
            f"{home} is CUDA {version} and torch {torch_version} is built for {torch_cuda}: {mend}"
        )
    return home, version


def find_archs(home: Path, version: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST, else the local GPUs' archs, else DEFAULT_ARCHS."""
    import torch
    from torch.utils import cpp_extension

    if os.environ.get("TORCH_CUDA_ARCH_LIST", "") in ("", "native") and torch.cuda.is_available():
        gpus = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        oldest = min(gpus)
        if oldest < _parts(OLDEST_ARCH):
            raise MissingError(
                f"a GPU here has compute capability {oldest[0]}.{oldest[1]} and the kernels need "
                f"{OLDEST_ARCH}: set TORCH_CUDA_ARCH_LIST to build for others"
            )
    listed = _ask(str(home / "bin/nvcc"), "--list-gpu-arch")
    known = sorted({_number(arch) for arch in re.findall(r"compute_\d+", listed)}, key=float)
    known = [arch for arch in known if float(arch) >= float(OLDEST_ARCH)]
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if asked in ("", "native") and not torch.cuda.is_available():
        asked = ";".join(a for a in DEFAULT_ARCHS if a in known) + "+PTX"
        os.environ["TORCH_CUDA_ARCH_LIST"] = asked
    mend = f"set TORCH_CUDA_ARCH_LIST to some of {';'.join(known)}, +PTX behind the last"
    try:  # torch knows names like Hopper; these are its flags for nvcc
        flags = cpp_extension._get_cuda_arch_flags()
    except ValueError as error:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST={asked}: {error}: {mend}") from None
    archs = {str(flag).split(",code=")[1] for flag in flags}
    unknown = sorted({_number(arch) for arch in archs} - {*known}, key=float)
    if unknown and float(unknown[0]) < float(OLDEST_ARCH):
        raise SystemExit(
            f"the CUDA kernels need an arch of {OLDEST_ARCH} or later, not {unknown[0]}: {mend}, "
            "or FUSEDRNN_CUDA=0 to build for the CPU only"
        )
    if unknown:
        raise SystemExit(f"CUDA {version} in {home} has no arch {', '.join(unknown)}: {mend}")
    return sorted(archs, key=lambda arch: (float(_number(arch)), arch.startswith("compute"), arch))


def find_libraries(home: Path, version: str) -> tuple[Path, ...]:
    """Folders outside `home` with the CUDA library headers included by torch's headers."""
    import torch

    # torch's wheels have one folder for CUDA 13 and one a library for CUDA 12.
    major = _parts(version)[0]
    wheels = Path(torch.__file__).parent.parent / "nvidia"
    folders: list[Path] = []
    for header, library in LIBRARY_HEADERS.items():
        if any(home.glob(f"include/{header}")) or any(home.glob(f"targets/*/include/{header}")):
            continue
        folder = wheels / (f"cu{major}" if major >= 13 else library) / "include"
        if not (folder / header).is_file():
            end = "" if major >= 13 else f"-cu{major}"
            packages = " ".join(f"nvidia-{name}{end}" for name in LIBRARY_HEADERS.values())
            raise MissingError(
                f"{home} has no {header}: install the whole toolkit of CUDA {version}, or "
                f"pip install {packages}"
            )
        folders.append(folder)
    return tuple(dict.fromkeys(folders))


def _parts(version: str) -> tuple[int, ...]:
    """(12, 1) for 12.1."""
    return tuple(int(part) for part in version.split("."))


def _number(arch: str) -> str:
    """9.0 for sm_90a: nvcc lists archs without the letter."""
    digits = re.sub(r"\D", "", arch)
    return f"{digits[:-1]}.{digits[-1]}"


def _ask(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout + result.stderr
