"""A stage as text that reads like Python."""

from __future__ import annotations

from optcpu.inspection.model import Node, Stage

_COMMENT_COLUMN = 72


def text_of(stage: Stage) -> str:
    """All nodes, one a line, each with its type and the user's line it comes from."""
    return "\n".join([f"# {stage.name}: {len(stage)} nodes", *lines_of(stage)])


def lines_of(stage: Stage) -> list[str]:
    """One line for each node: ``y: bf16[8, 4] = aten.relu(x)  # model.py:12 F.relu(self.fc(x))``."""
    return [_line(node) for node in stage.nodes]


def _line(node: Node) -> str:
    statement = statement_of(node)
    comment = comment_of(node)
    return f"{statement:<{_COMMENT_COLUMN}}  # {comment}" if comment else statement


def statement_of(node: Node) -> str:
    """The node without its comment."""
    if node.operator == "return":
        return f"return {node.arguments}"
    result = f"{node.name}: {node.type}" if node.values else node.name
    if node.operator == "input":
        return f"{result} = input"
    if node.operator == "attribute":
        return f"{result} = self.{node.arguments}"
    if node.operator == "getitem":
        source, _, key = node.arguments.partition(", ")
        return f"{result} = {source}[{key}]"
    return f"{result} = {node.operator}({node.arguments})"


def comment_of(node: Node) -> str:
    """Where the node comes from, in the user's words; empty if that is unknown."""
    if node.label:
        return node.label
    parts = [str(node.source)] if node.source is not None else []
    if node.module:
        parts.append(f"[{node.module}]")
    return "  ".join(parts)
