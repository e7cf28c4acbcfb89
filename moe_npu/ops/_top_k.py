"""The k largest values of each row with ties to the lower index, which ``torch.topk`` leaves open; on CPU."""

from __future__ import annotations

import torch

_INDEX_BITS = 16


def stable_top_k(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first k of a stable descending sort of the last dimension, and their indices, int64."""
    if values.element_size() == 2 and values.size(-1) <= 1 << _INDEX_BITS:
        index = _top_k_of_halves(values, k)
        return values.gather(-1, index), index
    best, index = torch.topk(values, min(k + 1, values.size(-1)), dim=-1)
    # only rows with equal neighbours, the first value left out included, have to be sorted; NaN is not less either
    undecided = ~(best[..., 1:] < best[..., :-1]).all(-1)
    best, index = best[..., :k], index[..., :k]
    if undecided.any():
        ordered, order = torch.sort(values[undecided], dim=-1, descending=True, stable=True)
        best[undecided], index[undecided] = ordered[..., :k], order[..., :k]
    return best, index


def _top_k_of_halves(values: torch.Tensor, k: int) -> torch.Tensor:
    """Half precision is full of ties: compare integers, values in the high bits and the reversed index in the low."""
    # one zero and one NaN, which is larger than everything
    bits = (values + 0.0).masked_fill(values.isnan(), torch.nan).view(torch.int16)
    ordered = (bits ^ ((bits >> 15) & 0x7FFF)).to(torch.int32)  # negative floats descend as integers
    reversed_index = torch.arange(values.size(-1) - 1, -1, -1, dtype=torch.int32, device=values.device)
    keys = torch.topk((ordered << _INDEX_BITS) | reversed_index, k, dim=-1).values
    return values.size(-1) - 1 - (keys & ((1 << _INDEX_BITS) - 1)).long()
