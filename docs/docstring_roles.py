"""Turn the roles of docstrings, as in ``:func:`anyflow.ops.gelu```, into links of the site."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`(~?)([\w.]+)`")


def _link(match: re.Match[str]) -> str:
    short, path = match.groups()
    name = path.rsplit(".", 1)[-1] if short or path.startswith("anyflow.") else path
    # the module of an operator has its name
    path = re.sub(r"^(anyflow\.ops)\.([a-z_]+)$", r"\1.\2.\2", path)
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'


class DocstringRoles(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Replace roles by links, and the double colon before a literal block by one."""
        if obj.docstring is not None:
            text = ROLE.sub(_link, obj.docstring.value)
            obj.docstring.value = re.sub(r"::(\s*\n\s*\n)", r":\1", text)
