"""OpenVINO for `detr.inference.optimize`: an engine for CPUs that a user may pick, which computes the backbone and the transformer.

It is an extra, ``pip install 'raydetr[openvino]'``. What it pays: `make bench BENCH='--only openvino'`.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from detr.model.capture import may_branch_on_values
from detr.model.multiscale.detector import EncodedMaps, MultiScaleDetector
from detr.model.outputs import DetrModelOutput, ImageFeatures

_PRECISIONS = {None: "f32", torch.float32: "f32", torch.bfloat16: "bf16"}
_EXAMPLE = (2, 128, 96)
"""Images, height and width of what is exported: dimensions that are 1 or equal would not stay free."""


def compute_with_openvino(fast: nn.Module, plain: nn.Module, dtype: torch.dtype | None) -> None:
    """Have OpenVINO compute the states of a model, or the maps of a multi-scale one, with as many threads as torch has now.

    Args:
        fast: a DETR model, changed in place. What is not an image (embeddings, or a wish for attention weights), it
            computes itself.
        plain: the same model in float32 on the CPU, of torch's own layers; not needed afterwards.
        dtype: what OpenVINO computes in: float32, or bfloat16 where the processor can; None is float32.

    Raises:
        ImportError: OpenVINO is not installed.
        ValueError: the model is not float32 on a CPU, cannot be exported, or OpenVINO has no such dtype.
    """
    first = next(plain.parameters())
    if first.device.type != "cpu" or first.dtype != torch.float32 or dtype not in _PRECISIONS:
        raise ValueError(
            f"engine='openvino' computes float32 models on a CPU in torch.float32 or torch.bfloat16, got {first.dtype} "
            f"on {first.device} and dtype={dtype}"
        )
    precision = _PRECISIONS[dtype]
    for inner, source in zip(fast.modules(), plain.modules(), strict=False):
        if isinstance(inner, MultiScaleDetector):
            vars(inner)["encode"] = _OpenVinoMaps(inner, _Maps(source).eval(), precision)
            return
    found: list[Any] = [
        next(module for module in each.modules() if hasattr(module, "states")) for each in (fast, plain)
    ]
    tensors = _States(found[1], hasattr(fast, "mask_context"))
    vars(found[0])["states"] = _OpenVinoStates(found[0], tensors.eval(), precision)


def uses_openvino(model: nn.Module) -> bool:
    """Whether OpenVINO computes this model."""
    return any(isinstance(each, _OpenVino) for module in model.modules() for each in vars(module).values())


class _Tensors(nn.Module):
    """What OpenVINO computes: a function of images and their masks, with a tuple of tensors, which can be exported.

    Args:
        model: the part of a model that it belongs to.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model
        self.channels = model.config.num_channels


class _Maps(_Tensors):
    """`MultiScaleDetector.encode`."""

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, ...]:
        encoded: EncodedMaps = self._model.encode(pixel_values, pixel_mask)
        return (encoded.finest, *encoded.class_maps, *encoded.box_maps)


class _States(_Tensors):
    """`DetrModel.states`.

    Args:
        model: a `DetrModel`.
        wants_maps: also return the backbone's maps.
    """

    def __init__(self, model: Any, wants_maps: bool) -> None:
        super().__init__(model)
        self._wants_maps = wants_maps

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, ...]:
        features, outputs = self._model.states(
            pixel_values, pixel_mask, output_attentions=False, output_hidden_states=False
        )
        found = [
            features.cells,
            features.counted,
            outputs.last_hidden_state,
            outputs.encoder_last_hidden_state,
        ]
        if outputs.intermediate_hidden_states is not None:
            found.append(outputs.intermediate_hidden_states)
        return (*found, *(features.maps if self._wants_maps else ()))


