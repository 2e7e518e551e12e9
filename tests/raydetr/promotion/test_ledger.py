"""The ledger of alias moves: compare-and-set, settling of interrupted promotions, and undo."""

import json
import random
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from raydetr.config import PromoteConfig
from raydetr.errors import ConfigError, RegistryError
from raydetr.promotion.ledger import Entry, Ledger, experiment_name, last_undoable, to_tag, utc_now
from raydetr.promotion.records import move, open_decision, record_refusal, undo
from raydetr.registry.tracking import client, start_run
from raydetr.results.decision import Decision, DecisionRecord, Rule
from raydetr.results.json_form import from_json
from tests.mlflow_server import mlflow_server
from tests.raydetr.promotion.unchecked_move import move_alias_unchecked
from tests.raydetr.registry.versions import bare_versions
from tests.run_pipeline import environment

RACER = """
import sys, time
from pathlib import Path
from raydetr.promotion.ledger import Entry, Ledger, utc_now
from raydetr.promotion.records import move, open_decision
from raydetr.results.decision import Decision

uri, folder, version = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
(folder / f"started-{version}").touch()
while not (folder / "create").exists():
    time.sleep(0.001)
ledger = Ledger(uri, "raydetr", "champion")  # in the first lap, all processes create it concurrently
number, before = len(ledger.settle()) + 1, ledger.position()
run_id = open_decision(ledger, Decision(True, (), "a race"), before, version)
(folder / f"ready-{version}").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
won = move(ledger, Entry(number, "promotion", before, version, run_id, utc_now()), before)
print("RESULT", number, ledger.run_id, won)
"""


def race(uri: str, folder: Path, versions: range) -> list[list[str]]:
    """Start processes that read the same ledger and then move the alias concurrently; return what each prints."""
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
    for before, after in (("started", "create"), ("ready", "go")):
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
        assert len({run_id for _, run_id, _ in results}) == 1, "all processes use one ledger"
        assert [won for _, _, won in results].count("True") == 1, results
        (*_, last) = Ledger(uri, "raydetr", "champion").entries()
        assert last.number == lap + 1
        assert str(last.previous) == str(before)
        assert client(uri).get_registered_model("raydetr").aliases["champion"] in (
            last.version,
            str(last.version),
        )
    active = client(uri).search_runs([client(uri).get_experiment_by_name("promotion").experiment_id])
    assert len(active) == 1, "the ledgers of the other processes are deleted"


@pytest.mark.slow
def test_exactly_one_of_several_concurrent_promotions_succeeds_on_sqlite(tracking_uri, tmp_path):
    bare_versions(tracking_uri, 9)
    check_race(tracking_uri, tmp_path / "race")


@pytest.mark.slow
def test_exactly_one_of_several_concurrent_promotions_succeeds_on_a_server(tmp_path, unused_port):
    with mlflow_server(unused_port, tmp_path):
        uri = f"http://127.0.0.1:{unused_port}"
        bare_versions(uri, 9)
        check_race(uri, tmp_path / "race")


def claim_only(ledger: Ledger, version: int) -> Entry:
    """Append the entry of a promotion whose process dies before it moves the alias."""
    number, before = len(ledger.entries()) + 1, ledger.position()
    run_id = open_decision(ledger, Decision(True, (), "cut short"), before, version)
    entry = Entry(number, "promotion", before, version, run_id, utc_now())
    assert ledger.claim(entry)
    return entry


