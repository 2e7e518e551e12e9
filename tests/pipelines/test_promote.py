import pytest

from pipelines.promote import main
from raydetr.config import PromoteConfig
from raydetr.errors import RegistryError
from raydetr.registry.models import register, resolve
from raydetr.registry.promote import put_evaluation
from raydetr.registry.tracking import resolve_uri, start_run
from tests.tiny_detr import save_tiny_detr

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


def test_a_promotion_tells_from_where_to_where(tmp_path, capsys):
    uri = resolve_uri(f"sqlite:///{tmp_path}/mlflow.db")
    register(uri, start_run(uri, "training", "run", {}, {}), str(save_tiny_detr(tmp_path / "tiny", ["ant"])))
    config = PromoteConfig(tracking_uri=uri)
    with pytest.raises(RegistryError, match="no evaluation on file"):
        main(config)

    put_evaluation(resolve("models:/raydetr/1", uri), "digest", {"figures": {"AP": 0.5, "AP50": 0.75}})
    summary = main(config)
    assert "raydetr@champion: from nothing to version 1" in capsys.readouterr().out
    assert (summary["from_version"], summary["version"]) == ("none", 1)
    assert summary["evaluations"] == {"digest": {"AP": 0.5, "AP50": 0.75}}
    assert summary["AP on digest"] == 0.5

    assert main(config)["from_version"] == 1
    assert "from version 1 to version 1" in capsys.readouterr().out
