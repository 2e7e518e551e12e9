"""The endpoint's page as a file. tests/browser/ tests its behavior."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from raydetr.serving.page import index

PAGE = index().decode()


class Reader(HTMLParser):
    """Collects the attributes of each element, and the text of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.feed(PAGE)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        tag = self.elements[-1][0] if self.elements else ""
        self.texts[tag] = self.texts.get(tag, "") + data


READER = Reader()


def test_the_page_loads_nothing_external() -> None:
    links = [
        value
        for _, attributes in READER.elements
        for name, value in attributes.items()
        if name in ("src", "href", "action", "srcset", "poster")
    ]
    assert sorted(str(link)[:9] for link in links) == ["data:imag", "openapi.j"]
    assert "url(" not in READER.texts["style"]
    assert "@import" not in READER.texts["style"]
    assert "http" not in READER.texts["script"].replace("without https there is no clipboard API", "")


def test_its_policy_allows_only_its_own_script_and_style() -> None:
    (policy,) = [a["content"] for _, a in READER.elements if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    for kind in ("script", "style"):
        text = re.search(rf"<{kind}>(.*?)</{kind}>", PAGE, re.DOTALL)
        assert text is not None
        digest = base64.b64encode(hashlib.sha256(text[1].encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == "'self'"
    attributes = {name for _, each in READER.elements for name in each}
    assert not {
        name for name in attributes if name.startswith("on") or name == "style"
    }  # the policy forbids them


def test_labels_and_file_names_are_never_parsed_as_html() -> None:
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", READER.texts["script"]
    )


def test_all_elements_that_the_script_uses_exist() -> None:
    known = [str(attributes["id"]) for _, attributes in READER.elements if "id" in attributes]
    assert len(known) == len(set(known))
    used = set(re.findall(r'find\("([\w-]+)"\)', READER.texts["script"]))
    assert len(used) > 10
    assert used <= set(known)
    copied = {str(attributes["data-copy"]) for _, attributes in READER.elements if "data-copy" in attributes}
    assert copied <= set(known)


@pytest.mark.parametrize("attribute", ["for", "aria-describedby"])
def test_labels_refer_to_an_element(attribute: str) -> None:
    known = {attributes.get("id") for _, attributes in READER.elements}
    named = [attributes[attribute] for _, attributes in READER.elements if attribute in attributes]
    assert named
    assert set(named) <= known


def test_the_page_is_small() -> None:
    assert len(index()) < 64 * 1024
    assert not re.search(r"@(POLICY|STYLE|SCRIPT)@", PAGE)
