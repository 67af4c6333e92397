"""Import and build messages, versions, distributions, the CUDA kernels' check."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from email.message import Message
from pathlib import Path

import pytest
import torch

import fusedrnn
from tools import cuda_check, cuda_toolkit, dist_check, local_version
from tools.cuda_check import Kernel

PACKAGE = Path(fusedrnn.__file__).parent
TESTS = Path(__file__).parent


def run(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=path,
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=False,
    )


def copy(tmp_path: Path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / "fusedrnn", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "fusedrnn"


def last_line(process: subprocess.CompletedProcess[str]) -> str:
    assert process.returncode != 0
    return process.stderr.strip().splitlines()[-1]


def test_built_for_another_torch(tmp_path: Path) -> None:
    build = copy(tmp_path) / "_build.py"
    build.write_text('torch_version = "1.0.0"\n')
    assert last_line(run("import fusedrnn", tmp_path)) == (
        f"ImportError: fusedrnn was built for torch 1.0.0 but torch {torch.__version__} is "
        "running: run `pip install --force-reinstall --no-deps --no-cache-dir .` in a checkout of "
        "fusedrnn"
    )


def test_not_built(tmp_path: Path) -> None:
    package = copy(tmp_path)
    for binary in package.glob("_C*"):
        binary.unlink()
    line = last_line(run("import fusedrnn", tmp_path))
    assert line.startswith("ImportError: fusedrnn has no compiled kernels in ")
    assert "pip install" in line
    assert "another folder" not in line
    # In a checkout, which Python imports from if it was started there.
    (tmp_path / "setup.py").touch()
    line = last_line(run("import fusedrnn", tmp_path))
    assert line.endswith(" in a checkout of fusedrnn, then start Python in another folder")


def test_a_broken_binary(tmp_path: Path) -> None:
    package = copy(tmp_path)
    for binary in package.glob("_C*"):
        binary.write_bytes(b"not a library")
    line = last_line(run("import fusedrnn", tmp_path))
    assert line.startswith("ImportError: fusedrnn's kernels could not be loaded (")
    assert "pip install" in line


def test_without_torch(tmp_path: Path) -> None:
    copy(tmp_path)
    code = "import sys; sys.modules['torch'] = None; import fusedrnn"
    assert "fusedrnn needs torch: pip install torch" in last_line(run(code, tmp_path))


def compiled(tmp_path: Path, compiler: str, *flags: str) -> Path:
    """Compiles the kernels alone, to show they need no torch."""
    program = tmp_path / "kernels"
    subprocess.run(
        [
            *(compiler, "-std=c++17", "-O1", "-DFUSEDRNN_TILE_ROWS=2", *flags, "-o", str(program)),
            str(TESTS / "kernels/kernels_alone.cpp"),
            str(TESTS.parent / "csrc/cpu/kernels_baseline.cpp"),
        ],
        check=True,
    )
    return program


@pytest.mark.long
def test_kernels_without_torch(tmp_path: Path) -> None:
    program = compiled(tmp_path, os.environ.get("CXX", "c++"))
    subprocess.run([program], check=True)


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64-static")),
    reason="needs a compiler for arm64 and an emulator: g++-aarch64-linux-gnu, qemu-user-static",
)
def test_kernels_on_arm64(tmp_path: Path) -> None:
    program = compiled(tmp_path, "aarch64-linux-gnu-g++", "-static")
    subprocess.run(["qemu-aarch64-static", program], check=True)


# A compiler that writes empty files.
COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
  case "$1" in
  --version) echo "c++ (GCC) 13.2.0";;
  -o) : > "$2";;
  esac
  shift
done
"""


