"""A transformers model with our experts under FSDP2 on two ranks trains as eager experts do in one process."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import fsdp_jobs
from tests.helpers.gloo import Pool

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_sharded_training_is_that_of_one_process(pool: Pool, name: str) -> None:
    ids = torch.randint(0, 64, (4, 9))
    expected_norms, expected = fsdp_jobs.train(fsdp_jobs.make(name, "eager"), ids)
    assert expected_norms[0] != expected_norms[-1]
    for norms, weights in pool.run(fsdp_jobs.train_sharded, [(name, ids), (name, ids)]):
        torch.testing.assert_close(norms, expected_norms)
        for key, value in expected.items():
            torch.testing.assert_close(weights[key], value, msg=lambda text, key=key: f"{key}: {text}")
