"""The `dualsm` command: `dualsm NAME ...` runs `dualsm.NAME`; without a name it lists all commands."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

USAGE = "usage: dualsm COMMAND --flag=value ...; every command has --help"


def commands() -> dict[str, str]:
    """Returns each command and the first line of its docstring, without importing the modules."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        source = path.read_text(encoding="utf-8")
        if '\nif __name__ == "__main__":' in source:
            found[path.stem] = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return found


def main() -> None:
    """Runs the command that the first argument names, exactly as `python -m dualsm.NAME` does."""
    known = commands()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in known:
        del sys.argv[1]
        runpy.run_module(f"dualsm.{name}", run_name="__main__", alter_sys=True)
    elif name in ("--help", "-h", "help"):
        width = max(map(len, known))
        print(USAGE + "\n")
        for command, purpose in known.items():
            print(f"  dualsm {command:<{width}}  {purpose}")
    else:
        print(f"error: unknown command {name!r}; choose one of: {', '.join(known)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
