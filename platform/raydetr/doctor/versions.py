"""Whether all nodes have the same versions, of the code too."""

from collections.abc import Iterator, Sequence
from typing import Any

from raydetr.doctor import on_node
from raydetr.doctor.findings import Finding
from raydetr.doctor.nodes import Node, on_each

FULL = 0.95
"""Ray stops writing to a disk that is fuller."""

SAME_CODE = (
    "start the node's Ray with PYTHONPATH=.:platform in an equal copy of the project, or submit the job with "
    "--runtime-env runtime_env.yaml, which takes this copy to every node."
)


def describe_nodes(nodes: Sequence[Node]) -> list[Any]:
    """`on_node.describe` of every node, or what went wrong there."""
    return on_each(nodes, on_node.describe, by_value=True)


def compare(nodes: Sequence[Node], described: Sequence[Any]) -> Iterator[Finding]:
    """Each node against the first one, this process's.

    Args:
        nodes: of the cluster.
        described: what `describe_nodes` returned.
    """
    reference = described[0]
    failed = False
    for node, found in zip(nodes, described, strict=True):
        if isinstance(found, Exception):
            failed = True
            yield Finding(
                "versions",
                "FAIL",
                f"node {node.name} cannot be asked: {found}",
                "look at that node's Ray logs.",
            )
            continue
        free, size = found["temporary"]
        if free < (1 - FULL) * size:
            yield Finding(
                "disk",
                "warn",
                f"node {node.name}: {free / 2**30:.1f} of {size / 2**30:.0f} GiB are free where Ray keeps its files.",
                "make room there: past 95 % Ray writes nothing more to it.",
            )
        if isinstance(reference, Exception):
            continue
        for finding in _differences(node, found, reference):
            failed = True
            yield finding
    if not failed:
        versions = ", ".join(f"{name} {reference['versions'][name]}" for name in ("python", "torch", "ray"))
        files = sum(len(code["files"]) for code in reference["code"].values())
        where = "this node" if len(nodes) == 1 else f"all {len(nodes)} nodes"
        yield Finding("versions", "ok", f"{where}: {versions}, the same {files} files of detr and raydetr.")


def _differences(node: Node, found: dict[str, Any], reference: dict[str, Any]) -> Iterator[Finding]:
    versions = [
        f"{name} {found['versions'][name]} instead of {version}"
        for name, version in reference["versions"].items()
        if found["versions"][name] != version
    ]
    if versions:
        yield Finding(
            "versions",
            "FAIL",
            f"node {node.name} has {', '.join(versions)}.",
            "install the same versions on every node (constraints.txt, or one image for all).",
        )
    for package, code in found["code"].items():
        if not code["files"]:
            yield Finding("code", "FAIL", f"node {node.name} cannot import {package}.", SAME_CODE)
            continue
        expected = reference["code"][package]["files"]
        names = sorted(
            name
            for name in expected.keys() | code["files"].keys()
            if expected.get(name) != code["files"].get(name)
        )
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            yield Finding(
                "code",
                "FAIL",
                f"node {node.name} has another version of {package}, in {code['root']}: {', '.join(names[:3])}{more} "
                f"differ{'s' * (len(names) == 1)} from {reference['code'][package]['root']}.",
                SAME_CODE,
            )