def test_the_next_promotion_settles_an_interrupted_one_and_is_not_blocked(tracking_uri):
    bare_versions(tracking_uri, 3)
    move_alias_unchecked(tracking_uri, "models:/raydetr/1", "champion")
    ledger = Ledger(tracking_uri, "raydetr", "champion")
    cut_short = claim_only(ledger, 2)
    assert ledger.position() == 1
    assert client(tracking_uri).get_run(cut_short.run_id).info.status == "RUNNING"

    done = move_alias_unchecked(tracking_uri, "models:/raydetr/3", "champion")
    assert (done.previous, done.version, done.number) == (2, 3, 3)
    assert [(e.previous, e.version) for e in ledger.entries()] == [(None, 1), (1, 2), (2, 3)]
    for version in ("1", "2"):
        decision = client(tracking_uri).get_model_version("raydetr", version).tags["promotion.champion.0002"]
        assert json.loads(decision)["reason"] == "cut short"
    for entry in ledger.entries():
        assert client(tracking_uri).get_run(entry.run_id).info.status == "FINISHED"


@pytest.mark.slow
def test_a_version_deleted_before_its_promotion_is_settled_does_not_block(tracking_uri):
    bare_versions(tracking_uri, 3)
    move_alias_unchecked(tracking_uri, "models:/raydetr/1", "champion")
    ledger = Ledger(tracking_uri, "raydetr", "champion")
    claim_only(ledger, 2)
    client(tracking_uri).delete_model_version("raydetr", "2")
    assert move_alias_unchecked(tracking_uri, "models:/raydetr/3", "champion").previous == 1


def test_a_suspended_process_repairs_the_alias_that_it_overwrote(tracking_uri, monkeypatch):
    bare_versions(tracking_uri, 3)
    ledger, slow = (Ledger(tracking_uri, "raydetr", "champion") for _ in range(2))
    claim_only(ledger, 2)
    move_alias = slow.client.set_registered_model_alias

    def after_a_pause(*arguments):
        monkeypatch.undo()
        move_alias_unchecked(tracking_uri, "models:/raydetr/3", "champion")  # settles number 2 itself
        move_alias(*arguments)

    monkeypatch.setattr(slow.client, "set_registered_model_alias", after_a_pause)
    slow.settle()
    assert slow.position() == 3


def test_a_lost_response_does_not_lose_the_promotion(tracking_uri, monkeypatch):
    from mlflow.exceptions import MlflowException

    bare_versions(tracking_uri, 2)
    ledger = Ledger(tracking_uri, "raydetr", "champion")
    run_id = open_decision(ledger, Decision(True, (), "x"), None, 2)
    write = ledger.client.log_param

    def lose_response(*arguments):
        write(*arguments)
        raise MlflowException("connection reset")

    monkeypatch.setattr(ledger.client, "log_param", lose_response)
    assert move(ledger, Entry(1, "promotion", None, 2, run_id, utc_now()), None)
    assert ledger.position() == 2

    def fail(*arguments):
        raise MlflowException("connection refused")

    monkeypatch.setattr(ledger.client, "log_param", fail)
    with pytest.raises(
        RegistryError, match=r"entry 2 of the ledger .* cannot be written: connection refused"
    ):
        ledger.claim(Entry(2, "promotion", 2, 1, run_id, utc_now()))
    assert ledger.position() == 2


def test_an_alias_that_was_moved_outside_the_ledger_is_not_overwritten(tracking_uri):
    bare_versions(tracking_uri, 3)
    move_alias_unchecked(tracking_uri, "models:/raydetr/1", "champion")
    ledger = Ledger(tracking_uri, "raydetr", "champion")
    run_id = open_decision(ledger, Decision(True, (), "x"), 1, 2)
    client(tracking_uri).set_registered_model_alias("raydetr", "champion", "3")
    assert not move(ledger, Entry(2, "promotion", 1, 2, run_id, utc_now()), 1)
    assert ledger.position() == 3
    assert len(ledger.entries()) == 1
    assert move_alias_unchecked(tracking_uri, "models:/raydetr/2", "champion").previous == 3


