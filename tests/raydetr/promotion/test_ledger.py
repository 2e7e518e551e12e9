"""The moves of an alias: numbered, written once, settled by whoever comes next, and undone."""

import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from raydetr.config import PromoteConfig
from raydetr.errors import ConfigError, RegistryError
from raydetr.promotion.gate import Decision
from raydetr.promotion.ledger import Entry, Ledger, experiment_name, now, text, undoable
from raydetr.promotion.records import keep_refusal, move, open_decision, promote, undo
from raydetr.registry.tracking import client, start_run
from tests.mlflow_server import mlflow_server
from tests.raydetr.registry.versions import bare_versions
from tests.run_pipeline import environment

RACER = """
import sys, time
from pathlib import Path
from raydetr.promotion.gate import Decision
from raydetr.promotion.ledger import Entry, Ledger, now
from raydetr.promotion.records import move, open_decision

uri, folder, version = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
(folder / f"born-{version}").touch()
while not (folder / "begin").exists():
    time.sleep(0.001)
ledger = Ledger(uri, "raydetr", "champion")  # the first ones begin it at once, too
number, before = len(ledger.settle()) + 1, ledger.position()
run_id = open_decision(ledger, Decision(True, (), "a race"), before, version)
(folder / f"ready-{version}").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
won = move(ledger, Entry(number, "promotion", before, version, run_id, now()), before)
print("RESULT", number, ledger.run_id, won)
"""


def race(uri: str, folder: Path, versions: range) -> list[list[str]]:
    """Processes that have all read the same ledger move the alias at the same time; what each prints."""
    folder.mkdir(parents=True)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, uri, str(folder), str(version)],
            env=environment({"PYTHONWARNINGS": "ignore"}),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for version in versions
    ]
    for before, after in (("born", "begin"), ("ready", "go")):
        while len(list(folder.glob(f"{before}-*"))) < len(racers):
            assert all(racer.poll() is None for racer in racers), [r.communicate()[0] for r in racers]
            time.sleep(0.01)
        (folder / after).touch()
    outputs = [racer.communicate()[0] for racer in racers]
    assert all(racer.returncode == 0 for racer in racers), outputs
    return [
        line.split()[1:] for output in outputs for line in output.splitlines() if line.startswith("RESULT")
    ]


def check_race(uri: str, folder: Path) -> None:
    for lap in range(2):
        before = client(uri).get_registered_model("raydetr").aliases.get("champion")
        results = race(uri, folder / f"lap-{lap}", range(2 + 4 * lap, 6 + 4 * lap))
        assert {number for number, _, _ in results} == {str(lap + 1)}
        assert len({run_id for _, run_id, _ in results}) == 1, "one ledger, whoever began it"
        assert [won for _, _, won in results].count("True") == 1, results
        (*_, last) = Ledger(uri, "raydetr", "champion").entries()
        assert last.number == lap + 1
        assert str(last.previous) == str(before)
        assert client(uri).get_registered_model("raydetr").aliases["champion"] in (
            last.version,
            str(last.version),
        )
    active = client(uri).search_runs([client(uri).get_experiment_by_name("promotion").experiment_id])
    assert len(active) == 1, "the ledgers that lost are gone"


@pytest.mark.slow
def test_of_promotions_at_once_one_wins_on_sqlite(tracking_uri, tmp_path):
    bare_versions(tracking_uri, 9)
    check_race(tracking_uri, tmp_path / "race")


@pytest.mark.slow
def test_of_promotions_at_once_one_wins_on_a_server(tmp_path, unused_port):
    with mlflow_server(unused_port, tmp_path):
        uri = f"http://127.0.0.1:{unused_port}"
        bare_versions(uri, 9)
        check_race(uri, tmp_path / "race")


