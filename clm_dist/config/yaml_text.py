"""YAML as job files have it: data alone, and what is written reads back as the same.

PyYAML reads `1e5` as text and writes the text `1e5` without quotes, as YAML 1.1 has it. Here, as in YAML 1.2, that is a
number; the reader and the writer share one table of what a plain word means, so the writer quotes what needs it. There
are no dates, no interpolations and no tags of Python: `$` is a character.
"""

import re
from typing import Any

import yaml

MOST_VALUES = 100_000
"""Values of a file, with those that its aliases repeat."""
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
_NOT_READ = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float")


class _Words:
    """The table of what a plain word means, for the reader and the writer."""

    yaml_implicit_resolvers = {  # PyYAML's own attribute
        first: [(tag, pattern) for tag, pattern in patterns if tag not in _NOT_READ]
        for first, patterns in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Loader(_Words, yaml.SafeLoader):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (AttributeError, IndexError, KeyError):  # from PyYAML, where a written tag does not fit its value
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            problem = f"found a value that {tag} does not fit"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"found duplicate key {key.value}", key.start_mark)
            seen.add(key.value)
        return dict(super().construct_mapping(node, deep))


class Dumper(_Words, yaml.SafeDumper):
    """Writes texts so that YAML 1.1 and 1.2 read them as texts."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def represent_text(dumper: yaml.SafeDumper, text: str, style: str | None = None) -> yaml.ScalarNode:
    """A text in a style, or in one that keeps it: a next-line character is a line break in all but one."""
    breaks = any(character in text for character in "\x85\u2028\u2029")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if breaks else style)


Dumper.add_representer(str, represent_text)
for _kind in (_Loader, Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def compose(text: str) -> yaml.Node | None:
    """The nodes of a document; None where it has none.

    Raises:
        yaml.YAMLError: it is not YAML, or larger than `MOST_VALUES` with its aliases filled in.
    """
    node: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    if node is not None and _num_values(node, {}) > MOST_VALUES:
        raise yaml.YAMLError(f"it has more than {MOST_VALUES:,} values, with those that aliases repeat")
    return node


def load(text: str) -> Any:
    """The value of a document. Raises yaml.YAMLError, and ValueError for numbers that Python does not read."""
    return yaml.load(text, Loader=_Loader)  # of our own, and safe


def dump(value: Any) -> str:
    """A document that `load` reads back as the same value."""
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def _num_values(node: yaml.Node, known: dict[int, int]) -> int:
    """The values in a node, each as often as it is repeated."""
    if id(node) not in known:
        # Of an alias inside of itself.
        known[id(node)] = MOST_VALUES
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = [child for pair in children for child in pair] if isinstance(node, yaml.MappingNode) else children
        known[id(node)] = 1 + sum(_num_values(child, known) for child in pairs)
    return known[id(node)]
