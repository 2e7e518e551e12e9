"""`running_argmax` equals the argmax of the stacked maps; ties go to the first map."""

import pytest
import torch

from detr.postprocess.running_argmax import running_argmax


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 40, 300])
def test_running_argmax_equals_the_argmax_of_the_stack(dtype, count):
    maps = torch.randint(-5, 5, (count, 13, 17), generator=torch.Generator().manual_seed(count)).to(dtype)
    before = maps.clone()
    index = running_argmax(iter(maps))
    assert index.dtype == torch.int32
    assert torch.equal(index, maps.argmax(0).int())
    assert torch.equal(maps, before)


def test_maps_may_require_gradients():
    maps = torch.randn(3, 4, 5, requires_grad=True)
    assert torch.equal(running_argmax(maps), maps.argmax(0).int())


def test_at_least_one_map_is_required():
    with pytest.raises(ValueError, match="no maps"):
        running_argmax([])
