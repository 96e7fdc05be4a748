"""Random inputs and settings that several benchmarks share."""

import argparse

import torch

NUM_LABELS = 150
NUM_QUERIES = 100


def random_segments(arguments: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Rectangular segments as an index map (B, H, W), and their labels (B, N)."""
    # Every segment owns at least one cell of a 16 x 16 grid.
    cells = torch.stack([torch.randperm(256) for _ in range(arguments.batch)]) % arguments.segments
    cells = cells.view(-1, 1, 16, 16).float()
    index_map = torch.nn.functional.interpolate(cells, size=(arguments.size, arguments.size))[:, 0].long()
    labels = torch.randint(NUM_LABELS, (arguments.batch, arguments.segments))
    return index_map.to(arguments.device), labels.to(arguments.device)


def float_masks(index_map: torch.Tensor, segments: int) -> list[torch.Tensor]:
    """The same segments as transformers takes them: for each image a float mask (N, H, W)."""
    return list((index_map[:, None] == torch.arange(segments, device=index_map.device)[:, None, None]).float())


def autocast(arguments: argparse.Namespace) -> torch.autocast:
    device_type = torch.device(arguments.device).type
    return torch.autocast(device_type, torch.bfloat16, enabled=arguments.bf16)


def check_equal(expected: torch.Tensor, found: torch.Tensor, tolerance: float) -> None:
    """Raises if two peers do not compute the same result; the tolerance is relative to the largest value."""
    difference = ((expected - found).abs().max() / expected.abs().max()).item()
    if not difference <= tolerance:
        raise RuntimeError(f"The results differ by {difference:.1e} of the largest value, so times mean nothing.")
