"""Check that all nodes have the same code and package versions."""

from collections.abc import Iterator, Sequence

from raydetr.doctor import on_node
from raydetr.doctor.findings import Finding
from raydetr.doctor.nodes import Node, on_each
from raydetr.doctor.on_node import NodeDescription

FULL = 0.95
"""Ray stops writing to a disk that is fuller than this."""

SAME_CODE = (
    "start Ray on the node with PYTHONPATH=.:platform in an identical copy of the project, or submit the job with "
    "--runtime-env runtime_env.yaml, which uploads this copy to every node."
)


def describe_nodes(nodes: Sequence[Node]) -> list[NodeDescription | Exception]:
    """Run `on_node.describe` on every node; return its results or exceptions."""
    return on_each(nodes, on_node.describe, by_value=True)


def compare(nodes: Sequence[Node], described: Sequence[NodeDescription | Exception]) -> Iterator[Finding]:
    """Compare each node with the first one, which is the node of this process.

    Args:
        nodes: nodes of the cluster.
        described: results of `describe_nodes`.
    """
    reference = described[0]
    failed = False
    for node, description in zip(nodes, described, strict=True):
        if isinstance(description, Exception):
            failed = True
            yield Finding(
                "versions",
                "FAIL",
                f"node {node.name} did not answer: {description}",
                "check the Ray logs of that node.",
            )
            continue
        free, size = description["temporary"]
        if free < (1 - FULL) * size:
            yield Finding(
                "disk",
                "warn",
                f"node {node.name}: {free / 2**30:.1f} of {size / 2**30:.0f} GiB are free on the disk of Ray's files.",
                "free disk space there: Ray stops writing to a disk that is over 95 % full.",
            )
        if isinstance(reference, Exception):
            continue
        for finding in _differences(node, description, reference):
            failed = True
            yield finding
    if not failed and not isinstance(reference, Exception):
        versions = ", ".join(f"{name} {reference['versions'][name]}" for name in ("python", "torch", "ray"))
        files = sum(len(code["files"]) for code in reference["code"].values())
        where = "this node" if len(nodes) == 1 else f"all {len(nodes)} nodes"
        yield Finding("versions", "ok", f"{where}: {versions}, identical {files} files of detr and raydetr.")


def _differences(node: Node, description: NodeDescription, reference: NodeDescription) -> Iterator[Finding]:
    versions = [
        f"{name} {description['versions'][name]} instead of {version}"
        for name, version in reference["versions"].items()
        if description["versions"][name] != version
    ]
    if versions:
        yield Finding(
            "versions",
            "FAIL",
            f"node {node.name} has {', '.join(versions)}.",
            "install the same versions on every node (constraints.txt, or the same container image).",
        )
    for package, code in description["code"].items():
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
