import json

from raydetr.serving.auth import Tokens


def test_a_created_token_is_accepted_by_the_endpoint(pipeline, tmp_path):
    done = pipeline("token_file", "--name", "alice", "--json", "made.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    token = json.loads((tmp_path / "made.json").read_text())["token"]
    assert token in done.stdout
    assert Tokens(tmp_path / "tokens").name_of(token) == "alice"


def test_a_token_is_written_to_the_token_file_and_not_printed(pipeline, tmp_path):
    command = ("token_file", "--name", "bob", "--token-file", "bob.token")
    done = pipeline(*command, cwd=tmp_path)
    token = (tmp_path / "bob.token").read_text().strip()
    assert Tokens(tmp_path / "tokens").name_of(token) == "bob"
    assert token not in done.stdout
    assert (tmp_path / "bob.token").stat().st_mode & 0o777 == 0o600
    rerun = pipeline(*command, cwd=tmp_path)
    assert rerun.returncode == 2
    assert "bob.token exists" in rerun.stderr
    assert len((tmp_path / "tokens").read_text().splitlines()) == 1
