"""`make docs`: the API reference and the pages of this folder as HTML, in the folder given."""

from __future__ import annotations

import os
import re
import sys
import types
import warnings
from importlib.machinery import ModuleSpec
from pathlib import Path

import pdoc
import pdoc.doc

import fusedrnn

HERE = Path(__file__).parent


def page(path: Path) -> str:
    """Makes a page a module, which is what pdoc renders: its docstring is the page."""
    text = re.sub(r"\((\w+)\.md\)", r"(\1.html)", path.read_text())
    spec = ModuleSpec(path.stem, None)
    module = types.ModuleType(path.stem, text)
    module.__spec__ = spec
    module.__all__ = []  # type: ignore[attr-defined]
    sys.modules[path.stem] = module
    return path.stem


def undocumented(module: pdoc.doc.Module) -> list[str]:
    """The public classes, functions and modules without a docstring."""
    members = [module, *module.flattened_own_members, *module.submodules]
    return sorted(
        {
            m.fullname
            for m in members
            if not (m.docstring or isinstance(m, pdoc.doc.Variable) or m.name.startswith("_"))
        }
    )


def main() -> int:
    """Writes the HTML; 1 if a docstring is missing. Warnings are errors."""
    output = Path(sys.argv[1]).resolve()
    os.chdir(HERE)  # where no folder has the name of a module, which pdoc would warn of
    warnings.simplefilter("error")
    missing = [
        name
        for module in (fusedrnn, fusedrnn.functional)
        for name in undocumented(pdoc.doc.Module(module))
    ]
    for name in missing:
        print(f"{name} has no docstring")
    for name in fusedrnn.__all__:
        member = getattr(fusedrnn, name)
        if isinstance(member, type) and member.__init__.__module__.startswith("fusedrnn"):
            # Without a docstring pdoc takes nn.Module's.
            member.__init__.__doc__ = "Arguments: see the class."
    pages = [page(path) for path in sorted(HERE.glob("*.md"))]
    pdoc.render.configure(docformat="google", footer_text=f"fusedrnn {fusedrnn.__version__}")
    pdoc.pdoc("fusedrnn", *pages, output_directory=output)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