@pytest.mark.slow
def test_undo_reverts_one_promotion_at_a_time_and_stops_at_the_first(tracking_uri):
    bare_versions(tracking_uri, 4)
    for version in (1, 2, 3):
        move_alias_unchecked(tracking_uri, f"models:/raydetr/{version}", "champion")
    assert undo(tracking_uri, "raydetr", "champion", dry_run=True).version == 2
    back = [undo(tracking_uri, "raydetr", "champion", "it dropped frames").version for _ in range(2)]
    assert back == [2, 1]
    with pytest.raises(RegistryError, match="nothing to undo: version 1 was the first one"):
        undo(tracking_uri, "raydetr", "champion")
    move_alias_unchecked(tracking_uri, "models:/raydetr/4", "champion")
    assert undo(tracking_uri, "raydetr", "champion").version == 1
    kinds = [entry.kind for entry in Ledger(tracking_uri, "raydetr", "champion").entries()]
    assert kinds == ["promotion"] * 3 + ["undo"] * 2 + ["promotion", "undo"]
    decision = client(tracking_uri).get_model_version("raydetr", "3").tags["promotion.champion.0004"]
    assert json.loads(decision)["reason"] == "promotion 3 undone (it dropped frames)"


def test_undo_refuses_aliases_that_were_moved_outside_the_ledger(tracking_uri):
    bare_versions(tracking_uri, 3)
    with pytest.raises(RegistryError, match="no alias 'champion'"):
        undo(tracking_uri, "raydetr", "champion")
    client(tracking_uri).set_registered_model_alias("raydetr", "champion", "1")
    with pytest.raises(RegistryError, match="nothing to undo: no promotion is left"):
        undo(tracking_uri, "raydetr", "champion")
    move_alias_unchecked(tracking_uri, "models:/raydetr/2", "champion")
    client(tracking_uri).set_registered_model_alias("raydetr", "champion", "3")
    with pytest.raises(
        RegistryError, match=r"is version 3, but the last promotion \(number 1\) moved it to version 2"
    ):
        undo(tracking_uri, "raydetr", "champion")
    client(tracking_uri).set_registered_model_alias("raydetr", "champion", "2")
    assert undo(tracking_uri, "raydetr", "champion").version == 1, "restores an alias that was set by hand"
    move_alias_unchecked(tracking_uri, "models:/raydetr/2", "champion")
    client(tracking_uri).delete_model_version("raydetr", "1")
    with pytest.raises(RegistryError, match="no version 1; its versions: 2, 3"):
        undo(tracking_uri, "raydetr", "champion")


def test_each_alias_of_each_model_has_its_own_ledger(tracking_uri):
    bare_versions(tracking_uri, 2)
    bare_versions(tracking_uri, 1, name="other")
    assert move_alias_unchecked(tracking_uri, "models:/raydetr/1", "champion").number == 1
    assert move_alias_unchecked(tracking_uri, "models:/raydetr/2", "canary").number == 1
    assert move_alias_unchecked(tracking_uri, "models:/other/1", "champion").number == 1
    assert move_alias_unchecked(tracking_uri, "models:/raydetr/2", "champion").number == 2
    assert move_alias_unchecked(tracking_uri, "models:/raydetr/2", "champion").number == 0, (
        "it is already there"
    )


def test_a_deleted_ledger_is_an_error_with_the_remedy(tracking_uri):
    bare_versions(tracking_uri, 2)
    move_alias_unchecked(tracking_uri, "models:/raydetr/1", "champion")
    client(tracking_uri).delete_run(Ledger(tracking_uri, "raydetr", "champion").run_id)
    with pytest.raises(RegistryError, match=r"'promotion/raydetr@champion' was deleted .*restore that run"):
        move_alias_unchecked(tracking_uri, "models:/raydetr/2", "champion")


