"""Break each guarantee on purpose in a copy of the project: its tests must fail, most of them in `make test`."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ["detr", "platform", "pipelines", "tests", "docs", "pyproject.toml", "cluster.yaml"]

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Mutation:
    """Replace `old` by `new` in `file`; then `tests` must fail in `make test`, or if `slow`, in `make test-all`."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    slow: bool = False


MUTATIONS = {
    "the network imports the engine that imports it": Mutation(
        "detr/model/fx_graph.py",
        "from torch import fx, nn",
        "from torch import fx, nn\n\nfrom detr.inference import optimize",
        ("tests/test_layout.py",),
    ),
    "a method of an instance is replaced": Mutation(
        "detr/inference/cuda_graphs.py",
        "module.engine = GraphEngine(memory)",
        'vars(module)["encode"] = GraphEngine(memory)',
        ("tests/test_layout.py",),
    ),
    "the endpoint's service and its shadow import each other": Mutation(
        "platform/raydetr/serving/shadow.py",
        "from raydetr.serving.detector import Result",
        "from raydetr.serving.detector import Result\nfrom raydetr.serving import service",
        ("tests/test_layout.py",),
    ),
    "the files of a hub model may come from different commits": Mutation(
        "detr/model_files.py",
        'self._options["revision"] = commit',
        "pass",
        ("tests/detr/test_model_files.py",),
    ),
    "only one of the two processor files is read": Mutation(
        "detr/model_files.py",
        'PROCESSOR_NAMES = ("processor_config.json", "preprocessor_config.json")',
        'PROCESSOR_NAMES = ("preprocessor_config.json", "preprocessor_config.json")',
        ("tests/detr/test_model_files.py",),
    ),
    "unknown entries of a backbone configuration are dropped silently": Mutation(
        "detr/backbone_config.py",
        "unknown = sorted(given.keys() - known - _DERIVED - _COMMON_FIELDS)",
        "unknown = []",
        ("tests/detr/model/test_resnet.py", "tests/detr/test_arguments.py"),
    ),
    "torch_dtype has no effect": Mutation(
        "detr/checkpoint/load_save.py",
        "requested_dtype = resolve_dtype(dtype, torch_dtype)",
        "requested_dtype = resolve_dtype(dtype)",
        ("tests/detr/test_arguments.py",),
    ),
    "the configured activation of a ResNet also applies inside bottlenecks": Mutation(
        "detr/model/resnet.py",
        '_activation("relu" if bottleneck else activation)',
        "_activation(activation)",
        ("tests/detr/model/test_resnet.py",),
    ),
    "loading a checkpoint runs pickled code": Mutation(
        "detr/checkpoint/state_dict.py",
        "weights_only=True",
        "weights_only=False",
        ("tests/detr/checkpoint/test_state_dict.py",),
    ),
    "importing a model imports timm": Mutation(
        "detr/model/backbone.py",
        "import torch\nimport torch.nn",
        "import timm\nimport torch\nimport torch.nn",
        ("tests/detr/test_import.py",),
    ),
    "costly images share the lane of other images": Mutation(
        "platform/raydetr/serving/preparer.py",
        "costly = [job for job in jobs if job.seconds > light_s or 3 * job.pixels > self.limits.max_pixels]",
        "costly: list[Job] = []",
        ("tests/raydetr/serving/test_preparer.py",),
    ),
    "costly images are batched with others": Mutation(
        "platform/raydetr/serving/detector.py",
        'return "costly" if isinstance(image, CostlyImage) else "client"',
        'return "client"',
        ("tests/raydetr/serving/test_detector.py",),
    ),
    "a photo waits for the computation of a costly image": Mutation(
        "platform/raydetr/serving/detector.py",
        "        self._idle.clear()\n        self._no_client.clear()\n",
        "        self._idle.clear()\n",
        ("tests/raydetr/serving/test_detector.py",),
    ),
    "a delayed refusal holds its images in memory": Mutation(
        "platform/raydetr/serving/refusals.py",
        "error.with_traceback(None)",
        "pass",
        ("tests/raydetr/serving/test_refusals.py",),
    ),
    "costly images are decoded at the priority of photos": Mutation(
        "platform/raydetr/serving/decode_worker.py",
        "if message[0]:",
        "if False:",
        ("tests/raydetr/serving/test_decoding.py",),
    ),
    "a decoding worker has no limit on CPU time": Mutation(
        "platform/raydetr/serving/decode_worker.py",
        "signal.setitimer(signal.ITIMER_PROF, task.cpu_s)",
        "pass",
        ("tests/raydetr/serving/test_decoding.py",),
    ),
    "images are decoded in order of arrival": Mutation(
        "platform/raydetr/serving/decoding.py",
        "start = max(self._now, self._free_at.get(job.client, 0.0))",
        "start = 0.0",
        ("tests/raydetr/serving/test_decoding.py",),
    ),
    "one client may fill the whole queue": Mutation(
        "platform/raydetr/serving/shares.py",
        "return amount > free or self.held(client) >= FACTOR * free",
        "return amount > free",
        ("tests/raydetr/serving/test_shares.py", "tests/raydetr/serving/test_service.py"),
    ),
    "a replica's queues hold their last images in memory": Mutation(
        "platform/raydetr/serving/detector.py",
        "work, job.work = job.work, None",
        "work = job.work",
        ("tests/raydetr/serving/test_detector.py",),
    ),
    "the order is off by one after a resume": Mutation(
        "platform/raydetr/data/stream/plan.py",
        "skip = max(0, start - visit.first)",
        "skip = max(0, start - visit.first - 1)",
        ("tests/raydetr/data/stream/test_plan.py",),
    ),
    "the order of a window is the same in each epoch": Mutation(
        "platform/raydetr/data/stream/plan.py",
        'generator(spec.seed, "rows", epoch, window)',
        'generator(spec.seed, "rows", 0, window)',
        ("tests/raydetr/data/stream/test_plan.py",),
    ),
    "each step is padded to its first micro-batch": Mutation(
        "platform/raydetr/data/stream/plan.py",
        "self.known[step] = (max(height, shape[0]), max(width, shape[1]))",
        "self.known.setdefault(step, (shape[0], shape[1]))",
        ("tests/raydetr/data/stream/test_plan.py",),
    ),
    "the boxes are normalized per worker": Mutation(
        "platform/raydetr/training/distributed.py",
        "boxes, class_weight, images, skipped, signal_sum = all_reduce(sums).tolist()\n    workers = world_size()",
        "boxes, class_weight, images, skipped, signal_sum = sums.tolist()\n    workers = 1",
        ("tests/raydetr/training/test_distributed.py",),
    ),
    "the number of boxes is clamped after the division, as in the original": Mutation(
        "platform/raydetr/training/distributed.py",
        "num_boxes=max(boxes, 1.0) / workers",
        "num_boxes=max(boxes / workers, 1.0)",
        ("tests/raydetr/training/test_distributed.py",),
    ),
    "tokens ignore the weight of their image": Mutation(
        "detr/loss/multiscale_criterion.py",
        "    share = share * weights[:, None]\n",
        "",
        ("tests/detr/model/multiscale/test_detector.py",),
    ),
    "the quality of an object is scaled by the best overlap of all objects": Mutation(
        "detr/loss/dense_assignment.py",
        "scaled = chosen * (top_iou",
        "scaled = chosen * (top_iou.amax(1, keepdim=True)",
        ("tests/detr/loss/test_dense_assignment.py",),
    ),
    "a suppressed token suppresses others": Mutation(
        "detr/model/multiscale/selection.py",
        "_ROUNDS = 31",
        "_ROUNDS = 1",
        ("tests/detr/model/multiscale/test_selection.py",),
    ),
    "convolutions read the padding": Mutation(
        "detr/model/multiscale/hybrid_encoder.py",
        "x = x if valid_mask is None else x * valid_mask",
        "x = x if valid_mask is None else x",
        ("tests/detr/model/multiscale/test_detector.py",),
    ),
    "padding adds tokens": Mutation(
        "detr/model/multiscale/tokens.py",
        "(corner < sizes[:, None]).all(-1)",
        "(corner < sizes[:, None] + extent).all(-1)",
        ("tests/detr/model/multiscale/test_detector.py",),
    ),
    "a suppressed token may become a query": Mutation(
        "detr/model/multiscale/selection.py",
        "(real & kept).gather(1, chosen)",
        "real.gather(1, chosen)",
        ("tests/detr/model/multiscale/test_selection.py",),
    ),
    "tasks of a killed ingest write after the next ingest has started": Mutation(
        "platform/raydetr/data/ingest/shard_tasks.py",
        "                yield record\n        held.verify()",
        "                yield record",
        ("tests/raydetr/data/ingest/test_ingest_forms.py",),
    ),
    "padding may become a query": Mutation(
        "detr/model/multiscale/selection.py",
        "- 2 * gap * (~grid.valid)",
        "",
        ("tests/detr/model/multiscale/test_selection.py",),
    ),
    "gradients are summed in an order that a restart changes": Mutation(
        "platform/raydetr/training/state.py",
        'if dist.get_backend() == "gloo"',
        'if dist.get_backend() == "none"',
        ("tests/raydetr/training/test_distributed.py",),
    ),
    "the completeness marker is written first": Mutation(
        "platform/raydetr/training/checkpoint.py",
        "storage.delete_folder(target)  # files of an earlier attempt that was interrupted",
        'storage.delete_folder(target)\n    storage.write_bytes(storage.join(target, MARKER), b"")',
        ("tests/raydetr/training/test_checkpoint.py",),
    ),
    "an empty slot has the weight of an image": Mutation(
        "platform/raydetr/data/stream/micro_batch.py",
        "weights=torch.tensor([float(image is not None) for image in images])",
        "weights=torch.tensor([1.0 for image in images])",
        ("tests/raydetr/data/stream/test_micro_batch.py",),
    ),
    "target masks are not padded with their image": Mutation(
        "platform/raydetr/data/stream/micro_batch.py",
        'torch.zeros((count, *row["shape"]), dtype=torch.bool)',
        "torch.zeros((count, height, width), dtype=torch.bool)",
        ("tests/raydetr/training/test_mask_training.py",),
    ),
    "spot nodes are requested again after a refusal": Mutation(
        "platform/raydetr/autoscaling.py",
        "matching, not refused, not node_type",
        "matching, not node_type",
        ("tests/raydetr/test_autoscaling.py",),
    ),
    "jobs are accepted without a token": Mutation(
        "cluster.yaml",
        "--env RAY_AUTH_MODE=token",
        "--env RAY_AUTH_MODE=disabled",
        ("tests/cluster/test_cluster_yaml.py",),
    ),
    "the dashboard listens on all interfaces": Mutation(
        "cluster.yaml",
        "--dashboard-host=127.0.0.1",
        "--dashboard-host=0.0.0.0",
        ("tests/cluster/test_cluster_yaml.py",),
    ),
    "two concurrent promotions both succeed": Mutation(
        "platform/raydetr/conditional.py",
        "return write() or read() == mine",
        "return write() or read() is not None",
        ("tests/raydetr/promotion/test_ledger.py",),
        slow=True,
    ),
    "a file is replaced although another process has changed it": Mutation(
        "platform/raydetr/conditional.py",
        "if current.data != expected.data:",
        "if False:",
        ("tests/raydetr/test_conditional.py",),
    ),
    "an object is replaced although another process has changed it": Mutation(
        "platform/raydetr/conditional.py",
        'condition = {"IfMatch": version} if version else {"IfNoneMatch": "*"}\n        answer',
        "condition: dict[str, str] = {}\n        answer",
        ("tests/raydetr/test_conditional.py",),
    ),
    "a checkpoint is committed after another process has taken the lease": Mutation(
        "platform/raydetr/lease.py",
        'if record.get("owner") != self.owner:',
        "if False:",
        ("tests/raydetr/training/test_checkpoint.py",),
    ),
    "weights that were modified after registration are loaded": Mutation(
        "platform/raydetr/registry/models.py",
        "if expected and found != expected:",
        "if False:",
        ("tests/raydetr/registry/test_models.py",),
    ),
    "a name from a data set leads out of the output": Mutation(
        "detr/output_names.py",
        'if not part.strip("."):',
        "if False:",
        ("tests/detr/test_output_names.py",),
    ),
    "a duplicate detection may have another class": Mutation(
        "platform/raydetr/evaluation/errors_by_kind.py",
        "(same & (iou >= OVERLAP))",
        "(iou >= OVERLAP)",
        ("tests/raydetr/evaluation/test_errors_by_kind.py",),
    ),
    "the bootstrap of a comparison is not paired": Mutation(
        "platform/raydetr/promotion/compare.py",
        "[_score_model(ground_truth, table, seed, resamples) for table in (old, new)]",
        "[_score_model(ground_truth, table, seed + number, resamples) for number, table in enumerate((old, new))]",
        ("tests/raydetr/promotion/test_compare.py",),
    ),
    "a promotion by masks or segments compares the boxes of the classes": Mutation(
        "platform/raydetr/promotion/gate.py",
        "comparison.classes[config.metric]",
        'comparison.classes["AP"]',
        ("tests/pipelines/test_promote_masks.py",),
    ),
    "predictions with other settings are reused": Mutation(
        "platform/raydetr/prediction/predict.py",
        "[model.digest, manifest.digest, asdict(settings)]",
        "[model.digest, manifest.digest]",
        ("tests/raydetr/prediction/test_predict.py",),
        slow=True,
    ),
    "a signal in C code that raises its own exception prints a traceback": Mutation(
        "platform/raydetr/command.py",
        "raise Interrupted(received[0][0]) from error",
        "raise",
        ("tests/raydetr/test_signals_of_commands.py",),
    ),
    "a signal is answered only after C code returns": Mutation(
        "platform/raydetr/command.py",
        "            if number[0] in SIGNALS:\n",
        "            if number[0] in SIGNALS:\n                time.sleep(30)\n",
        (
            "tests/raydetr/test_signals_of_commands.py"
            "::test_a_signal_is_answered_immediately_while_the_main_thread_runs_c_code",
        ),
    ),
    "an interrupted run keeps the status RUNNING": Mutation(
        "platform/raydetr/registry/tracking.py",
        'end_run(uri, run_id, "KILLED" if killed else "FAILED")',
        "pass",
        ("tests/raydetr/registry/test_tracking.py",),
    ),
    "any server at RAY_ADDRESS is accepted as Ray": Mutation(
        "platform/raydetr/cluster.py",
        "if len(greeting) >= 4 and greeting[3] == _HTTP2_SETTINGS:",
        "if greeting:",
        ("tests/raydetr/test_cluster.py",),
    ),
    "looking up a model creates a database": Mutation(
        "platform/raydetr/registry/models.py",
        '    require_database(uri, match["name"])\n',
        "",
        ("tests/raydetr/registry/test_tracking.py",),
    ),
    "objects smaller than two cells pass the preview check": Mutation(
        "platform/raydetr/training/preview.py",
        "MIN_CELLS = 2.0",
        "MIN_CELLS = 0.0",
        ("tests/raydetr/training/test_preview.py",),
    ),
}


def test_make_test_alone_catches_four_of_five() -> None:
    assert sum(not mutation.slow for mutation in MUTATIONS.values()) >= 0.8 * len(MUTATIONS)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_guarantee_fails_its_tests(name: str, tmp_path: Path) -> None:
    mutation = MUTATIONS[name]
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / part)
    file = tmp_path / mutation.file
    text = file.read_text()
    assert text.count(mutation.old) == 1, "the mutation no longer fits the code"
    file.write_text(text.replace(mutation.old, mutation.new))
    tier = ["-m", "not nightly"] if mutation.slow else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tier, *mutation.tests],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{tmp_path / 'platform'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout[-2000:]
    # the test must fail by an assertion, not by an error in the modified code
    failures = ("AssertionError", "assert ", "DID NOT RAISE", "DID NOT WARN")
    assert any(failure in done.stdout for failure in failures), done.stdout[-2000:]
