"""Builds fusedrnn against the torch that is already installed; what is static: pyproject.toml.

Environment: FUSEDRNN_SANITIZE=1 builds with AddressSanitizer and UBSan, for the CPU only; MAX_JOBS
limits compilers. CUDA: tools/cuda_toolkit.py.
"""

import os
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup


def find_torch() -> None:
    """Makes the user's torch importable from pip's isolated build environment."""
    try:
        import torch
    except ImportError:
        # Behind the isolated environment's own packages, so that those keep precedence.
        sys.path += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        sys.path.append(site.getusersitepackages())
        try:
            import torch  # noqa: F401
        except ImportError:
            raise SystemExit(
                "fusedrnn is built against the torch you have, and finds none: pip install torch, "
                "or, if it is installed: pip install --no-build-isolation ."
            ) from None


def find_compiler() -> None:
    """Ends with the command that installs a compiler where there is none."""
    compiler = (os.environ.get("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None:
        raise SystemExit(
            f"fusedrnn needs a C++ compiler and found no {compiler}: "
            "apt-get install g++ (Debian, Ubuntu) or xcode-select --install (macOS)"
        )
    if sys.platform.startswith("linux"):
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
        if "clang" in version:  # its OpenMP calls are to a library that torch does not bring
            raise SystemExit(
                f"fusedrnn can't be built with {compiler}, Clang: CXX=g++ pip install ."
            )


find_torch()
find_compiler()

# A build backend does not put the source tree there.
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402

from tools import cuda_toolkit  # noqa: E402

# Before cpp_extension, which looks for a toolkit on import and may find another, or half of one.
toolkit = cuda_toolkit.find(str(torch.__version__), torch.version.cuda)

from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

# The version is a flag so that objects for another torch are never taken for up to date.
shared_flags = [f"-DFUSEDRNN_TORCH_VERSION={torch.__version__}", "-O3"]
host_flags = ["-g0", "-Wall", "-Wextra", "-Wno-unused-parameter", "-fvisibility=hidden"]
nvcc_flags = [*shared_flags, f"-Xcompiler={','.join(host_flags)}"]
flags = [*shared_flags, *host_flags]
# After the toolkit's own, of which the folders may hold other versions.
for folder in toolkit.libraries if toolkit else ():
    flags += ["-idirafter", str(folder)]
link_flags = []
if sys.platform.startswith("linux"):
    # Compiled for OpenMP but not linked with it: the calls then go to the OpenMP library that torch
    # has loaded, so that there is one pool of threads and torch.set_num_threads rules it.
    flags.append("-fopenmp")
if os.environ.get("FUSEDRNN_SANITIZE") == "1":
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    flags += [*sanitize, "-O1", "-g1", "-fno-omit-frame-pointer", "-DFUSEDRNN_TILE_ROWS=2"]
    link_flags += sanitize


class Build(BuildExtension):
    """Also writes down which torch the binary was built for."""

    def finalize_options(self) -> None:
        """Never takes an old binary for up to date: that would be labelled anew."""
        super().finalize_options()
        self.force = True

    def run(self) -> None:
        """Builds the extension, then _build.py beside it."""
        super().run()
        package = Path(self.get_ext_fullpath("fusedrnn._C")).parent
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.py").write_text(
            f'"""Written by setup.py: what the binary was built for."""\n\n'
            f"torch_version = {torch.__version__!r}\n"
            f"cuda: str | None = {toolkit.version if toolkit else None!r}\n"
            f"cuda_archs: list[str] = {toolkit.archs if toolkit else []!r}\n"
        )


def sources(*patterns: str) -> list[str]:
    """The files of csrc with such names, without those of a backend that is not built."""
    found = [path for pattern in patterns for path in Path("csrc").glob(f"**/{pattern}")]
    return sorted(str(p) for p in found if toolkit or Path("csrc/cuda") not in p.parents)


setup(
    ext_modules=[
        (CUDAExtension if toolkit else CppExtension)(  # type: ignore[no-untyped-call]
            "fusedrnn._C",
            sources("*.cpp", "*.cu"),
            depends=sources("*.h", "*.cuh"),
            extra_compile_args={"cxx": flags, "nvcc": nvcc_flags},
            extra_link_args=link_flags,
        )
    ],
    cmdclass={"build_ext": Build},
)
