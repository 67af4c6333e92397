"""The API reference: links in signatures and docstrings, and a docstring for every public name."""

from __future__ import annotations

import re
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging

import fusedrnn

if TYPE_CHECKING:
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

LOG = logging.getLogger(__name__)
TORCH, PYTHON = "https://docs.pytorch.org/docs/stable", "https://docs.python.org/3/library"
# Pages of types in signatures. An intersphinx inventory would need a network.
ELSEWHERE = {
    "torch.Tensor": f"{TORCH}/tensors.html#torch.Tensor",
    "torch.device": f"{TORCH}/tensor_attributes.html#torch.device",
    "torch.dtype": f"{TORCH}/tensor_attributes.html#torch.dtype",
    "torch.nn.Module": f"{TORCH}/generated/torch.nn.Module.html",
    "torch.nn.utils.rnn.PackedSequence": (
        f"{TORCH}/generated/torch.nn.utils.rnn.PackedSequence.html"
    ),
    "collections.abc.Sequence": f"{PYTHON}/collections.abc.html#collections.abc.Sequence",
}


def public_names() -> dict[str, Any]:
    """Each public object that autodoc shall show, by its full name."""
    modules = {"fusedrnn": fusedrnn, "fusedrnn.functional": fusedrnn.functional}
    return {f"{m}.{name}": getattr(o, name) for m, o in modules.items() for name in o.__all__}


def undocumented(names: dict[str, Any]) -> list[str]:
    """The classes, functions, modules and public methods without a docstring of their own."""
    missing = []
    for name, member in names.items():
        if isinstance(member, (type, FunctionType, ModuleType)) and not member.__doc__:
            missing.append(name)
        for base in member.__mro__ if isinstance(member, type) else ():
            # A private base's methods are the class's own; nn.Module's are torch's to document.
            if base.__module__.startswith("fusedrnn"):
                missing += [
                    f"{name}.{key}"
                    for key, value in vars(base).items()
                    if isinstance(value, FunctionType)
                    and not (key.startswith("_") or value.__doc__)
                ]
    return sorted(set(missing))


def link_names(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Makes links of papers, of our classes and of torch's in a docstring."""
    text = "\n".join(lines)
    text = re.sub(
        r"(torch\.nn\.\w+)\s+\((https://docs\.pytorch\.org/[^)]+)\)", r"`\1 <\2>`__", text
    )
    text = re.sub(
        r"(?<![/\w])arXiv:(\d{4}\.\d{5})", r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", text
    )
    text = re.sub(
        r"(?<![\w.`])((?:Fused|Frozen)\w+)(\.forward)?\b",
        lambda m: f":py:{'meth' if m[2] else 'class'}:`{m[1]}{m[2] or ''} <fusedrnn.{m[0]}>`",
        text,
    )
    lines[:] = text.split("\n")


def simplify_signature(
    app: Sphinx,
    what: str,
    name: str,
    obj: Any,
    options: Any,
    arguments: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    """Shows a model's type variable as its bound, and no private constructor."""
    if name.startswith("fusedrnn.Frozen") and what == "class":
        return "", None

    def bound(text: str | None) -> str | None:
        return text and re.sub(r"[~\w.]*\bModel\b", "~torch.nn.Module", text)

    return bound(arguments), bound(returns)


def join_overloads(app: Sphinx) -> None:
    """One signature a method: that of its implementation, which has every argument."""
    for module in ("fusedrnn.modules", "fusedrnn.functional"):
        analyzer = ModuleAnalyzer.for_module(module)
        analyzer.analyze()
        analyzer.overloads = {}


def resolve_elsewhere(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element
) -> nodes.reference | None:
    """A link to the documentation of torch or Python."""
    address = ELSEWHERE.get(node["reftarget"]) if node.get("refdomain") == "py" else None
    return address and nodes.reference("", "", content, refuri=address, internal=False)


def check(app: Sphinx, env: BuildEnvironment) -> None:
    """Warns of public names without a docstring or a place in the reference."""
    names = public_names()
    for name in undocumented(names):
        LOG.warning("%s has no docstring", name)
    if "api" not in env.found_docs:
        return
    known = {o[0] for o in env.domains["py"].get_objects()}
    for name in sorted(names.keys() - known):
        LOG.warning("%s is not in the API reference", name)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("builder-inited", join_overloads)
    app.connect("autodoc-process-docstring", link_names, priority=400)
    app.connect("autodoc-process-signature", simplify_signature)
    app.connect("missing-reference", resolve_elsewhere)
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
