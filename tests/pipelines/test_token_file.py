import json

from raydetr.serving.auth import Tokens


def test_a_token_is_made_that_the_endpoint_knows(pipeline, tmp_path):
    done = pipeline("token_file", "--name", "alice", "--json", "made.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    token = json.loads((tmp_path / "made.json").read_text())["token"]
    assert token in done.stdout
    assert Tokens(tmp_path / "tokens").name_of(token) == "alice"


def test_a_token_goes_into_a_file_of_its_own_and_is_not_printed(pipeline, tmp_path):
    command = ("token_file", "--name", "bob", "--token-file", "bob.token")
    done = pipeline(*command, cwd=tmp_path)
    token = (tmp_path / "bob.token").read_text().strip()
    assert Tokens(tmp_path / "tokens").name_of(token) == "bob"
    assert token not in done.stdout
    assert (tmp_path / "bob.token").stat().st_mode & 0o777 == 0o600
    again = pipeline(*command, cwd=tmp_path)
    assert again.returncode == 2
    assert "bob.token exists" in again.stderr
    assert len((tmp_path / "tokens").read_text().splitlines()) == 1
