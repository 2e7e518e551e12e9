"""The return type of an image processor: a dict whose entries are also attributes."""

from typing import Any

import torch


class BatchFeature(dict[str, Any]):
    """A dict with attribute access and `.to(device)`, like transformers' class of this name.

    Holds `pixel_values`, `pixel_mask` and `labels`; each element of `labels` is also a `BatchFeature`.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no entry {name!r}; there are {sorted(self)}") from None

    def to(
        self,
        device: torch.device | str | int | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> "BatchFeature":
        """Move every tensor, including labels, in place and return itself; the first argument may be a dtype.

        A dtype applies to floating-point tensors only: masks, ids and sizes keep their own.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device

        def move(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                target = dtype if value.is_floating_point() else None
                return value.to(device=device, dtype=target, non_blocking=non_blocking)
            if isinstance(value, BatchFeature):
                return value.to(device, dtype, non_blocking)
            if isinstance(value, list):
                return [move(element) for element in value]
            return value

        for key, value in self.items():
            self[key] = move(value)
        return self