def claim_only(ledger: Ledger, version: int) -> Entry:
    """What is left of a promotion that died between its entry and the alias."""
    number, before = len(ledger.entries()) + 1, ledger.position()
    run_id = open_decision(ledger, Decision(True, (), "cut short"), before, version)
    entry = Entry(number, "promotion", before, version, run_id, now())
    assert ledger.claim(entry)
    return entry


def test_the_next_promotion_finishes_one_that_died_and_is_not_blocked(tracking_uri):
    bare_versions(tracking_uri, 3)
    promote(tracking_uri, "models:/raydetr/1", "champion")
    ledger = Ledger(tracking_uri, "raydetr", "champion")
    cut_short = claim_only(ledger, 2)
    assert ledger.position() == 1
    assert client(tracking_uri).get_run(cut_short.run_id).info.status == "RUNNING"

    done = promote(tracking_uri, "models:/raydetr/3", "champion")
    assert (done.previous, done.version, done.number) == (2, 3, 3)
    assert [(e.previous, e.version) for e in ledger.entries()] == [(None, 1), (1, 2), (2, 3)]
    for version in ("1", "2"):
        noted = client(tracking_uri).get_model_version("raydetr", version).tags["promotion.champion.0002"]
        assert json.loads(noted)["reason"] == "cut short"
    for entry in ledger.entries():
        assert client(tracking_uri).get_run(entry.run_id).info.status == "FINISHED"


@pytest.mark.slow
def test_a_version_deleted_before_its_promotion_is_settled_does_not_block(tracking_uri):
    bare_versions(tracking_uri, 3)
    promote(tracking_uri, "models:/raydetr/1", "champion")
    ledger = Ledger(tracking_uri, "raydetr", "champion")
    claim_only(ledger, 2)
    client(tracking_uri).delete_model_version("raydetr", "2")
    assert promote(tracking_uri, "models:/raydetr/3", "champion").previous == 1


def test_a_helper_that_slept_repairs_what_it_overwrote(tracking_uri, monkeypatch):
    bare_versions(tracking_uri, 3)
    ledger, slow = (Ledger(tracking_uri, "raydetr", "champion") for _ in range(2))
    claim_only(ledger, 2)
    move_alias = slow.client.set_registered_model_alias

    def after_a_nap(*arguments):
        monkeypatch.undo()
        promote(tracking_uri, "models:/raydetr/3", "champion")  # settles number 2 itself
        move_alias(*arguments)

    monkeypatch.setattr(slow.client, "set_registered_model_alias", after_a_nap)
    slow.settle()
    assert slow.position() == 3


def test_an_answer_that_is_lost_does_not_lose_the_promotion(tracking_uri, monkeypatch):
    from mlflow.exceptions import MlflowException

    bare_versions(tracking_uri, 2)
    ledger = Ledger(tracking_uri, "raydetr", "champion")
    run_id = open_decision(ledger, Decision(True, (), "x"), None, 2)
    write = ledger.client.log_param

    def answer_lost(*arguments):
        write(*arguments)
        raise MlflowException("connection reset")

    monkeypatch.setattr(ledger.client, "log_param", answer_lost)
    assert move(ledger, Entry(1, "promotion", None, 2, run_id, now()), None)
    assert ledger.position() == 2

    def not_written(*arguments):
        raise MlflowException("connection refused")

    monkeypatch.setattr(ledger.client, "log_param", not_written)
    with pytest.raises(
        RegistryError, match=r"entry 2 of the ledger .* cannot be written: connection refused"
    ):
        ledger.claim(Entry(2, "promotion", 2, 1, run_id, now()))
    assert ledger.position() == 2


def test_an_alias_that_was_moved_by_hand_in_between_is_not_overwritten(tracking_uri):
    bare_versions(tracking_uri, 3)
    promote(tracking_uri, "models:/raydetr/1", "champion")
    ledger = Ledger(tracking_uri, "raydetr", "champion")
    run_id = open_decision(ledger, Decision(True, (), "x"), 1, 2)
    client(tracking_uri).set_registered_model_alias("raydetr", "champion", "3")
    assert not move(ledger, Entry(2, "promotion", 1, 2, run_id, now()), 1)
    assert ledger.position() == 3
    assert len(ledger.entries()) == 1
    assert promote(tracking_uri, "models:/raydetr/2", "champion").previous == 3