@pytest.mark.skipif(
    subprocess.run(
        ["git", "-C", str(dist_check.ROOT), "rev-parse"], capture_output=True, check=False
    ).returncode
    != 0,
    reason="needs the repository, which knows its files",
)
@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a toolkit for CUDA's torch")
def test_sdist_and_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds a copy without compilation. A copy, because setuptools keeps files of older sdists.

    FUSEDRNN_LOCAL_VERSION names the torch in the wheel's version, and not in the sdist's.
    """
    files = dist_check.tracked()
    for name in files:
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(dist_check.ROOT / name, tmp_path / "source" / name)
    compiler = tmp_path / "c++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    environment = {
        "CXX": str(compiler),
        "CC": str(compiler),
        "FUSEDRNN_CUDA": "0",
        "FUSEDRNN_SANITIZE": "",
    }
    code = (
        "from setuptools import build_meta as b; b.build_sdist('../dist'); b.build_wheel('../dist')"
    )

    def build(local: str) -> list[Path]:
        """The sdist and the wheel."""
        monkeypatch.setenv("FUSEDRNN_LOCAL_VERSION", local)
        shutil.rmtree(tmp_path / "dist", ignore_errors=True)
        process = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path / "source",
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == 0, process.stdout + process.stderr
        return sorted((tmp_path / "dist").iterdir(), key=lambda path: path.suffix)

    sdist, wheel = build("1")
    local = local_version.local_version(str(torch.__version__), None)
    assert wheel.name.startswith(f"{sdist.name.removesuffix('.tar.gz')}+{local}-")
    assert dist_check.check_sdist(sdist, files) == []
    assert dist_check.check_wheel(wheel, files) == []
    monkeypatch.delenv("FUSEDRNN_LOCAL_VERSION")
    version = dist_check.expected_version()
    assert dist_check.check_wheel(wheel, files) == [
        f"{wheel.name}: Version is {version}+{local}, not {version}"
    ]

    sdist, wheel = build("")
    assert wheel.name.startswith(f"{sdist.name.removesuffix('.tar.gz')}-")
    assert dist_check.check_sdist(sdist, files) == []
    assert dist_check.check_wheel(wheel, files) == []

    more = {"fusedrnn/more.py", "csrc/more.h"}
    assert dist_check.check_sdist(sdist, (files | more) - {"Makefile"}) == [
        f"{sdist.name} lacks csrc/more.h",
        f"{sdist.name} lacks fusedrnn/more.py",
        f"{sdist.name} has Makefile",
    ]
    assert dist_check.check_wheel(wheel, (files | more) - {"fusedrnn/py.typed"}) == [
        f"{wheel.name} lacks fusedrnn/more.py",
        f"{wheel.name} has fusedrnn/py.typed",
    ]
    pure = wheel.rename(wheel.with_name("fusedrnn-9-py3-none-any.whl"))
    assert [
        problem.removeprefix(f"{pure.name}: ") for problem in dist_check.check_wheel(pure, files)
    ] == [
        f"Version is {dist_check.expected_version()}",
        f"the tag is py3-none-any, and {wheel.stem.split('-', 2)[2]} inside",
    ]


def test_wheel_brings_no_torch() -> None:
    """Only extras may require packages."""
    path, metadata = Path("fusedrnn-0.2.0-cp311-cp311-linux_x86_64.whl"), Message()
    for need in ("torch>=2.11", "numpy", 'gluonts[torch]; extra == "models"'):
        metadata["Requires-Dist"] = need
    assert [
        problem
        for problem in dist_check.check_metadata(path, metadata, Message())
        if "pip install" in problem
    ] == [f"{path.name} has pip install {need}" for need in ("torch>=2.11", "numpy")]


def test_torch_in_a_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The binary, the file's name and the torch that is installed are of one version."""

    def problems(version: str, **built: object) -> list[str]:
        name = f"fusedrnn-{version}-cp311-cp311-linux_x86_64.whl"
        return [p.removeprefix(f"{name} ") for p in dist_check.check_torch(Path(name), built)]

    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    monkeypatch.setattr(torch.version, "cuda", None)
    cpu = "2.13.0+cpu"
    assert problems("0.2.0", torch_version=cpu, cuda=None) == []
    assert problems("0.2.0+torch2.13.0cpu", torch_version=cpu, cuda=None) == []
    unnamed = ["does not name torch 2.13.0+cpu"]
    assert problems("0.2.0+torch2.11.0cpu", torch_version=cpu, cuda=None) == unnamed
    assert problems("0.2.0+torch2.13.0cu130", torch_version=cpu, cuda=None) == unnamed
    other = ["was built for torch 2.11.0+cpu, not 2.13.0+cpu"]
    assert problems("0.2.0", torch_version="2.11.0+cpu", cuda=None) == other
    assert problems("0.2.0") == ["was built for torch None, not 2.13.0+cpu"]

    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    named, cuda = "0.2.0+torch2.13.0cu130", "2.13.0+cu130"
    assert problems(named, torch_version=cuda, cuda="13.1") == []
    assert problems(named, torch_version=cuda, cuda=None) == ["names CUDA and has no CUDA kernels"]


