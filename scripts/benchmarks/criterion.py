"""The loss and its gradient alone, starting from mask and pixel embeddings."""

import argparse
import functools
from collections.abc import Callable, Iterator

import torch
from transformers.models.maskformer.modeling_maskformer import MaskFormerHungarianMatcher
from transformers.models.maskformer.modeling_maskformer import MaskFormerLoss as StockLoss

from hf_maskformer import MaskFormerLoss

from .inputs import NUM_LABELS, NUM_QUERIES, autocast, check_equal, float_masks, random_segments
from .measuring import Comparison, Figures, Peers

NUM_LAYERS = 6
SWEEPS = {"size": (256, 384, 512, 640, 768), "segments": (5, 15, 30, 50, 75, 100)}


def criterion(arguments: argparse.Namespace) -> Iterator[Comparison]:
    """Stock against ours on all pixels and on sampled points; with `plot`, ours at several sizes and segment counts."""
    if not arguments.plot:
        yield "criterion", criteria(arguments)
        return
    import matplotlib  # noqa: F401 - fails now if it is missing, not after minutes of measuring

    for setting, values in SWEEPS.items():
        for value in values:
            peers = criteria(argparse.Namespace(**{**vars(arguments), setting: value}), with_stock=False)
            yield f"{setting} {value}", peers


def criteria(arguments: argparse.Namespace, with_stock: bool = True) -> Peers:
    """Mask logits, matching, losses and their gradient with respect to embeddings and class logits."""
    batch, side = arguments.batch, arguments.size // 4
    index_map, labels = random_segments(arguments)
    mask_embeddings = torch.randn(NUM_LAYERS, batch, NUM_QUERIES, 256, device=arguments.device) / 16
    pixel_embeddings = torch.randn(batch, 256, side, side, device=arguments.device)
    class_logits = torch.randn(NUM_LAYERS, batch, NUM_QUERIES, NUM_LABELS + 1, device=arguments.device)
    inputs = [tensor.requires_grad_() for tensor in (mask_embeddings, pixel_embeddings, class_logits)]

    def our_loss(loss: MaskFormerLoss) -> torch.Tensor:
        return loss(class_logits, None, index_map, labels, embeddings=(mask_embeddings, pixel_embeddings))[0]

    ours = MaskFormerLoss(NUM_LABELS).to(arguments.device)
    sampling = MaskFormerLoss(NUM_LABELS, train_num_points=arguments.points).to(arguments.device)
    losses: dict[str, Callable[[], torch.Tensor]] = {
        "ours": functools.partial(our_loss, ours),
        "ours, points": functools.partial(our_loss, sampling),
    }

    if with_stock:
        weights = {"loss_cross_entropy": 1.0, "loss_mask": 20.0, "loss_dice": 1.0}
        matcher = MaskFormerHungarianMatcher(cost_class=1.0, cost_dice=1.0, cost_mask=20.0)
        stock = StockLoss(NUM_LABELS, matcher, weights, eos_coef=0.1).to(arguments.device)
        masks = float_masks(index_map, arguments.segments)

        def stock_loss() -> torch.Tensor:
            mask_logits = torch.einsum("lbqc,bchw->lbqhw", mask_embeddings, pixel_embeddings)
            *auxiliary, last = (
                {"masks_queries_logits": logits, "class_queries_logits": classes}
                for logits, classes in zip(mask_logits, class_logits, strict=True)
            )
            terms = stock(**last, mask_labels=masks, class_labels=list(labels), auxiliary_predictions=auxiliary)
            return sum(weights[name.rstrip("_0123456789")] * term for name, term in terms.items())

        check_equal(stock_loss(), losses["ours"](), tolerance=1e-2 if arguments.bf16 else 1e-4)
        losses = {"stock": stock_loss, **losses}

    def run(loss: Callable[[], torch.Tensor]) -> None:
        with autocast(arguments):
            total = loss()
        total.backward()
        for tensor in inputs:  # at the end, so that every run starts with the same memory
            tensor.grad = None

    return {name: functools.partial(run, loss) for name, loss in losses.items()}


def draw_growth(figures: dict[str, Figures], path: str) -> None:
    """Plots CPU time against the number of pixels and of segments."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, (setting, values) in zip(axes, SWEEPS.items(), strict=True):
        positions = [value**2 / 1e6 for value in values] if setting == "size" else values
        for name in figures[f"{setting} {values[0]}"]:
            seconds = [figures[f"{setting} {value}"][name]["processor_ms"] / 1000 for value in values]
            axis.plot(positions, seconds, marker="o", label=name)
        axis.set(
            xlabel="megapixels per image" if setting == "size" else "segments per image",
            ylabel="processor seconds",
            ylim=0,
        )
    axes[0].legend()
    figure.savefig(path, dpi=110)
