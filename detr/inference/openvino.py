"""OpenVINO engine for `detr.inference.optimize`: computes the backbone and the transformer on a CPU.

Install it with ``pip install 'raydetr[openvino]'``. Measure it with `make bench BENCH='--only openvino'`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from detr.config import DetrConfig
from detr.model.capture import may_branch_on_values
from detr.model.engine import OptimizableModel, WithEngine
from detr.model.multiscale.detector import EncodedMaps, MultiScaleDetector
from detr.model.outputs import DetrModelOutput, ImageFeatures

_PRECISIONS = {None: "f32", torch.float32: "f32", torch.bfloat16: "bf16"}
_EXAMPLE = (2, 128, 96)
"""Images, height and width of the example for export: dimensions that are 1 or equal would not stay dynamic."""


def compute_with_openvino(fast: OptimizableModel, plain: OptimizableModel, dtype: torch.dtype | None) -> None:
    """Make OpenVINO compute the states of a model, or the maps of a multi-scale one.

    It uses as many threads as torch has at the time of this call.

    Args:
        fast: a DETR model, changed in place. Calls with other inputs than images, or that request attention weights or
            hidden states, are still computed by torch.
        plain: the same model in float32 on the CPU, made of torch's own layers; not needed afterwards.
        dtype: dtype in which OpenVINO computes: float32, or bfloat16 if the CPU supports it; None is float32.

    Raises:
        ImportError: OpenVINO is not installed.
        ValueError: the model is not float32 on a CPU or cannot be exported, or OpenVINO does not support the dtype.
    """
    first = next(plain.parameters())
    if first.device.type != "cpu" or first.dtype != torch.float32 or dtype not in _PRECISIONS:
        raise ValueError(
            f"engine='openvino' computes float32 models on a CPU in torch.float32 or torch.bfloat16, got {first.dtype} "
            f"on {first.device} and dtype={dtype}"
        )
    network, source = (
        next(module for module in model.modules() if isinstance(module, WithEngine))
        for model in (fast, plain)
    )
    precision = _PRECISIONS[dtype]
    if isinstance(source, MultiScaleDetector):
        network.engine = _OpenVinoMaps(fast.config, _ExportableMaps(source).eval(), precision)
    else:
        states = _ExportableStates(source, fast.predicts_masks)
        network.engine = _OpenVinoStates(fast.config, states.eval(), precision)


def uses_openvino(model: nn.Module) -> bool:
    """Return whether OpenVINO computes this model."""
    return any(
        isinstance(module, WithEngine) and isinstance(module.engine, _OpenVinoEngine)
        for module in model.modules()
    )


class _Exportable(nn.Module):
    """The function that OpenVINO computes: from images and pixel masks to a tuple of tensors, so it can be exported.

    Args:
        model: the part of a model whose method is exported.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model
        self.channels: int = model.config.num_channels


class _ExportableMaps(_Exportable):
    """`MultiScaleDetector.encode`."""

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, ...]:
        encoded: EncodedMaps = self._model.encode(pixel_values, pixel_mask)
        return (encoded.finest, *encoded.class_maps, *encoded.box_maps)


class _ExportableStates(_Exportable):
    """`DetrModel.states`.

    Args:
        model: a `DetrModel`.
        return_maps: also return the feature maps of the backbone.
    """

    def __init__(self, model: Any, return_maps: bool) -> None:
        super().__init__(model)
        self._return_maps = return_maps
        self.returns_intermediate: bool = model.decoder.auxiliary_loss

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, ...]:
        features, outputs = self._model.states(
            pixel_values, pixel_mask, output_attentions=False, output_hidden_states=False
        )
        tensors = [
            features.cells,
            features.valid_mask,
            outputs.last_hidden_state,
            outputs.encoder_last_hidden_state,
        ]
        if outputs.intermediate_hidden_states is not None:
            tensors.append(outputs.intermediate_hidden_states)
        return (*tensors, *(features.maps if self._return_maps else ()))