def test_constants_of_a_module() -> None:
    text = """'''A docstring.'''\n\na = '2.13'\nb: str | None = None\nc: list[str] = ['sm_80']\n"""
    assert dist_check.constants(text) == {"a": "2.13", "b": None, "c": ["sm_80"]}


@pytest.mark.parametrize(
    ("torch_version", "cuda", "local"),
    [
        ("2.13.0+cpu", None, "torch2.13.0cpu"),
        ("2.13.0", None, "torch2.13.0cpu"),
        ("2.13.0+cu130", "13.0", "torch2.13.0cu130"),
        ("2.14.0.dev20261101+cu129", "12.9", "torch2.14.0.dev20261101cu129"),
        ("2.13.0a0+git0a1b2c3", None, "torch2.13.0a0cpu"),
    ],
)
def test_local_version(
    torch_version: str, cuda: str | None, local: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert re.fullmatch(r"[a-z0-9]+([-_.][a-z0-9]+)*", local)  # PEP 440's local version
    assert local_version.local_version(torch_version, cuda) == local
    for setting in ("", "0"):
        monkeypatch.setenv("FUSEDRNN_LOCAL_VERSION", setting)
        assert local_version.requested(torch_version, cuda, has_cuda_kernels=False) is None
    monkeypatch.setenv("FUSEDRNN_LOCAL_VERSION", "1")
    assert local_version.requested(torch_version, cuda, has_cuda_kernels=True) == local


def test_local_version_that_would_mislead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDRNN_LOCAL_VERSION", "1")
    assert local_version.requested("2.13.0", None, has_cuda_kernels=False) == "torch2.13.0cpu"
    with pytest.raises(SystemExit, match=r"torch2\.13\.0cu130, but the build has no CUDA kernels"):
        local_version.requested("2.13.0+cu130", "13.0", has_cuda_kernels=False)
    monkeypatch.setenv("FUSEDRNN_LOCAL_VERSION", "torch")
    with pytest.raises(SystemExit, match=r"^FUSEDRNN_LOCAL_VERSION=torch is neither 1 .* nor 0"):
        local_version.requested("2.13.0", None, has_cuda_kernels=False)


def test_versions_agree() -> None:
    """pyproject.toml's version is the citation's and the changelog's last, each with its link."""
    root = dist_check.ROOT
    (version,) = re.findall(r'^version = "(.+)"', (root / "pyproject.toml").read_text(), re.M)
    citation, changelog = (root / "CITATION.cff").read_text(), (root / "CHANGELOG.md").read_text()
    assert re.findall(r"^version: (.+)$", citation, re.M) == [version]
    headings = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", changelog, re.M)
    assert headings[0] == ("Unreleased", "")
    assert headings[1][0] == version
    assert re.findall(r"^date-released: (.+)$", citation, re.M) == [headings[1][1]]
    assert all(date for _, date in headings[1:])
    links = re.findall(r"^\[(.+)\]: https://github\.com/", changelog, re.M)
    assert links == [name for name, _ in headings]
    assert changelog.count(f"compare/v{version}...main") == 1


def toolkit(
    home: Path, version: str = "13.0", archs: str = "75 80 86 90 100", rest: str = ""
) -> Path:
    """A folder like a CUDA toolkit. `rest` is run when its nvcc compiles."""
    nvcc = home / "bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        f"""#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {version}, V{version}.88";;
--list-gpu-arch) for arch in {archs}; do echo compute_$arch; done;;
--dryrun) echo "#$ _HERE_={nvcc.parent}" >&2;;
*) {rest or "exit 1"};;
esac
"""
    )
    nvcc.chmod(0o755)
    (home / "include").mkdir()
    for header in cuda_toolkit.LIBRARY_HEADERS:
        (home / "include" / header).touch()
    return home


@pytest.fixture
def no_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine without CUDA, with no variable set."""
    for name in ("CUDA", "SANITIZE"):
        monkeypatch.setenv(f"FUSEDRNN_{name}", "")
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(cuda_toolkit, "DEFAULT_HOME", tmp_path / "default")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return monkeypatch


