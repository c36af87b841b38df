"""Parse YAML that a user wrote: numbers as YAML 1.2 has them, and no key twice."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Parse ``1e-3`` as a number, as YAML 1.2 does, and refuse a key that stands twice in one mapping.

    PyYAML's own loaders return a string for the number, and the last of the key's values.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        # Runs before PyYAML merges the keys of `<<: *other` in, which the mapping's own keys may override.
        lines: dict[Hashable, int] = {}
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # PyYAML refuses it
            line = key_node.start_mark.line + 1
            if key in lines:
                where = f"line {lines[key]} and again in line {line}" if lines[key] != line else f"line {line} twice"
                raise ValueError(f"the key {key!r} stands in {where}: keep one of them")
            lines[key] = line
        return super().construct_mapping(node, deep)


_MERGE = "tag:yaml.org,2002:merge"
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """Parse a YAML document; None for an empty one.

    Raises:
        ValueError: it is not valid YAML, is nested too deeply, or has a key twice in one mapping; one line says where.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError("not valid YAML: nested too deeply") from None
    except (TypeError, LookupError, OverflowError, AttributeError) as error:  # PyYAML's, of values such as 2024-99-99
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None