@pytest.mark.slow
def test_undo_walks_back_one_promotion_at_a_time_and_ends_at_the_first(tracking_uri):
    bare_versions(tracking_uri, 4)
    for version in (1, 2, 3):
        promote(tracking_uri, f"models:/raydetr/{version}", "champion")
    assert undo(tracking_uri, "raydetr", "champion", dry_run=True).version == 2
    back = [undo(tracking_uri, "raydetr", "champion", "it dropped frames").version for _ in range(2)]
    assert back == [2, 1]
    with pytest.raises(RegistryError, match="nothing to undo: version 1 was the first one"):
        undo(tracking_uri, "raydetr", "champion")
    promote(tracking_uri, "models:/raydetr/4", "champion")
    assert undo(tracking_uri, "raydetr", "champion").version == 1
    kinds = [entry.kind for entry in Ledger(tracking_uri, "raydetr", "champion").entries()]
    assert kinds == ["promotion"] * 3 + ["undo"] * 2 + ["promotion", "undo"]
    noted = client(tracking_uri).get_model_version("raydetr", "3").tags["promotion.champion.0004"]
    assert json.loads(noted)["reason"] == "promotion 3 undone (it dropped frames)"


def test_undo_refuses_what_it_did_not_move(tracking_uri):
    bare_versions(tracking_uri, 3)
    with pytest.raises(RegistryError, match="no alias 'champion'"):
        undo(tracking_uri, "raydetr", "champion")
    client(tracking_uri).set_registered_model_alias("raydetr", "champion", "1")
    with pytest.raises(RegistryError, match="nothing to undo: no promotion is left"):
        undo(tracking_uri, "raydetr", "champion")
    promote(tracking_uri, "models:/raydetr/2", "champion")
    client(tracking_uri).set_registered_model_alias("raydetr", "champion", "3")
    with pytest.raises(
        RegistryError, match=r"is version 3, but the last promotion \(number 1\) made it version 2"
    ):
        undo(tracking_uri, "raydetr", "champion")
    client(tracking_uri).set_registered_model_alias("raydetr", "champion", "2")
    assert undo(tracking_uri, "raydetr", "champion").version == 1, "also what was set by hand before"
    promote(tracking_uri, "models:/raydetr/2", "champion")
    client(tracking_uri).delete_model_version("raydetr", "1")
    with pytest.raises(RegistryError, match="no version 1; its versions: 2, 3"):
        undo(tracking_uri, "raydetr", "champion")


def test_aliases_and_models_have_ledgers_of_their_own(tracking_uri):
    bare_versions(tracking_uri, 2)
    bare_versions(tracking_uri, 1, name="other")
    assert promote(tracking_uri, "models:/raydetr/1", "champion").number == 1
    assert promote(tracking_uri, "models:/raydetr/2", "canary").number == 1
    assert promote(tracking_uri, "models:/other/1", "champion").number == 1
    assert promote(tracking_uri, "models:/raydetr/2", "champion").number == 2
    assert promote(tracking_uri, "models:/raydetr/2", "champion").number == 0, "it is there already"


def test_a_ledger_that_was_deleted_is_told_with_the_remedy(tracking_uri):
    bare_versions(tracking_uri, 2)
    promote(tracking_uri, "models:/raydetr/1", "champion")
    client(tracking_uri).delete_run(Ledger(tracking_uri, "raydetr", "champion").run_id)
    with pytest.raises(
        RegistryError, match=r"'promotion/raydetr@champion' has lost its ledger .*restore that run"
    ):
        promote(tracking_uri, "models:/raydetr/2", "champion")


