import pytest
import torch

from detr.config import DetrConfig
from detr.model.detection import DetrModel
from detr.model.initialization import init_local_attention, init_mask_scales, query_points, sine_embedding
from detr.model.position_embedding import SinePositionEmbedding
from detr.model.segmentation import DetrForSegmentation


def test_the_embedding_of_a_point_equals_that_of_the_cell_whose_bottom_right_corner_it_is():
    mask = torch.ones(1, 6, 8, dtype=torch.bool)
    cells = SinePositionEmbedding(32)(mask, torch.float32)[0]
    points = torch.tensor([[(x + 1) / 8, (y + 1) / 6] for y in range(6) for x in range(8)])
    torch.testing.assert_close(sine_embedding(points, 32), cells.flatten(1).T, rtol=0, atol=1e-5)


def test_query_points_cover_the_image():
    points = query_points(40)
    assert ((points >= 0) & (points < 1)).all()
    squares = {(int(4 * x), int(4 * y)) for x, y in points.tolist()}
    assert len(squares) == 16


def test_local_heads_of_new_queries_attend_to_the_surroundings_of_their_points():
    torch.manual_seed(0)
    config = DetrConfig(
        backbone="resnet18", d_model=128, encoder_layers=1, decoder_layers=1, num_queries=20, dropout=0.0
    )
    model = DetrModel(config).eval()
    init_local_attention(model)
    height, width = 12, 16
    features = torch.randn(1, height * width, 128)
    position = model.position_embedding(torch.ones(1, height, width, dtype=torch.bool), torch.float32)
    position = position.flatten(2).transpose(1, 2)
    queries = model.query_position_embeddings.weight[None]
    with torch.no_grad():
        memory = model.encoder(features, None, position).last_hidden_state
        decoded = model.decoder(torch.zeros_like(queries), queries, None, memory, None, position, True)
    attention = decoded.cross_attentions[0][0]  # [heads, queries, cells]
    y, x = torch.meshgrid(
        (torch.arange(height) + 1) / height, (torch.arange(width) + 1) / width, indexing="ij"
    )
    cells = torch.stack((x.flatten(), y.flatten()), dim=1)
    distances = torch.cdist(query_points(20), cells)
    inside = ((query_points(20) > 0.15) & (query_points(20) < 0.85)).all(
        1
    )  # the kernel wraps around the edges
    distance = (attention * distances).sum(-1)[:, inside].mean(1)
    assert (distance[0::2] < 0.2).all()
    assert (distance[1::2] > 0.3).all()


def test_extra_queries_get_further_points():
    torch.manual_seed(0)
    model = DetrModel(DetrConfig(backbone="resnet10t", d_model=32, num_queries=5))
    extra = torch.zeros(2, 5, 32)
    init_local_attention(model, extra)
    together = torch.cat((model.query_position_embeddings.weight.detach(), extra.flatten(0, 1)))
    assert torch.equal(together, sine_embedding(query_points(15), 32))


@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "resnet18"])
def test_masks_depend_on_their_queries_after_init_mask_scales(backbone: str) -> None:
    torch.manual_seed(0)
    config = DetrConfig(
        backbone=backbone,
        backbone_kwargs={"out_indices": [1, 2, 3, 4]},
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        num_queries=6,
    )
    model = DetrForSegmentation(config)
    images = torch.rand(2, 3, 64, 96) - 0.5
    detector = {name: value.clone() for name, value in model.detr.state_dict().items()}

    def share_of_queries() -> float:
        """Return the standard deviation of mask logits over queries, relative to that over everything."""
        with torch.no_grad():
            masks = model.eval()(images).pred_masks
        return float((masks.std(1).mean() / masks.std()).item())

    before = share_of_queries()
    model.train()
    init_mask_scales(model)
    assert model.training
    after = share_of_queries()
    print(f"{backbone}: {before:.1e} before, {after:.2f} after")
    assert after > max(0.02, 3 * before)
    assert all(torch.equal(value, detector[name]) for name, value in model.detr.state_dict().items())
