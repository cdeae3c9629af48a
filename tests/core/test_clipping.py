import torch

from hpo_verl.core.clipping import clipped_surrogate


def test_bounds_per_token_equal_one_bound_at_a_time():
    generator = torch.Generator().manual_seed(0)
    log_ratio, advantages = torch.randn(2, 8, 16, generator=generator, dtype=torch.float64)
    low = torch.rand(8, 16, generator=generator, dtype=torch.float64) / 2
    high = torch.rand(8, 16, generator=generator, dtype=torch.float64)
    together = clipped_surrogate(log_ratio, advantages, low, high)
    for row in range(8):
        for column in range(16):
            place = (slice(row, row + 1), slice(column, column + 1))
            alone = clipped_surrogate(
                log_ratio[place], advantages[place], low[row, column].item(),
                high[row, column].item(),
            )  # fmt: skip
            assert torch.equal(together.values[place], alone.values)
            assert torch.equal(together.slopes[place], alone.slopes)
