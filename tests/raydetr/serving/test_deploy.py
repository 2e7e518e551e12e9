"""The shipped Serve configurations. Ray ignores unknown names, so all names are checked against its schema."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from ray.serve.schema import ServeDeploySchema

from raydetr.config import ServeConfig
from raydetr.errors import ConfigError
from raydetr.serving import app
from raydetr.serving.auth import parse_tokens

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "platform/deploy"


def service() -> dict[str, Any]:
    return yaml.safe_load((FOLDER / "rayservice.yaml").read_text())


def configurations() -> dict[str, dict[str, Any]]:
    return {
        "serve.yaml": yaml.safe_load((FOLDER / "serve.yaml").read_text()),
        "rayservice.yaml": yaml.safe_load(service()["spec"]["serveConfigV2"]),
    }


def model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the pydantic model inside an Optional, Union or List annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for each in typing.get_args(annotation) if (model := model_in(each))), None)


def unknown_names(given: Any, schema: type[BaseModel], where: str = "") -> list[str]:
    names = []
    for item in given if isinstance(given, list) else [given]:
        for name, value in item.items():
            field = schema.model_fields.get(name)
            inner = model_in(field.annotation) if field else None
            if field is None:
                names.append(f"{where}{name}")
            elif inner is not None and isinstance(value, dict | list):
                names += unknown_names(value, inner, f"{where}{name}.")
    return names


@pytest.mark.parametrize("name", ["serve.yaml", "rayservice.yaml"])
def test_all_names_are_in_the_schema_of_ray_and_all_args_are_flags(name: str) -> None:
    configuration = configurations()[name]
    assert unknown_names(configuration, ServeDeploySchema) == []
    ServeDeploySchema.model_validate(configuration)
    (application,) = configuration["applications"]
    module, _, attribute = application["import_path"].partition(":")
    assert module == app.__name__
    assert getattr(app, attribute) is app.build
    flags = ServeConfig(**application["args"])
    assert set(application["args"]) <= {field.name for field in dataclasses.fields(ServeConfig)}
    assert flags.device == "gpu"
    assert flags.host == configuration["http_options"]["host"]
    assert flags.tokens, "other machines can reach it"


def test_the_check_detects_names_that_ray_would_ignore() -> None:
    configuration = configurations()["serve.yaml"]
    configuration["http_options"]["prot"] = 8000
    configuration["applications"][0]["route"] = "/"
    ServeDeploySchema.model_validate(configuration)
    assert unknown_names(configuration, ServeDeploySchema) == ["http_options.prot", "applications.route"]


def test_the_service_has_gpus_and_the_tokens_for_its_application() -> None:
    manifest = service()
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    assert set(manifest["spec"]) == {"serveConfigV2", "rayClusterConfig"}
    cluster = manifest["spec"]["rayClusterConfig"]
    assert cluster["rayVersion"] == "2.60.0"
    args = configurations()["rayservice.yaml"]["applications"][0]["args"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    (gpu,) = groups["gpu"]["template"]["spec"]["containers"]
    gpus = int(gpu["resources"]["limits"]["nvidia.com/gpu"]) * groups["gpu"]["maxReplicas"]
    assert gpus >= args["max_replicas"] * args["num_gpus"]
    assert groups["gpu"]["minReplicas"] >= args["min_replicas"]
    for group in (cluster["headGroupSpec"], *groups.values()):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert Path(args["tokens"]).parent == Path(mounts["tokens"])
        assert {volume["name"] for volume in pod["volumes"]} == set(mounts)


def test_invalid_args_are_rejected_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--host 0\.0\.0\.0 can be reached from other machines"):
        app.build({})
    with pytest.raises(ConfigError, match="unexpected keyword argument 'modle'"):
        app.build({"modle": "models:/raydetr@champion"})
    tokens = tmp_path / "tokens"
    tokens.write_text("secret  me\n")
    assert parse_tokens(tokens.read_bytes())[1], "the token itself is not a valid line"
    with pytest.raises(ConfigError, match="line 1 is not"):
        app.build({"tokens": str(tokens)})