REASONS = {
    "cpu torch": "torch 2.13.0 is no CUDA build: install one that is, then build again",
    "no toolkit": (
        "there is no nvcc in CUDA_HOME, in {0}/default or on PATH: install CUDA 13.0's toolkit "
        "(from NVIDIA's repository: apt-get install cuda-toolkit-13-0) and set CUDA_HOME to its "
        "root"
    ),
    "wrong home": (
        "{0}/none, which CUDA_HOME or CUDA_PATH names, has no bin/nvcc: set CUDA_HOME to the root "
        "of a CUDA toolkit, or unset both"
    ),
    "another major": (
        "{0}/default is CUDA 12.8 and torch 2.13.0 is built for 13.0: install CUDA 13.0's toolkit "
        "(from NVIDIA's repository: apt-get install cuda-toolkit-13-0) and set CUDA_HOME to its "
        "root"
    ),
    "too old": (
        "{0}/default is CUDA 12.0 and the kernels need 12.1 or later: install a later toolkit and "
        "set CUDA_HOME to its root"
    ),
    "no release": "{0}/default/bin/nvcc --version tells no release, but 'broken': reinstall it",
    "sanitizers": "FUSEDRNN_SANITIZE=1 is for the CPU's kernels alone: unset it for CUDA",
}


@pytest.mark.parametrize("setting", ["", "1"])
@pytest.mark.parametrize("case", REASONS)
def test_cuda_cannot_be_built(
    case: str,
    setting: str,
    tmp_path: Path,
    no_cuda: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reason = REASONS[case].format(tmp_path)
    if case == "wrong home":
        no_cuda.setenv("CUDA_HOME", str(tmp_path / "none"))
    if case == "another major":
        toolkit(tmp_path / "default", version="12.8")
    if case == "too old":
        toolkit(tmp_path / "default", version="12.0")
    if case == "no release":
        (toolkit(tmp_path / "default") / "bin/nvcc").write_text("#!/bin/sh\necho broken\n")
    if case == "sanitizers":
        toolkit(tmp_path / "default")
        no_cuda.setenv("FUSEDRNN_SANITIZE", "1")
    no_cuda.setenv("FUSEDRNN_CUDA", setting)
    torch_cuda = None if case == "cpu torch" else "13.0"
    if setting:
        with pytest.raises(SystemExit) as error:
            cuda_toolkit.find("2.13.0", torch_cuda)
        assert str(error.value) == f"FUSEDRNN_CUDA=1, but {reason}"
    else:
        assert cuda_toolkit.find("2.13.0", torch_cuda) is None
        assert capsys.readouterr().out == f"fusedrnn is built for the CPU only: {reason}\n"


def test_cuda_setting(tmp_path: Path, no_cuda: pytest.MonkeyPatch) -> None:
    toolkit(tmp_path / "default")
    no_cuda.setenv("FUSEDRNN_CUDA", "0")
    assert cuda_toolkit.find("2.13.0", "13.0") is None
    no_cuda.setenv("FUSEDRNN_CUDA", "yes")
    with pytest.raises(SystemExit, match=r"^FUSEDRNN_CUDA=yes is neither 1 .* nor 0 .*: unset it"):
        cuda_toolkit.find("2.13.0", "13.0")


@pytest.mark.parametrize("place", ["CUDA_HOME", "CUDA_PATH", "default", "PATH"])
def test_cuda_toolkit(place: str, tmp_path: Path, no_cuda: pytest.MonkeyPatch) -> None:
    home = toolkit(tmp_path / ("default" if place == "default" else "cuda"))
    if place.startswith("CUDA"):
        no_cuda.setenv(place, str(home))
    if place == "PATH":  # a script calling nvcc in another folder
        wrapper = tmp_path / "local/bin/nvcc"
        wrapper.parent.mkdir(parents=True)
        wrapper.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
        wrapper.chmod(0o755)
        no_cuda.setattr(shutil, "which", lambda name: str(wrapper))
    found = cuda_toolkit.find("2.13.0", "13.2")
    archs = ["sm_80", "sm_90", "sm_100", "compute_100"]
    assert found == cuda_toolkit.Toolkit(home, "13.0", archs)
    assert os.environ["CUDA_HOME"] == str(home)  # torch reads it
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0;10.0+PTX"


@pytest.mark.parametrize(
    ("asked", "archs"),
    [
        ("", ["sm_80", "sm_90", "compute_90"]),  # the defaults known to the toolkit
        ("native", ["sm_80", "sm_90", "compute_90"]),
        ("8.0 9.0a+PTX", ["sm_80", "sm_90a", "compute_90a"]),
        ("Ampere;Hopper", ["sm_80", "sm_86", "compute_86", "sm_90", "compute_90"]),
        ("10.0+PTX", "CUDA 12.6 in {0} has no arch 10.0: "),
        ("8.0;12.0a;12.1", "CUDA 12.6 in {0} has no arch 12.0, 12.1: "),
        ("Turing", "the CUDA kernels need an arch of 8.0 or later, not 7.5: "),
        ("8.0;", "TORCH_CUDA_ARCH_LIST=8.0;: Unknown CUDA arch () or GPU not supported: "),
        ("sm_80", "TORCH_CUDA_ARCH_LIST=sm_80: Unknown CUDA arch (sm_80) or GPU not supported: "),
    ],
)
def test_cuda_archs(
    asked: str, archs: list[str] | str, tmp_path: Path, no_cuda: pytest.MonkeyPatch
) -> None:
    home = toolkit(tmp_path / "default", version="12.6", archs="75 80 86 90")
    no_cuda.setenv("TORCH_CUDA_ARCH_LIST", asked)
    if isinstance(archs, list):
        assert cuda_toolkit.find_archs(home, "12.6") == archs
    else:  # also without FUSEDRNN_CUDA=1
        with pytest.raises(SystemExit) as error:
            cuda_toolkit.find("2.13.0", "12.6")
        mend = "set TORCH_CUDA_ARCH_LIST to some of 8.0;8.6;9.0, +PTX behind the last"
        old = ", or FUSEDRNN_CUDA=0 to build for the CPU only" if "need an arch" in archs else ""
        assert str(error.value) == archs.format(home) + mend + old


def test_cuda_archs_of_the_gpus_here(tmp_path: Path, no_cuda: pytest.MonkeyPatch) -> None:
    gpus = [(9, 0), (8, 6)]
    no_cuda.setattr(torch.cuda, "is_available", lambda: True)
    no_cuda.setattr(torch.cuda, "device_count", lambda: len(gpus))
    no_cuda.setattr(torch.cuda, "get_device_capability", lambda i: gpus[i])
    no_cuda.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_120"])
    found = cuda_toolkit.find_archs(toolkit(tmp_path), "13.0")
    assert found == ["sm_86", "sm_90", "compute_90"]


def test_cuda_with_a_gpu_that_is_too_old(
    tmp_path: Path, no_cuda: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = toolkit(tmp_path / "default")
    no_cuda.setattr(torch.cuda, "is_available", lambda: True)
    no_cuda.setattr(torch.cuda, "device_count", lambda: 2)
    no_cuda.setattr(torch.cuda, "get_device_capability", lambda i: [(8, 0), (7, 5)][i])
    assert cuda_toolkit.find("2.13.0", "13.0") is None
    assert capsys.readouterr().out == (
        "fusedrnn is built for the CPU only: a GPU here has compute capability 7.5 and the kernels "
        "need 8.0: set TORCH_CUDA_ARCH_LIST to build for others\n"
    )
    no_cuda.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    found = cuda_toolkit.find("2.13.0", "13.0")
    assert found == cuda_toolkit.Toolkit(home, "13.0", ["sm_80"])


# CUDA's header folders in the wheels required by torch.
WHEELS = {
    "13.0": {"cu13": ["cublas_v2.h", "cusparse.h", "cusolverDn.h", "cuda_runtime.h"]},
    "12.8": {
        "cublas": ["cublas_v2.h"],
        "cusparse": ["cusparse.h"],
        "cusolver": ["cusolverDn.h"],
        "cuda_runtime": ["cuda_runtime.h"],
    },
}


@pytest.mark.parametrize("version", WHEELS)
def test_cuda_libraries_headers(version: str, tmp_path: Path, no_cuda: pytest.MonkeyPatch) -> None:
    """Each library's headers come from the toolkit, or else from torch's wheels."""
    home = toolkit(tmp_path / "default", version)
    for header in cuda_toolkit.LIBRARY_HEADERS:
        (home / "include" / header).unlink()
    no_cuda.setattr(torch, "__file__", str(tmp_path / "site/torch/__init__.py"))
    no_cuda.setenv("FUSEDRNN_CUDA", "1")
    # A wheel of another CUDA, which must not be used.
    other = tmp_path / "site/nvidia" / ("cublas" if version == "13.0" else "cu13") / "include"
    other.mkdir(parents=True)
    (other / "cublas_v2.h").touch()
    wheels = {
        tmp_path / "site/nvidia" / name / "include": headers
        for name, headers in WHEELS[version].items()
    }
    for header in cuda_toolkit.LIBRARY_HEADERS:  # adds one wheel after the other
        with pytest.raises(SystemExit, match=rf"default has no {header}: install the whole") as e:
            cuda_toolkit.find("2.13.0", version)
        names = "nvidia-cublas-cu12 nvidia" if version == "12.8" else "nvidia-cublas nvidia"
        assert f"or pip install {names}" in str(e.value)
        for folder, headers in wheels.items():
            if header in headers:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / header).touch()
    found = cuda_toolkit.find("2.13.0", version)
    assert found is not None
    wanted = [f for f, names in wheels.items() if {*names} & {*cuda_toolkit.LIBRARY_HEADERS}]
    assert list(found.libraries) == wanted
    # The toolkit's headers come first.
    (home / "include/cusparse.h").touch()
    found = cuda_toolkit.find("2.13.0", version)
    assert found is not None
    assert list(found.libraries) == [f for f in wanted if f.parent.name != "cusparse"]


# nvcc 13.0's -Xptxas -v output, with spills added to the second kernel and the function.
PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8fusedrnn4cuda3runINS0_4StepINS0_4LstmEfLNS0_4ModeE1E\
Li64EEEEEvT_' for 'sm_90a'
ptxas info    : Function properties for _ZN8fusedrnn4cuda3runINS0_4StepINS0_4LstmEfLNS0_4ModeE1ELi\
64EEEEEvT_
    80 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 28 registers, used 1 barriers, 80 bytes cumulative stack size, 256 bytes smem
ptxas info    : Compile time = 2.941 ms
ptxas info    : Compiling entry function '_ZN8fusedrnn4cuda3runINS0_5SpillIfEEEEvT_' for 'sm_90a'
ptxas info    : Function properties for _ZN8fusedrnn4cuda3runINS0_5SpillIfEEEEvT_
    800 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 800 bytes cumulative stack size
ptxas info    : Compile time = 453.375 ms
ptxas info    : Function properties for _ZN8fusedrnn4cuda6helperEfi
    0 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
"""
KERNELS = [
    Kernel("Spill<float>", "sm_90a", 255, 8, 16, 800, 0),
    Kernel("Step<Lstm, float, (Mode)1, 64>", "sm_90a", 28, 0, 0, 80, 256),
    Kernel("helper(float, int)", "sm_90a", None, 4, 0, 0, 0),
]


def check(
    argv: list[str], compiling: str, tmp_path: Path, no_cuda: pytest.MonkeyPatch
) -> tuple[int, Path]:
    """Runs cuda_check on one source; its nvcc prints PTXAS."""
    (tmp_path / "ptxas.txt").write_text(PTXAS)
    (tmp_path / "csrc/cuda").mkdir(parents=True)
    (tmp_path / "csrc/cuda/step.cu").touch()
    toolkit(tmp_path / "default", rest=f"cat {tmp_path}/ptxas.txt >&2; {compiling}")
    no_cuda.setattr(cuda_check, "ROOT", tmp_path)
    output = tmp_path / "ptxas.md"
    no_cuda.setattr(sys, "argv", ["cuda_check.py", "--output", str(output), *argv])
    return cuda_check.main(), output


def test_cuda_check(
    tmp_path: Path, no_cuda: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, output = check(["--arch", "sm_90a"], "true", tmp_path, no_cuda)
    assert status == 1
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("FAILED")] == [
        "FAILED Spill<float> for sm_90a: 8 bytes of spill stores and 16 of loads, over 0",
        "FAILED helper(float, int) for sm_90a: 4 bytes of spill stores and 0 of loads, over 0",
    ]
    table = cuda_check.table(KERNELS)
    assert "| `Step<Lstm, float, (Mode)1, 64>` | sm_90a | 28 | 0 | 0 | 80 | 256 |\n" in table
    assert table in printed
    assert output.read_text().endswith(table)


def test_cuda_check_budgets(
    tmp_path: Path, no_cuda: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    budgets = {"Spill": cuda_check.Budget(spill=16), "helper(float, int)": cuda_check.Budget(0, 4)}
    no_cuda.setattr(cuda_check, "BUDGETS", budgets)
    assert check(["--arch", "sm_90a"], "true", tmp_path, no_cuda)[0] == 0
    assert "FAILED" not in capsys.readouterr().out
    budgets["Step"] = cuda_check.Budget(registers=27)
    assert cuda_check.problems(KERNELS[1]) == [
        "Step<Lstm, float, (Mode)1, 64> for sm_90a: 28 registers, over 27"
    ]


def test_cuda_check_of_a_file_that_does_not_compile(
    tmp_path: Path, no_cuda: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check([], "echo 'error: no such thing'; exit 1", tmp_path, no_cuda)[0] == 1
    printed = capsys.readouterr().out
    assert "error: no such thing" in printed
    for arch in cuda_check.ARCHS:
        assert f"FAILED csrc/cuda/step.cu for {arch}: nvcc warns or fails\n" in printed


def test_cuda_check_without_nvcc(
    no_cuda: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_cuda.setattr(sys, "argv", ["cuda_check.py"])
    assert cuda_check.main() == 1
    assert capsys.readouterr().out == (
        "the CUDA kernels can't be checked: there is no nvcc: set CUDA_HOME to a CUDA toolkit's "
        "root\n"
    )