def test_a_refusal_of_the_same_pair_and_data_replaces_the_one_before(tracking_uri):
    bare_versions(tracking_uri, 2)
    ledger = Ledger(tracking_uri, "raydetr", "champion")
    for reason in ("first", "second"):
        run_id = open_decision(ledger, Decision(False, (), reason), 1, 2, "d1")
        keep_refusal(ledger, run_id, 1, 2, "d1")
    for version in ("1", "2"):
        tags = client(tracking_uri).get_model_version("raydetr", version).tags
        kept = {key: json.loads(value) for key, value in tags.items() if key.startswith("promotion.")}
        assert list(kept) == ["promotion.champion.refused.1-2.d1"]
        assert kept["promotion.champion.refused.1-2.d1"]["reason"] == "second"
    runs = client(tracking_uri).search_runs(
        [client(tracking_uri).get_experiment_by_name(experiment_name("raydetr", "champion")).experiment_id]
    )
    assert len(runs) == 2, "each decision has a run"


def test_undoable_is_a_stack():
    def history(*moves: str) -> list[Entry]:
        kinds = {"p": "promotion", "u": "undo"}
        return [Entry(i, kinds[m], i - 1, i, "", "") for i, m in enumerate(moves, 1)]

    assert undoable([]) is None
    assert undoable(history(*"pp")).number == 2
    assert undoable(history(*"ppu")).number == 1
    assert undoable(history(*"ppup")).number == 4
    assert undoable(history(*"ppupuu")) is None


def test_a_decision_fits_into_a_tag():
    rule = {"rule": "r" * 50, "passed": True, "found": "f" * 300, "limit": "l" * 100}
    small = {"reason": "short", "rules": [rule]}
    assert json.loads(text(small)) == small
    large = json.loads(text({"reason": "short", "rules": [rule] * 20 + [{**rule, "passed": False}]}))
    assert [r["passed"] for r in large["rules"]] == [False]
    assert len(text({"reason": "x" * 9000, "rules": [rule] * 20})) <= 5000


@pytest.mark.parametrize("alias", ["latest", "V12", "", "best model", "a/b", "x" * 300])
def test_an_alias_that_mlflow_refuses_is_refused_before_there_is_a_ledger(tracking_uri, alias):
    bare_versions(tracking_uri, 1)
    with pytest.raises(ConfigError, match="--alias"):
        promote(tracking_uri, "models:/raydetr/1", alias)
    with pytest.raises(ConfigError, match="--alias"):
        PromoteConfig(alias=alias)
    experiments = [each.name for each in client(tracking_uri).search_experiments()]
    assert not [name for name in experiments if name.startswith("promotion")]


def slow_rounds(uri: str, count: int, seconds: float) -> None:
    """Rounds of three promotions at once that read, decide and write as slowly as they like: one wins each."""
    bare_versions(uri, 3)
    run_id = start_run(uri, "promotion", "decision", {}, {})
    for number in range(1, count + 1):
        won = []

        def claim(version: int, number: int = number, won: list[int] = won) -> None:
            ledger = Ledger(uri, "raydetr", f"alias-{number}")
            time.sleep(random.uniform(0, seconds))
            if ledger.claim(Entry(1, "promotion", None, version, run_id, now())):
                won.append(version)
            time.sleep(random.uniform(0, seconds))

        threads = [threading.Thread(target=claim, args=(version,)) for version in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won == [entry.version for entry in Ledger(uri, "raydetr", f"alias-{number}").entries()]


def test_of_slow_promotions_one_wins(tracking_uri):
    slow_rounds(tracking_uri, 2, 0.05)


@pytest.mark.nightly
@pytest.mark.timeout(3000)
def test_of_slow_promotions_one_wins_in_two_hundred_rounds(tracking_uri):
    slow_rounds(tracking_uri, 200, 2.5)
