import asyncio
import hashlib
import logging
import os
import shlex

import pytest

from raydetr.errors import ConfigError
from raydetr.serving import auth
from raydetr.serving.auth import (
    BearerAuth,
    Tokens,
    add_token,
    curl_command,
    is_loopback,
    parse_tokens,
    require_tokens,
)
from raydetr.serving.images import Limits
from tests.raydetr.serving.guarded_app import ask, call, guarded_app, message_of, scope_of


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def line(token, name):
    return f"{hashlib.sha256(token.encode()).hexdigest()}  {name}\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(
        "# clients\n\n" + line("first-token", "alice") + line("second", "bob of sales # since May")
    )
    return path


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def tokens(file, clock):
    return Tokens(file, clock=clock)


@pytest.fixture
def api(tokens):
    return guarded_app(Limits(), tokens)


def whoami(api, *headers):
    return ask(api, "GET", "/whoami", headers=[("Authorization", value) for value in headers])


def test_each_token_of_the_file_authenticates_its_client(api):
    assert whoami(api, "Bearer first-token").json() == "alice"
    assert whoami(api, "bearer  second ").json() == "bob of sales"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [""],
        ["Bearer"],
        ["Bearer "],
        ["Bearer first-toke"],
        ["Bearer first-token2"],
        ["Bearer FIRST-TOKEN"],
        ["first-token"],
        ["Basic first-token"],
        ["Bearer first-token, Bearer first-token"],
        ["Bearer first-token", "Bearer first-token"],
        ["Bearer " + "x" * 100_000],
        ["Bearer " + hashlib.sha256(b"first-token").hexdigest()],
        [b"Bearer \xff\xfe"],
    ],
)
def test_a_missing_or_wrong_token_is_rejected_with_a_challenge(api, headers):
    answer = whoami(api, *headers)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert "first-token" not in message_of(answer)
    assert len(answer.content) < 300


def test_the_body_of_an_unauthenticated_request_is_not_read(api):
    answer = ask(api, "POST", "/v1/detect", content=b"no image")
    assert answer.status_code == 401


@pytest.mark.parametrize(
    "path",
    [
        "/docs/",
        "/docs-assets/../whoami",
        "/redoc",
        "/nowhere",
        "/health/",
        "//health",
        "/health/../whoami",
        "/health/%2e%2e/whoami",
        "/health%2f..%2fwhoami",
        "/v1/../health",
        "/health;/whoami",
        "/HEALTH",
        "/health%00",
        "/v2/health/live/../../models",
        "/whoami%3fpath=/health",
        "/whoami#/health",
        "",
    ],
)
def test_no_path_variant_bypasses_the_token(api, path):
    for method in ("GET", "POST", "HEAD", "OPTIONS", "WHAT"):
        start, _ = asyncio.run(call(api, scope_of(path, method)))
        assert start["status"] == 401, method


def test_health_needs_no_token(api):
    assert ask(api, "GET", "/health").json() == "ok"


def test_open_paths_work_under_a_path_prefix():
    middleware = BearerAuth(None, None)
    for root, path, is_open in [
        ("", "/health", True),
        ("/detr", "/detr/health", True),
        ("/detr/", "/detr/", True),
        ("/detr", "/detr/v1/detect", False),
        ("/detr", "/detrhealth", False),
    ]:
        assert middleware._is_open({"path": path, "root_path": root}) == is_open


def test_tokens_are_rotated_without_a_restart(api, file, clock):
    file.write_text(line("second", "bob") + line("third", "carol"))
    assert whoami(api, "Bearer first-token").status_code == 200
    clock.now += 1.0
    assert whoami(api, "Bearer first-token").status_code == 401
    assert whoami(api, "Bearer third").json() == "carol"
    assert whoami(api, "Bearer second").json() == "bob"


