"""`python -m training`: the commands, each with the first line of its documentation."""

import ast
from pathlib import Path

for path in sorted((Path(__file__).parent / "commands").glob("*.py")):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
        first, *_ = (ast.get_docstring(tree) or "").splitlines()
        print(f"    {path.stem:<12}{first}")
print("\npython -m training.COMMAND --help has the options of each.")
