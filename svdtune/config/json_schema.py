"""The schema as JSON schema, so that editors complete and check a YAML while it is written."""

from __future__ import annotations

import ast
import inspect
from typing import Any

from svdtune.config import schema


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a config file; descriptions are the docstrings of `schema.py`."""
    from pydantic import TypeAdapter

    result = TypeAdapter(schema.Config).json_schema()
    documents = _docstrings()
    for name, definition in {**result["$defs"], "Config": result}.items():
        definition["additionalProperties"] = False
        for option, property_ in definition["properties"].items():
            if text := documents.get((name, option)):
                property_["description"] = text
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **result}


def _docstrings() -> dict[tuple[str, str], str]:
    """The string below each annotated field of `schema.py`, by (class, field); Python itself throws them away."""
    found = {}
    for class_node in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(class_node, ast.ClassDef):
            continue
        for field, text in zip(class_node.body, class_node.body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(document))):
                    found[class_node.name, name] = inspect.cleandoc(document)
    return found
