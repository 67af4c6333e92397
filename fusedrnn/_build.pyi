# The module that setup.py writes beside the binary, for type checkers that run before a build.
torch_version: str
cuda: str | None
cuda_archs: list[str]
