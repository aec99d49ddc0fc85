"""Measure the code of this repository: sizes, line lengths, docstrings, repeated names, signatures.

``python tools/measure_code.py`` prints one table; ``--names`` lists what stands behind it.
``tests/test_code.py`` holds the limits.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = (".py", ".cpp", ".h", ".cu", ".cuh")
AREAS = {
    "product": ("anyflow/", "kernels/", "csrc/"),
    "tests": ("tests/",),
    "benchmarks": ("benchmarks/",),
}
MAX_COLUMNS = 100
PRAGMA = re.compile(r"  # (noqa|type: ignore|fmt:).*$")  # not counted, as ruff does
# Openings that say what something is rather than what it does.
NO_OPENINGS = {"Of", "As", "What", "Whether", "Why", "How", "There", "Where", "Which"}
# Imperative forms with which docstrings of this repository begin.
VERBS = set((ROOT / "tools" / "verbs.txt").read_text(encoding="utf-8").split())


@dataclass(frozen=True)
class Docstring:
    """Hold where a docstring stands and its first line."""

    place: str
    first_line: str
    public: bool

    def opening(self) -> str:
        """Return the first word, without punctuation."""
        return re.split(r"[\s,.:;(]", self.first_line, maxsplit=1)[0]

    def begins_with_verb(self) -> bool:
        """Tell whether the first word is one of :data:`VERBS`, as an imperative or with an s."""
        word = self.opening().lower()
        return word in VERBS or word.removesuffix("s") in VERBS or word.removesuffix("es") in VERBS


@dataclass
class AreaSize:
    """Count the lines of an area."""

    lines: int = 0
    characters: int = 0
    too_long: int = 0
    comments: int = 0


@dataclass
class Measured:
    """Hold what :func:`measure` found."""

    sizes: dict[str, AreaSize] = field(default_factory=dict)
    docstrings: list[Docstring] = field(default_factory=list)
    classes: dict[str, list[str]] = field(default_factory=dict)
    long_files: dict[str, int] = field(default_factory=dict)
    long_functions: dict[str, int] = field(default_factory=dict)
    signatures: dict[str, int] = field(default_factory=dict)

    def repeated_classes(self) -> dict[str, list[str]]:
        """Return the classes that more than one file defines, with these files."""
        return {name: places for name, places in self.classes.items() if len(places) > 1}

    def verb_share(self) -> float:
        """Return the share of public docstrings that begin with a verb."""
        public = [d for d in self.docstrings if d.public]
        return sum(d.begins_with_verb() for d in public) / len(public)


def source_files() -> list[str]:
    """List the tracked source files, relative to the root of the repository."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [f for f in listed.stdout.splitlines() if f.endswith(LANGUAGES) and (ROOT / f).is_file()]


def area(path: str) -> str | None:
    """Return the area of a file, or None for one outside of all of them."""
    return next((name for name, heads in AREAS.items() if path.startswith(heads)), None)


def measure() -> Measured:
    """Read every source file once and count."""
    found = Measured({name: AreaSize() for name in AREAS})
    classes: dict[str, list[str]] = defaultdict(list)
    for path in source_files():
        where = area(path)
        if where is None:
            continue
        text = (ROOT / path).read_text(encoding="utf-8")
        lines = text.splitlines()
        size = found.sizes[where]
        size.lines += len(lines)
        size.characters += sum(map(len, lines))
        size.too_long += sum(len(PRAGMA.sub("", line)) > MAX_COLUMNS for line in lines)
        size.comments += sum(line.lstrip().startswith(("# ", "// ")) for line in lines)
        found.long_files[path] = len(lines)
        if not path.endswith(".py"):
            continue
        tree = ast.parse(text)
        if where == "product":
            found.docstrings += _docstrings(path, tree)
        if where != "tests":
            for node in tree.body:
                if isinstance(node, ast.ClassDef):
                    classes[node.name].append(path)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                found.long_functions[f"{path}:{node.lineno} {node.name}"] = length
    found.classes = dict(classes)
    found.signatures = {op: _signatures(op) for op in operators()}
    return found


def operators() -> list[str]:
    """List the fused operators: those that have a C++ file of their own name."""
    names = (p.stem for p in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    return sorted(name for name in names if (ROOT / "anyflow" / "ops" / f"{name}.py").is_file())


def _docstrings(path: str, tree: ast.Module) -> Iterator[Docstring]:
    def walk(node: ast.AST, name: str, public: bool) -> Iterator[Docstring]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield Docstring(f"{path} {name}", text.splitlines()[0], public)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                inside = f"{name}.{child.name}" if name else child.name
                yield from walk(child, inside, public and not child.name.startswith("_"))

    return walk(tree, "", True)


def _signatures(op: str) -> int:
    """Count the parameter lists with several tensors that state an operator's arguments."""
    count = 0
    for folder in ("anyflow/ops", "kernels"):
        path = ROOT / folder / f"{op}.py"
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        count += len(re.findall(r'"\(Tensor ', text))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Lambda):
                count += len(node.args.args) >= 2
            elif isinstance(node, ast.FunctionDef) and not _is_kernel(node):
                tensors = (a.annotation for a in node.args.args + node.args.kwonlyargs)
                names = [ast.unparse(t) for t in tensors if t is not None]
                count += sum("Tensor" in name for name in names) >= 2
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".cpp", ".h"):
            text = path.read_text(encoding="utf-8")
            for head in re.findall(rf"\b\w*{op}\w*\s*\(([^()]*)\)", text):
                count += len(re.findall(r"\bTensor\b", head)) >= 2
    return count


def _is_kernel(node: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(d) for d in node.decorator_list)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", action="store_true", help="list what stands behind the numbers")
    options = parser.parse_args()
    found = measure()
    for name, size in found.sizes.items():
        print(
            f"{name:11} {size.lines:6} lines, {size.characters / size.lines:.1f} characters each, "
            f"{size.too_long} over {MAX_COLUMNS} columns, {size.comments / size.lines:.1%} comments"
        )
    public = [d for d in found.docstrings if d.public]
    print(f"public docstrings that begin with a verb: {found.verb_share():.0%} of {len(public)}")
    print(f"classes that two files define: {len(found.repeated_classes())}")
    long_files = {p: n for p, n in found.long_files.items() if n > 400}
    long_functions = {p: n for p, n in found.long_functions.items() if n > 60}
    print(f"files over 400 lines: {len(long_files)}; functions over 60: {len(long_functions)}")
    counts = ", ".join(f"{op} {n}" for op, n in found.signatures.items())
    print(f"signatures per operator: {counts}")
    if options.names:
        for name, places in sorted(found.repeated_classes().items()):
            print(f"  class {name}: {', '.join(places)}")
        for table in (long_files, long_functions):
            for place, count in sorted(table.items(), key=lambda item: -item[1]):
                print(f"  {count:4} {place}")
        for docstring in found.docstrings:
            if not docstring.begins_with_verb():
                print(f"  {docstring.place}: {docstring.first_line}")


if __name__ == "__main__":
    main()
