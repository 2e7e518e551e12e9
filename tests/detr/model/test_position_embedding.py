import pytest
import torch
from transformers.models.detr.modeling_detr import DetrLearnedPositionEmbedding, DetrSinePositionEmbedding

from detr.model.position_embedding import LearnedPositionEmbedding, SinePositionEmbedding


def padded_mask() -> torch.Tensor:
    mask = torch.zeros(4, 7, 9, dtype=torch.bool)
    mask[0], mask[1, :4, :9], mask[2, :1, :1] = True, True, True  # the last image is only padding
    return mask


@pytest.mark.checklist("3. Position embeddings and transformer", "sine")
@pytest.mark.parametrize("dim", [16, 64, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sine_embeddings_equal_transformers_with_and_without_padding(dim, dtype, difference):
    mask = padded_mask()
    theirs = DetrSinePositionEmbedding(dim // 2, normalize=True)
    expected = theirs(shape=torch.Size((4, dim, 7, 9)), device="cpu", dtype=dtype, mask=mask)
    ours = SinePositionEmbedding(dim)(mask, dtype)
    assert ours.dtype == dtype
    assert ours.isfinite().all()
    if dtype == torch.float64:
        difference(float((ours - expected).abs().max()))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.checklist("3. Position embeddings and transformer", "sine")
@pytest.mark.known_issue(25)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_the_result(dtype):
    mask = torch.ones(1, 40, 40, dtype=torch.bool)
    embedding = SinePositionEmbedding(64)
    assert torch.equal(embedding(mask, dtype), embedding(mask, torch.float32).to(dtype))


@pytest.mark.checklist("3. Position embeddings and transformer", "learned")
def test_learned_embeddings_equal_transformers():
    ours, theirs = LearnedPositionEmbedding(16), DetrLearnedPositionEmbedding(8)
    theirs.load_state_dict(ours.state_dict())
    mask = padded_mask()
    expected = theirs(torch.Size((4, 16, 7, 9)), "cpu", torch.float32, mask)
    assert torch.equal(ours(mask, torch.float32), expected)


def test_learned_embeddings_use_updated_weights_and_accumulate_gradients():
    embedding, mask = LearnedPositionEmbedding(8), torch.ones(1, 2, 3, dtype=torch.bool)
    before = embedding(mask, torch.float32)
    for _ in range(2):
        embedding(mask, torch.float32).sum().backward()
    with torch.no_grad():
        embedding.row_embeddings.weight.add_(1)
    assert not torch.equal(embedding(mask, torch.float32), before)
    assert embedding.row_embeddings.weight.grad[0].eq(2 * 3).all()


@pytest.mark.checklist("3. Position embeddings and transformer", "learned")
@pytest.mark.parametrize("shape", [(51, 3), (3, 51)])
def test_learned_embeddings_reject_a_feature_map_that_is_too_large(shape):
    embedding = LearnedPositionEmbedding(8)
    assert embedding(torch.ones(1, 50, 50, dtype=torch.bool), torch.float32).shape == (1, 8, 50, 50)
    with pytest.raises(ValueError, match=r"at most 50 x 50.*'sine'"):
        embedding(torch.ones(1, *shape, dtype=torch.bool), torch.float32)
