"""Every number of zero-shot classification and of retrieval is read off one thing: the rank of the best right answer.

Ranks are counted, never sorted: a query's rank is the number of wrong candidates that score no lower than its best
right one, so one block of scores exists at a time and the whole score matrix never does. Ties count against us: a
collapsed model, for which everything scores the same, gets nothing instead of everything, and so do features that are
not finite.
"""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Equal vectors at different places of a matrix product may differ by the rounding of float32 (1.2e-7 for scores near
# 1, a few times that over 512 products); scores closer than this are a tie.
TIE = 1e-6


def best_positive_ranks(
    queries: Float[Tensor, "queries dim"],
    candidates: Float[Tensor, "candidates dim"],
    query_groups: Int[Tensor, " queries"],
    candidate_groups: Int[Tensor, " candidates"],
    *,
    query_block: int = 1024,
    candidate_block: int = 8192,
) -> Int[Tensor, " queries"]:
    """For each query, how many wrong candidates are at least as good as its best right one; 0 is a hit at 1.

    A candidate is right when its group is the query's. Zero-shot: groups are labels, candidates the classifier's
    vectors. Retrieval: groups are images, to which one or several captions belong. A query with no right candidate
    ranks last.

    Args:
        queries: unit vectors (scores are dot products), on the same device and of the same type as the candidates.
        query_block, candidate_block: at most this many scores exist at a time: 1024 x 8192 are 32 MiB of float32.
    """
    ranks = []
    for chunk, groups in zip(queries.split(query_block), query_groups.split(query_block), strict=True):
        blocks = list(zip(candidates.split(candidate_block), candidate_groups.split(candidate_block), strict=True))
        best = chunk.new_full((len(chunk),), -math.inf)
        for block, block_groups in blocks:
            wrong = groups[:, None] != block_groups
            best = torch.maximum(best, (chunk @ block.T).masked_fill(wrong, -math.inf).amax(1))
        rank = torch.zeros_like(groups, dtype=torch.int64)
        for block, block_groups in blocks:
            # Scored again rather than kept. "Not lower" instead of ">=": what is not a number counts against us.
            ahead = ~(chunk @ block.T < best[:, None] - TIE)
            rank += (ahead & (groups[:, None] != block_groups)).sum(1)
        ranks.append(rank)
    return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.int64, device=queries.device)


def recall_at_k(ranks: Int[Tensor, " queries"], k: int) -> float:
    """Share of queries with a right answer among the first k; for zero-shot ranks this is the top-k accuracy.

    Raises:
        ValueError: no queries.
    """
    _check_not_empty(ranks)
    return float((ranks < k).double().mean())


def median_rank(ranks: Int[Tensor, " queries"]) -> float:
    """Median place of the best right answer, counted from 1; halves occur for an even number of queries."""
    _check_not_empty(ranks)
    return float(np.median(ranks.cpu().numpy())) + 1


def mean_per_class_recall(hits: Bool[Tensor, " rows"], labels: Int[Tensor, " rows"]) -> float:
    """Mean over the classes that occur of each one's share of hits (scikit-learn's balanced accuracy)."""
    _check_not_empty(hits)
    _, index = labels.unique(return_inverse=True)
    rows = torch.bincount(index).double()
    return float((torch.bincount(index, weights=hits.double()) / rows).mean())


def recall_by_chance(positives: Int[Tensor, " queries"], candidates: int, k: int) -> float:
    """What `recall_at_k` is in the mean when candidates are drawn blindly, without replacement.

    Args:
        positives: number of right candidates of each query.
    """
    _check_not_empty(positives)
    miss = torch.ones(len(positives), dtype=torch.float64, device=positives.device)
    for drawn in range(min(k, candidates)):
        miss = miss * (candidates - drawn - positives.double()).clamp(min=0) / (candidates - drawn)
    return float((1 - miss).mean())


def _check_not_empty(values: Tensor) -> None:
    if len(values) == 0:
        raise ValueError("a metric needs at least one row, got none")