class _OpenVinoEngine:
    """Computes a method of a part of a model with OpenVINO if only images and masks are given.

    Args:
        config: configuration of the model.
        exportable: the method, to be exported.
        precision: OpenVINO's name of a dtype.
    """

    def __init__(self, config: DetrConfig, exportable: _Exportable, precision: str) -> None:
        self._config = config
        self._request = _compile(exportable, precision).create_infer_request()
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        """Raise an error: a compiled OpenVINO model cannot be copied."""
        raise TypeError(
            "a model from optimize(engine='openvino') cannot be copied or pickled: copy the original model and optimize "
            "the copy"
        )

    def __call__(
        self, compute: Callable[..., Any], /, pixel_values: Any, pixel_mask: Any = None, **options: Any
    ) -> Any:
        config = self._config
        requested = [*options.values(), config.output_attentions, config.output_hidden_states]
        is_image = isinstance(pixel_values, Tensor) and pixel_values.ndim == 4 and not pixel_values.is_cuda
        size: Any = (len(pixel_values), *pixel_values.shape[2:]) if is_image else None
        if (
            not is_image
            or not may_branch_on_values()  # tracing or export: OpenVINO cannot be part of the graph
            or not pixel_values.numel()  # OpenVINO ignores an empty batch and leaves the results of the previous one
            or pixel_values.shape[1] != config.num_channels
            or (pixel_mask is not None and pixel_mask.shape != size)
            or any(option is not None and option is not False for option in requested)
        ):
            return compute(pixel_values, pixel_mask, **options)
        mask = torch.ones(size, dtype=torch.bool) if pixel_mask is None else pixel_mask.bool()
        with self._lock:
            self._request.infer([pixel_values.detach().float().numpy(), mask.numpy()], share_inputs=True)
            results = [torch.from_numpy(tensor.data) for tensor in self._request.output_tensors]
            # Copy: the next inference overwrites the output memory of the request.
            results = [
                each.to(torch.bool if each.dtype == torch.bool else pixel_values.dtype, copy=True)
                for each in results
            ]
        return self._build_result(results, None if pixel_mask is None or bool(mask.all()) else mask)

    def _build_result(self, _results: list[Tensor], _mask: Tensor | None) -> Any:
        """Build the return value of the method from the outputs of OpenVINO; ``_mask`` is None without padding."""
        raise NotImplementedError


class _OpenVinoMaps(_OpenVinoEngine):
    """`MultiScaleDetector.encode`."""

    def _build_result(self, results: list[Tensor], _mask: Tensor | None) -> Any:
        finest, *maps = results
        return EncodedMaps(finest, maps[: len(maps) // 2], maps[len(maps) // 2 :])


class _OpenVinoStates(_OpenVinoEngine):
    """`DetrModel.states`."""

    def __init__(self, config: DetrConfig, exportable: _ExportableStates, precision: str) -> None:
        super().__init__(config, exportable, precision)
        self._returns_intermediate = exportable.returns_intermediate

    def _build_result(self, results: list[Tensor], _mask: Tensor | None) -> Any:
        cells, valid_mask, last, encoded, *more = results
        intermediate = more.pop(0) if self._returns_intermediate else None
        outputs = DetrModelOutput(
            last_hidden_state=last,
            encoder_last_hidden_state=encoded,
            intermediate_hidden_states=intermediate,
        )
        return ImageFeatures(cells, None if _mask is None else valid_mask, valid_mask, more), outputs


def _compile(exportable: _Exportable, precision: str) -> Any:
    from torch.export import Dim, export  # slow to import

    openvino = _openvino()

    batch, height, width = _EXAMPLE
    example = torch.zeros(batch, exportable.channels, height, width), torch.ones(_EXAMPLE, dtype=torch.bool)
    dynamic = dict.fromkeys((0, 2, 3), Dim.AUTO), dict.fromkeys((0, 1, 2), Dim.AUTO)
    try:
        with torch.no_grad():
            program = export(exportable, example, dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise ValueError(f"engine='openvino': the model cannot be exported by torch ({error})") from error
    network = openvino.convert_model(program)
    fixed = [size for given in network.inputs for size in given.partial_shape if size.is_static]
    if len(fixed) > 1:
        raise ValueError(
            f"engine='openvino': the model was exported with the fixed sizes {fixed}: its backbone requires a fixed "
            "image size, so use engine='torch'"
        )
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # with pinning, all processes on a machine would share the first cores
    }
    return openvino.Core().compile_model(network, "CPU", options)


def _openvino() -> Any:
    # OpenVINO sends telemetry on import unless `openvino_telemetry` cannot be imported.
    telemetry = "openvino_telemetry"
    modules: dict[str, Any] = sys.modules
    absent = telemetry not in modules
    if absent:
        modules[telemetry] = None
    try:
        import openvino
    except ImportError as error:
        raise ImportError(
            "engine='openvino' needs OpenVINO, which is an extra: pip install 'raydetr[openvino]'"
        ) from error
    finally:
        if absent:
            del modules[telemetry]
    return openvino
