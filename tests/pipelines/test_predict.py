import json

import pyarrow.parquet as pq
import pytest

from pipelines.predict import main
from raydetr.config import PredictConfig
from raydetr.errors import ConfigError, LeaseError, RegistryError, ServingError
from raydetr.lease import lease
from tests.call_concurrently import call_concurrently
from tests.tiny_detr import png, save_tiny_detr


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(2):
        (tmp_path / "photos" / f"{number}.png").write_bytes(png(60, 90, seed=number))
    return tmp_path / "photos"


def test_a_model_folder_predicts_results_and_overlays(ray_local, photos, tmp_path):
    model = save_tiny_detr(tmp_path / "tiny", ["ant", "bee"], edge=64)
    output = tmp_path / "out"
    config = PredictConfig(
        images=str(photos), model=str(model), output=str(output), threshold=0.2, visualize=True
    )
    summary = main(config)
    assert (summary["images"], summary["unreadable"], summary["predicted_by"]) == (2, 0, str(model))
    results = json.loads((output / "results.json").read_text())
    assert len(results) == 2 * 12
    assert summary["objects"] == sum(result["score"] >= 0.2 for result in results)
    assert summary["results"] == str(output / "results.json")
    assert len(list((output / "pictures").iterdir())) == 2


def test_the_default_model_is_the_champion(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(RegistryError, match=r"no registered model.*--tracking-uri"):
        main(PredictConfig(images=str(photos)))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_an_endpoint_that_does_not_answer_is_an_error(photos):
    with pytest.raises(ServingError, match="does not answer"):
        main(PredictConfig(images=str(photos), endpoint="http://127.0.0.1:9"))


def test_contradicting_flags_are_refused():
    with pytest.raises(ConfigError, match="exclude each other"):
        PredictConfig(images="x", model="m", endpoint="http://e")
    with pytest.raises(ConfigError, match="--threshold is 5"):
        PredictConfig(images="x", threshold=5)


def test_a_second_process_with_the_same_output_is_refused(photos, tmp_path):
    model = str(save_tiny_detr(tmp_path / "tiny", ["ant"], edge=64))
    with lease(str(tmp_path / "out")):
        with pytest.raises(
            LeaseError, match=r"held by another process \(.*, process \d+ on .*give another --output"
        ):
            main(PredictConfig(images=str(photos), model=model, output=str(tmp_path / "out")))
        assert [file.name for file in (tmp_path / "out").iterdir()] == ["lease.json"]


@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.nightly)])
@pytest.mark.slow
def test_two_concurrent_runs_leave_one_complete_result(ray_local, photos, tmp_path, rounds):
    model = save_tiny_detr(tmp_path / "tiny", ["ant", "bee"], edge=64)
    for number in range(rounds):
        config = PredictConfig(images=str(photos), model=str(model), output=str(tmp_path / f"out-{number}"))
        done, refused = call_concurrently(lambda config=config: main(config), 2)
        assert [summary["images"] for summary in done] == [2] * len(done)
        assert len(done) + len(refused) == 2
        assert done
        assert all(isinstance(error, LeaseError) for error in refused)
        table = pq.read_table(tmp_path / f"out-{number}" / "predictions.parquet")
        assert table["image_id"].to_pylist() == [1, 2]
        results = json.loads((tmp_path / f"out-{number}" / "results.json").read_text())
        assert len(results) == 2 * 12
