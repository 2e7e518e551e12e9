"""Alias moves without the gate, for tests of everything else."""

from raydetr.errors import RegistryError
from raydetr.promotion.ledger import Entry, Ledger, utc_now
from raydetr.promotion.records import Promotion, move, open_decision, read_candidate
from raydetr.registry.tracking import end_run
from raydetr.results.decision import Decision


def move_alias_unchecked(uri: str, address: str, alias: str) -> Promotion:
    """Move an alias through the ledger to a version that has an evaluation, without comparing it with the champion.

    Args:
        uri: MLflow URI from `tracking.resolve_uri`.
        address: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        alias: alias to move, e.g. `champion`.

    Raises:
        RegistryError: the version does not exist or has no evaluation, the URI is that of a folder, or another process
            moved the alias meanwhile.
    """
    model = read_candidate(uri, address)
    if not model.evaluations:
        raise RegistryError(f"{model.name} version {model.version} has no evaluation.")
    ledger = Ledger(uri, model.name, alias)
    number, previous = len(ledger.settle()) + 1, ledger.position()
    if previous == model.version:
        return Promotion(model.name, alias, previous, model.version, model.evaluations)
    run_id = open_decision(ledger, Decision(True, (), "moved without a comparison"), previous, model.version)
    entry = Entry(number, "promotion", previous, model.version, run_id, utc_now())
    if not move(ledger, entry, previous):
        end_run(uri, run_id, "KILLED")
        raise RegistryError(f"{model.name}@{alias} was moved by another process meanwhile.")
    return Promotion(model.name, alias, previous, model.version, model.evaluations, number, run_id)