class _OpenVino:
    """A method of a part of a model, computed by OpenVINO where nothing but images is given.

    Args:
        model: the part, which may hold this.
        tensors: of the same part.
        precision: OpenVINO's name of a dtype.
    """

    method = ""
    """Its name."""

    def __init__(self, model: Any, tensors: _Tensors, precision: str) -> None:
        self._compute: Callable[..., Any] = getattr(type(model), self.method)
        self._model = weakref.ref(model)  # no circle
        self._request = _compiled(tensors, precision).create_infer_request()
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        """Raise an error: what OpenVINO has compiled cannot be copied."""
        raise TypeError(
            "a model from optimize(engine='openvino') cannot be copied or pickled: copy the one it was made from, and "
            "optimize that"
        )

    def __call__(self, pixel_values: Any, pixel_mask: Any = None, **options: Any) -> Any:
        model: Any = self._model()
        config = model.config
        asked = [*options.values(), config.output_attentions, config.output_hidden_states]
        images = isinstance(pixel_values, Tensor) and pixel_values.ndim == 4 and not pixel_values.is_cuda
        size: Any = (len(pixel_values), *pixel_values.shape[2:]) if images else None
        if (
            not images
            or not may_branch_on_values()  # a recorded graph: OpenVINO is no part of it
            or not pixel_values.numel()  # of which OpenVINO makes nothing, and what it had before stays
            or pixel_values.shape[1] != config.num_channels
            or (pixel_mask is not None and pixel_mask.shape != size)
            or any(option is not None and option is not False for option in asked)
        ):
            return self._compute(model, pixel_values, pixel_mask, **options)
        mask = torch.ones(size, dtype=torch.bool) if pixel_mask is None else pixel_mask.bool()
        with self._lock:
            self._request.infer([pixel_values.detach().float().numpy(), mask.numpy()], share_inputs=True)
            results = [torch.from_numpy(tensor.data) for tensor in self._request.output_tensors]
            # Copies: the request writes to the same memory when it is asked again.
            results = [
                each.to(torch.bool if each.dtype == torch.bool else pixel_values.dtype, copy=True)
                for each in results
            ]
        return self._returned(model, results, None if pixel_mask is None or bool(mask.all()) else mask)

    def _returned(self, _model: Any, _results: list[Tensor], _mask: Tensor | None) -> Any:
        """What the method returns, from what OpenVINO computed; ``_mask`` is None where all pixels are real."""
        raise NotImplementedError


class _OpenVinoMaps(_OpenVino):
    """`MultiScaleDetector.encode`."""

    method = "encode"

    def _returned(self, _model: Any, results: list[Tensor], _mask: Tensor | None) -> Any:
        finest, *maps = results
        return EncodedMaps(finest, maps[: len(maps) // 2], maps[len(maps) // 2 :])


class _OpenVinoStates(_OpenVino):
    """`DetrModel.states`."""

    method = "states"

    def _returned(self, _model: Any, results: list[Tensor], _mask: Tensor | None) -> Any:
        cells, counted, last, encoded, *more = results
        intermediate = more.pop(0) if _model.decoder.auxiliary_loss else None
        outputs = DetrModelOutput(
            last_hidden_state=last,
            encoder_last_hidden_state=encoded,
            intermediate_hidden_states=intermediate,
        )
        return ImageFeatures(cells, None if _mask is None else counted, counted, more), outputs


def _compiled(tensors: _Tensors, precision: str) -> Any:
    from torch.export import Dim, export  # takes a while to import

    openvino = _openvino()

    batch, height, width = _EXAMPLE
    example = torch.zeros(batch, tensors.channels, height, width), torch.ones(_EXAMPLE, dtype=torch.bool)
    free = dict.fromkeys((0, 2, 3), Dim.AUTO), dict.fromkeys((0, 1, 2), Dim.AUTO)
    try:
        with torch.no_grad():
            program = export(tensors, example, dynamic_shapes=free, strict=False)
    except Exception as error:
        raise ValueError(f"engine='openvino': the model cannot be exported by torch ({error})") from error
    network = openvino.convert_model(program)
    fixed = [size for given in network.inputs for size in given.partial_shape if size.is_static]
    if len(fixed) > 1:
        raise ValueError(
            f"engine='openvino': the model is exported for images of {fixed} alone: its backbone asks for a size"
        )
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # several processes of a machine would share the first cores
    }
    return openvino.Core().compile_model(network, "CPU", options)


def _openvino() -> Any:
    # It tells its makers over the internet that it is imported, unless its package for that is missing.
    reports = "openvino_telemetry"
    modules: dict[str, Any] = sys.modules
    absent = reports not in modules
    if absent:
        modules[reports] = None
    try:
        import openvino
    except ImportError as error:
        raise ImportError(
            "engine='openvino' needs OpenVINO, which is an extra: pip install 'raydetr[openvino]'"
        ) from error
    finally:
        if absent:
            del modules[reports]
    return openvino
