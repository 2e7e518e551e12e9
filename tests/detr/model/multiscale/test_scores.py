"""Conversion of sigmoid scores to a softmax."""

import torch

from detr.model.multiscale.scores import softmax_logits


def test_scores_that_add_up_to_less_than_one_are_the_probabilities():
    logits = torch.randn(100, 5, dtype=torch.float64) - 4
    probabilities = softmax_logits(logits).softmax(-1)
    torch.testing.assert_close(probabilities[:, :-1], logits.sigmoid())
    torch.testing.assert_close(probabilities[:, -1], 1 - logits.sigmoid().sum(1))


def test_the_best_class_keeps_its_score_whatever_the_others_are():
    logits = 6 * torch.randn(1000, 5, dtype=torch.float64)
    converted = softmax_logits(logits)
    torch.testing.assert_close(converted.exp().sum(-1), torch.ones(1000, dtype=torch.float64))
    scores, labels = converted.softmax(-1)[:, :-1].max(-1)
    best, index = logits.sigmoid().max(-1)
    torch.testing.assert_close(scores, best, rtol=1e-6, atol=1e-6)
    assert (labels == index)[best < 1 - 1e-6].all()


def test_extreme_scores_stay_finite():
    logits = torch.tensor([[-200.0, -300.0], [200.0, 200.0], [0.0, 0.0]], requires_grad=True)
    converted = softmax_logits(logits)
    assert converted.isfinite().all()
    converted.sum().backward()
    assert logits.grad.isfinite().all()
