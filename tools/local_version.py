"""The local version of a wheel, which names the torch that it was built against.

Environment: FUSEDRNN_LOCAL_VERSION=1 appends it to a wheel's version, as in 0.2.0+torch2.13.0cpu.
"""

import os


def local_version(torch_version: str, torch_cuda: str | None) -> str:
    """torch2.13.0cpu or torch2.13.0cu130: the binary loads with this torch alone.

    Args:
        torch_version: torch.__version__.
        torch_cuda: torch.version.cuda.
    """
    release = torch_version.partition("+")[0]
    device = "cpu" if torch_cuda is None else f"cu{torch_cuda.replace('.', '')}"
    return f"torch{release}{device}"


def requested(torch_version: str, torch_cuda: str | None, has_cuda_kernels: bool) -> str | None:
    """The local version if the environment asks for it; SystemExit if it would mislead."""
    setting = os.environ.get("FUSEDRNN_LOCAL_VERSION", "")
    if setting not in ("", "0", "1"):
        raise SystemExit(
            f"FUSEDRNN_LOCAL_VERSION={setting} is neither 1 (name the torch in a wheel's version) "
            "nor 0 (don't): unset it for the plain version"
        )
    if setting != "1":
        return None
    local = local_version(torch_version, torch_cuda)
    if torch_cuda is not None and not has_cuda_kernels:
        raise SystemExit(
            f"FUSEDRNN_LOCAL_VERSION=1 would name a wheel {local}, but the build has no CUDA "
            "kernels: set FUSEDRNN_CUDA=1 to see why, or install a CPU build of torch"
        )
    return local
