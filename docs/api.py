"""Build the API's pages from the docstrings: python docs/api.py FOLDER. Every warning ends it."""

import sys
import warnings
from pathlib import Path

# Public beside what `fastfuse.__all__` names. The kernels behind `fastfuse.functional` have READMEs of their own.
MODULES = ("losses", "nn", "methods", "data", "config", "errors", "info", "testing")


def build(folder: Path) -> None:
    """Write the pages of the public modules into a folder, `index.html` first.

    Raises:
        Warning: a docstring, annotation or name that pdoc complains about.
    """
    import pdoc
    import pdoc.doc_ast
    import torch

    import fastfuse

    warnings.simplefilter("error")
    # Would stand at every module of ours, and says nothing about it; pdoc looks in the source as well, once.
    torch.nn.Module.__init__.__doc__ = None
    pdoc.doc_ast.walk_tree(torch.nn.Module).func_docstrings.pop("__init__")
    # Its public names load when first used; pdoc looks for them where they will then be.
    for name in fastfuse.__all__:
        vars(fastfuse)[name] = getattr(fastfuse, name)
    pdoc.render.configure(docformat="google", show_source=False)
    named = [f"fastfuse.{name}" for name in MODULES]
    pdoc.pdoc("fastfuse", *named, "!fastfuse.models._blocks", output_directory=folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
