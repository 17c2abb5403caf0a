"""`python -m trainkit.bench NAME [options]` runs a bench; without a name it lists them."""

import ast
import sys
from importlib import import_module
from pathlib import Path


def benches() -> dict[str, str]:
    """The modules of this folder with a `main(args)`, and the first line of each one's docstring."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def main(argv: list[str]) -> int:
    names = benches()
    if not argv:
        print("python -m trainkit.bench NAME [--help]")
        for name, line in names.items():
            print(f"  {name}  {line}")
        return 0
    if argv[0] not in names:
        print(f"there is no bench {argv[0]!r}; there are: {', '.join(names)}", file=sys.stderr)
        return 2
    import_module(f"trainkit.bench.{argv[0]}").main(argv[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