def test_a_refusal_replaces_an_earlier_one_of_the_same_versions_and_data(tracking_uri):
    bare_versions(tracking_uri, 2)
    ledger = Ledger(tracking_uri, "raydetr", "champion")
    for reason in ("first", "second"):
        run_id = open_decision(ledger, Decision(False, (), reason), 1, 2, "d1")
        record_refusal(ledger, run_id, 1, 2, "d1")
    for version in ("1", "2"):
        tags = client(tracking_uri).get_model_version("raydetr", version).tags
        decisions = {key: json.loads(value) for key, value in tags.items() if key.startswith("promotion.")}
        assert list(decisions) == ["promotion.champion.refused.1-2.d1"]
        assert decisions["promotion.champion.refused.1-2.d1"]["reason"] == "second"
    runs = client(tracking_uri).search_runs(
        [client(tracking_uri).get_experiment_by_name(experiment_name("raydetr", "champion")).experiment_id]
    )
    assert len(runs) == 2, "each decision has a run"


def test_undo_treats_promotions_as_a_stack():
    def history(*moves: str) -> list[Entry]:
        kinds = {"p": "promotion", "u": "undo"}
        return [Entry(i, kinds[m], i - 1, i, "", "") for i, m in enumerate(moves, 1)]

    assert last_undoable([]) is None
    assert last_undoable(history(*"pp")).number == 2
    assert last_undoable(history(*"ppu")).number == 1
    assert last_undoable(history(*"ppup")).number == 4
    assert last_undoable(history(*"ppupuu")) is None


def test_a_decision_fits_into_a_tag():
    rule = Rule("r" * 50, True, "f" * 300, "l" * 100)

    def stored(rules: list[Rule], reason: str) -> DecisionRecord:
        decision = Decision(False, tuple(rules), reason)
        tag = to_tag(DecisionRecord("champion", None, 1, "d1", "now", "me", None, decision))
        assert len(tag) <= 5000
        return from_json(DecisionRecord, json.loads(tag))

    assert stored([rule], "short").decision == Decision(False, (rule,), "short")
    failed = replace(rule, passed=False)
    assert stored([rule] * 20 + [failed], "short").decision == Decision(False, (failed,), "short")
    assert stored([failed] * 20, "x" * 9000).decision == Decision(False, (), "x" * 2000)


@pytest.mark.parametrize("alias", ["latest", "V12", "", "best model", "a/b", "x" * 300])
def test_an_alias_that_is_invalid_in_mlflow_is_an_error_before_a_ledger_is_created(tracking_uri, alias):
    bare_versions(tracking_uri, 1)
    with pytest.raises(ConfigError, match="--alias"):
        move_alias_unchecked(tracking_uri, "models:/raydetr/1", alias)
    with pytest.raises(ConfigError, match="--alias"):
        PromoteConfig(alias=alias)
    experiments = [each.name for each in client(tracking_uri).search_experiments()]
    assert not [name for name in experiments if name.startswith("promotion")]


def slow_rounds(uri: str, count: int, seconds: float) -> None:
    """Check that exactly one of three concurrent claims with random delays succeeds, in each of `count` rounds."""
    bare_versions(uri, 3)
    run_id = start_run(uri, "promotion", "decision", {}, {})
    for number in range(1, count + 1):
        winners = []

        def claim(version: int, number: int = number, winners: list[int] = winners) -> None:
            ledger = Ledger(uri, "raydetr", f"alias-{number}")
            time.sleep(random.uniform(0, seconds))
            if ledger.claim(Entry(1, "promotion", None, version, run_id, utc_now())):
                winners.append(version)
            time.sleep(random.uniform(0, seconds))

        threads = [threading.Thread(target=claim, args=(version,)) for version in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert winners == [entry.version for entry in Ledger(uri, "raydetr", f"alias-{number}").entries()]


def test_exactly_one_of_several_slow_promotions_succeeds(tracking_uri):
    slow_rounds(tracking_uri, 2, 0.05)


@pytest.mark.nightly
@pytest.mark.timeout(3000)
def test_exactly_one_of_several_slow_promotions_succeeds_in_each_of_two_hundred_rounds(tracking_uri):
    slow_rounds(tracking_uri, 200, 2.5)