def test_a_change_is_detected_even_with_the_same_mtime_and_size(tokens, file, clock):
    before = file.stat()
    file.write_text(file.read_text().replace(line("second", "")[:64], line("other", "")[:64]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    clock.now += 1.0
    assert (tokens.name_of("second"), tokens.name_of("other")) == (None, "bob of sales")


def test_all_tokens_are_rejected_while_the_file_is_missing(tokens, file, clock, caplog):
    content = file.read_text()
    file.unlink()
    clock.now += 1.0
    assert tokens.name_of("first-token") is None
    assert "all tokens are rejected" in caplog.text
    file.write_text(content)
    clock.now += 1.0
    assert tokens.name_of("first-token") == "alice"


def test_an_invalid_line_added_later_is_skipped_and_only_its_number_is_logged(tokens, file, clock, caplog):
    with file.open("a") as out:
        out.write("plain-secret dave\n" + line("third", "carol"))
    clock.now += 1.0
    with caplog.at_level(logging.WARNING):
        assert tokens.name_of("third") == "carol"
    assert "[5]" in caplog.text
    assert "plain-secret" not in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no token"),
        ("# nothing\n", "has no token"),
        ("first-token alice\n", "line 1 is not"),
        ("\n" + "a" * 63 + " alice", "line 2 is not"),
        ("a" * 64, "line 1 is not"),
        ("a" * 65 + " alice", "line 1 is not"),
        ("g" * 64 + " alice", "line 1 is not"),
        ("a" * 64 + " al\x1b[31mice", "line 1 is not"),
        ("a" * 64 + " " + "n" * 101, "line 1 is not"),
        ("#" * (1024 * 1024 + 1), "larger than"),
    ],
)
def test_a_file_without_tokens_is_rejected_at_startup(tmp_path, content, message):
    file = tmp_path / "tokens"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        Tokens(file)
    assert "alice" not in str(error.value)


def test_an_unreadable_file_is_rejected_at_startup(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            Tokens(path)


def test_every_known_hash_is_compared_in_constant_time(tokens, monkeypatch):
    compared = []
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    assert tokens.name_of("first-token") == "alice"
    assert len(compared) == 2
    assert {len(value) for pair in compared for value in pair} == {32}


def test_lines_may_have_uppercase_digits_tabs_and_windows_line_ends():
    digest = hashlib.sha256(b"t").hexdigest()
    names, bad = parse_tokens(f"{digest.upper()}\talice\r\n{'0' * 64}   bob#x\r\n".encode())
    assert (dict(names), bad) == ({bytes.fromhex(digest): "alice", bytes(32): "bob"}, [])


def test_an_added_token_works_and_the_others_still_do(file, clock):
    with file.open("a") as out:
        out.write("# no line end")
    tokens = Tokens(file, clock=clock)
    carol, other = add_token(file, "carol of sales"), add_token(file, "carol of sales")
    clock.now += 1.0
    assert carol != other
    assert [tokens.name_of(each) for each in (carol, other)] == ["carol of sales"] * 2
    assert tokens.name_of("first-token") == "alice"
    assert carol not in file.read_text()


def test_a_new_token_file_is_private_to_its_owner(tmp_path):
    token = add_token(tmp_path / "tokens", "alice")
    assert (tmp_path / "tokens").stat().st_mode & 0o777 == 0o600
    assert Tokens(tmp_path / "tokens").name_of(token) == "alice"


@pytest.mark.parametrize("name", ["", " ", " alice", "al\nice", "al\x1b[31mice", "a#b", "n" * 101, "\t"])
def test_a_name_that_cannot_be_parsed_again_is_rejected_and_nothing_is_written(tmp_path, name):
    with pytest.raises(ConfigError, match="--name"):
        add_token(tmp_path / "tokens", name)
    assert not (tmp_path / "tokens").exists()


def test_an_unwritable_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written"):
        add_token(tmp_path / "nowhere" / "tokens", "alice")


def test_the_curl_command_has_the_token_and_is_quoted_for_a_shell():
    for tokens in ("", "tokens"):
        command = curl_command("http://h/it's a path", tokens)
        words = shlex.split(command.replace("$TOKEN", "secret"))
        assert words[-1] == "http://h/it's a path/v1/detect?threshold=0.5"
        assert ("Authorization: Bearer secret" in words) == bool(tokens)


def test_tokens_are_required_unless_the_host_is_loopback():
    for host in ("127.0.0.1", "127.8.9.1", "::1", "localhost"):
        assert is_loopback(host)
        require_tokens(host, None)
    for host in (
        "0.0.0.0",
        "::",
        "10.0.0.1",
        "example.org",
        "",
        "localhost.example.org",
        "127.0.0.1.example.org",
    ):
        assert not is_loopback(host)
        with pytest.raises(ConfigError, match="--tokens"):
            require_tokens(host, None)
        require_tokens(host, "tokens")
