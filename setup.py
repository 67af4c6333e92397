"""Builds fusedrnn against the installed torch. pyproject.toml has the static metadata.

Environment: FUSEDRNN_SANITIZE=1 builds with AddressSanitizer and UBSan, for the CPU only; MAX_JOBS
limits compilers. CUDA: tools/cuda_toolkit.py. A wheel's version: tools/local_version.py.
"""

import os
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.egg_info import egg_info


def find_torch() -> None:
    """Makes the user's torch importable from pip's isolated build environment."""
    try:
        import torch
    except ImportError:
        # Last, so packages in the isolated environment take precedence.
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
    """If there is no compiler, exits with the command to install one."""
    compiler = (os.environ.get("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None:
        raise SystemExit(
            f"fusedrnn needs a C++ compiler and found no {compiler}: "
            "apt-get install g++ (Debian, Ubuntu) or xcode-select --install (macOS)"
        )
    if sys.platform.startswith("linux"):
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
        if "clang" in version:  # torch lacks the library for clang's OpenMP calls
            raise SystemExit(
                f"fusedrnn can't be built with {compiler}, Clang: CXX=g++ pip install ."
            )


find_torch()
find_compiler()

# A build backend does not add the source tree.
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402

from tools import cuda_toolkit, local_version  # noqa: E402

# Before cpp_extension, which on import may find another toolkit or an incomplete one.
toolkit = cuda_toolkit.find(str(torch.__version__), torch.version.cuda)
local = local_version.requested(
    str(torch.__version__), torch.version.cuda, has_cuda_kernels=toolkit is not None
)

from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

# The version is a flag, so objects for another torch are never up to date.
shared_flags = [f"-DFUSEDRNN_TORCH_VERSION={torch.__version__}", "-O3"]
host_flags = ["-g0", "-Wall", "-Wextra", "-Wno-unused-parameter", "-fvisibility=hidden"]
nvcc_flags = [*shared_flags, f"-Xcompiler={','.join(host_flags)}"]
flags = [*shared_flags, *host_flags]
# After the toolkit's headers: the folders may hold other versions of some.
for folder in toolkit.libraries if toolkit else ():
    flags += ["-idirafter", str(folder)]
link_flags = []
if sys.platform.startswith("linux"):
    # Compiled for OpenMP but not linked with it. Calls then go to torch's OpenMP library, so there
    # is one thread pool, controlled by torch.set_num_threads.
    flags.append("-fopenmp")
if os.environ.get("FUSEDRNN_SANITIZE") == "1":
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    flags += [*sanitize, "-O1", "-g1", "-fno-omit-frame-pointer", "-DFUSEDRNN_TILE_ROWS=2"]
    link_flags += sanitize


class Build(BuildExtension):
    """Also records for which torch the binary was built."""

    def finalize_options(self) -> None:
        """Always links again: _build.py would give an old binary a new label."""
        super().finalize_options()
        self.force = True

    def run(self) -> None:
        """Builds the extension, then _build.py beside it."""
        super().run()
        package = Path(self.get_ext_fullpath("fusedrnn._C")).parent
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.py").write_text(
            f'"""Written by setup.py: the torch and CUDA that the binary was built for."""\n\n'
            f"torch_version = {torch.__version__!r}\n"
            f"cuda: str | None = {toolkit.version if toolkit else None!r}\n"
            f"cuda_archs: list[str] = {toolkit.archs if toolkit else []!r}\n"
        )


class Info(egg_info):
    """Appends the local version, but not to an sdist's: it builds against any torch."""

    def finalize_options(self) -> None:
        """tag_build is setuptools' option for the end of a version."""
        if local and "sdist" not in self.distribution.commands:
            self.tag_build = f"+{local}"
        super().finalize_options()


def sources(*patterns: str) -> list[str]:
    """Files in csrc with these names, without unbuilt backends."""
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
    cmdclass={"build_ext": Build, "egg_info": Info},
)
