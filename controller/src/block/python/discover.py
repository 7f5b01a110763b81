"""Lists the classes of a Python file that can be run as blocks, without running any of it.

Prints one JSON object: `classes`, each with `name`, `hidden`, `open` (it inherits from a class of another file, whose
methods are not known here) and `methods`; or `error` with `line` and `message`.
"""

import ast
import json
import sys

MARKS = (":millstream: hidden", ":avocado: disable")
KNOWN_BASES = {"object", "TestCase", "Test", "IsolatedAsyncioTestCase"}


def main(path):
    try:
        with open(path, "rb") as file:
            tree = ast.parse(file.read(), path)
    except SyntaxError as error:
        return {"error": {"line": error.lineno or 0, "message": error.msg}}
    except ValueError as error:
        return {"error": {"line": 0, "message": str(error)}}
    classes = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            classes[node.name] = describe(node, classes)
    return {"classes": [found for found in classes.values() if found["methods"] or found["open"]]}


def describe(node, classes):
    """A class may only inherit from one above it, so that those are known already."""
    methods, is_open = [], False
    for base in node.bases:
        name = base.id if isinstance(base, ast.Name) else getattr(base, "attr", "")
        if isinstance(base, ast.Name) and name in classes:
            methods += classes[name]["methods"]
            is_open = is_open or classes[name]["open"]
        elif name not in KNOWN_BASES:
            is_open = True
    for item in node.body:
        if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)) and item.name.startswith("test"):
            methods.append(item.name)
    documentation = ast.get_docstring(node) or ""
    return {
        "name": node.name,
        "hidden": any(mark in documentation for mark in MARKS),
        "open": is_open,
        "methods": list(dict.fromkeys(methods)),
    }


print(json.dumps(main(sys.argv[1])))
