import math

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from msclip.eval.metrics import best_positive_ranks, mean_per_class_recall, median_rank, recall_at_k, recall_by_chance


def ranks_of(scores: list[list[float]] | np.ndarray, query_groups: list[int], candidate_groups: list[int]) -> torch.Tensor:
    """Ranks for a written-out score matrix: unit vectors as candidates make the products the scores themselves."""
    queries = torch.as_tensor(scores, dtype=torch.float64)
    return best_positive_ranks(
        queries, torch.eye(queries.shape[1]).double(), torch.tensor(query_groups), torch.tensor(candidate_groups)
    )


def test_the_rank_counts_the_wrong_candidates_ahead_of_the_right_one() -> None:
    scores = [[0.9, 0.1, 0.5], [0.9, 0.1, 0.5], [0.9, 0.1, 0.5]]
    assert ranks_of(scores, [0, 1, 2], [0, 1, 2]).tolist() == [0, 2, 1]


def test_the_best_of_several_right_candidates_decides() -> None:
    # Candidates 1, 3 and 4 are right, and 0.6 of candidate 3 is beaten by candidate 0 alone.
    assert ranks_of([[0.7, 0.1, 0.5, 0.6, 0.2]], [4], [0, 4, 2, 4, 4]).tolist() == [1]


def test_a_tie_counts_against_the_right_answer() -> None:
    assert ranks_of([[0.5, 0.5, 0.5]], [1], [0, 1, 2]).tolist() == [2]


def test_right_answers_that_tie_with_each_other_do_not_count() -> None:
    assert ranks_of([[0.5, 0.5, 0.1]], [1], [1, 1, 2]).tolist() == [0]


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_score_that_is_not_a_number_never_helps(wrong: int) -> None:
    scores = [[0.9, 0.1]]
    scores[0][wrong] = math.nan
    # As a product with unit vectors spreads the NaN over the row, as it would with a model's features.
    assert ranks_of(scores, [0], [0, 1]).tolist() == [1]


def test_a_query_without_any_right_candidate_ranks_last() -> None:
    assert ranks_of([[0.9, 0.1]], [7], [0, 1]).tolist() == [2]


def test_blocks_of_any_size_give_the_same_ranks() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(37, 16, generator=generator), dim=-1)
    texts = torch.nn.functional.normalize(torch.randn(101, 16, generator=generator), dim=-1)
    owners = torch.arange(101) % 37
    scores = images @ texts.T
    right = owners == torch.arange(37)[:, None]
    best = scores.masked_fill(~right, -2).amax(1, keepdim=True)
    expected = ((scores >= best) & ~right).sum(1)
    for block in (1, 8, 1000):
        ranks = best_positive_ranks(images, texts, torch.arange(37), owners, query_block=block, candidate_block=block)
        assert ranks.tolist() == expected.tolist()


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_accuracy_is_scikit_learns(k: int) -> None:
    rng = np.random.default_rng(1)
    scores, labels = rng.normal(size=(200, 8)), rng.integers(0, 8, 200)
    ranks = ranks_of(scores, labels.tolist(), list(range(8)))
    assert recall_at_k(ranks, k) == pytest.approx(top_k_accuracy_score(labels, scores, k=k), abs=1e-12)


def test_mean_per_class_recall_is_scikit_learns_also_where_a_class_never_occurs() -> None:
    rng = np.random.default_rng(2)
    labels = rng.choice([0, 1, 4, 5], size=300, p=[0.7, 0.2, 0.05, 0.05])
    predicted = np.where(rng.random(300) < 0.6, labels, rng.integers(0, 6, 300))
    ours = mean_per_class_recall(torch.from_numpy(predicted == labels), torch.from_numpy(labels))
    with pytest.warns(UserWarning, match="not in y_true"):
        assert ours == pytest.approx(balanced_accuracy_score(labels, predicted), abs=1e-12)


def test_the_median_rank_counts_from_one() -> None:
    assert median_rank(torch.tensor([0, 0, 7])) == 1
    assert median_rank(torch.tensor([0, 1, 2, 9])) == 2.5


def test_chance_is_what_blind_guesses_reach() -> None:
    assert recall_by_chance(torch.tensor([1]), 1000, 10) == pytest.approx(0.01)
    # Of 10 candidates 3 are right; the first two drawn are both wrong with 7/10 x 6/9.
    assert recall_by_chance(torch.tensor([3]), 10, 2) == pytest.approx(1 - 7 / 10 * 6 / 9)
    assert recall_by_chance(torch.tensor([3]), 10, 50) == 1


def test_no_rows_are_an_error_and_not_a_number() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        recall_at_k(torch.zeros(0, dtype=torch.int64), 1)
