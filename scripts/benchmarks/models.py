"""The whole model: an evaluation pass (`forward`) and a training step (`step`)."""

import argparse
import copy
from collections.abc import Callable, Iterator
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import transformers

from hf_maskformer import MaskFormerConfig, MaskFormerForInstanceSegmentation, MaskFormerImageProcessor
from hf_maskformer.export.exporting import export_model
from hf_maskformer.modeling_maskformer import likely_queries

from .inputs import NUM_LABELS, autocast, check_equal, float_masks, random_segments
from .measuring import Comparison, Figures

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
BACKBONES: dict[str, dict[str, Any]] = {
    "resnet50": {"model_type": "resnet", **STAGES},
    "resnet101": {"model_type": "resnet", "depths": [3, 4, 23, 3], **STAGES},
    "swin-tiny": {"model_type": "swin", "window_size": 7, "drop_path_rate": 0.0, **STAGES},
    "swin-large": {
        "model_type": "swin",
        "embed_dim": 192,
        "depths": [2, 2, 18, 2],
        "num_heads": [6, 12, 24, 48],
        "window_size": 12,
        **STAGES,
    },
    "swin-base": {"drop_path_rate": 0.0, **transformers.MaskFormerConfig().to_dict()["backbone_config"]},
}


PLOT_SIZES = (256, 384, 512, 640, 768)


def forward(arguments: argparse.Namespace) -> Iterator[Comparison]:
    """An evaluation pass of each model; with several widths, over images of each in turn.

    With `kept`, also ours with the masks of only that many queries; with `bf16`, also both with weights and images in
    bfloat16 instead of autocast; with `onnx`, also ours in ONNX Runtime; with `compile`, separate comparisons of both
    compiled, and ours uncompiled; with `plot`, both and ONNX Runtime at several sizes.
    """
    if arguments.plot:
        import matplotlib  # noqa: F401 - fails now if it is missing, not after minutes of measuring
    stock, ours = (model.eval() for model in build_models(arguments, deep_supervision=False, freeze_batch_norm=True))
    session = onnx_session(ours) if arguments.onnx or arguments.plot else None
    if arguments.plot:
        for size in PLOT_SIZES:
            sized = argparse.Namespace(**{**vars(arguments), "size": size})
            yield f"size {size}", passes(stock, ours, [random_images(sized)], sized, session)
        return
    batches = [random_images(arguments, width) for width in arguments.width or [arguments.size]]
    peers = passes(stock, ours, batches, arguments, session)
    if arguments.kept:
        runs = [late_bound(ours, pixel_values, arguments) for pixel_values in batches]
        peers[f"ours, {arguments.kept} kept"] = lambda: [run() for run in runs]
    if arguments.bf16:
        for name, model in (("stock", stock), ("ours", ours)):
            peers[f"{name}, no autocast"] = pass_in_bfloat16(model, batches)
    yield "forward", peers
    if arguments.compile:
        # Frozen weights are constants of the compiled code, which folds and reorders them in advance.
        for name, options in (("compiled", {}), ("compiled, frozen", {"freezing": True})):
            stock_compiled, ours_compiled = (
                torch.compile(model, dynamic=False, options={**options}) for model in (stock, ours)
            )
            compiled = passes(stock_compiled, ours_compiled, batches, arguments)
            yield name, {**compiled, "ours, not compiled": peers["ours"]}


def passes(
    stock: Callable[..., Any],
    ours: Callable[..., Any],
    batches: list[torch.Tensor],
    arguments: argparse.Namespace,
    session: "InferenceSession | None" = None,
) -> dict[str, Callable[[], object]]:
    """A pass of each over these batches, one after the other, after checking that the results agree."""

    def run(model: Callable[..., Any]) -> Any:
        with torch.no_grad(), autocast(arguments):
            return [model(pixel_values) for pixel_values in batches]

    inputs = [{"pixel_values": pixel_values.cpu().numpy()} for pixel_values in batches]
    for pixel_values, as_numpy in zip(batches, inputs, strict=True):
        with torch.no_grad():  # in float32, where they agree closely
            expected, found = (model(pixel_values).masks_queries_logits for model in (stock, ours))
        check_equal(expected, found, tolerance(arguments))
        if session is not None:
            found = torch.from_numpy(session.run(["masks_queries_logits"], as_numpy)[0])
            check_equal(expected.cpu(), found, tolerance(arguments))
    peers: dict[str, Callable[[], object]] = {"stock": lambda: run(stock), "ours": lambda: run(ours)}
    if session is not None:
        peers["ONNX Runtime"] = lambda: [session.run(None, each) for each in inputs]
    return peers


def pass_in_bfloat16(model: torch.nn.Module, batches: list[torch.Tensor]) -> Callable[[], object]:
    """A pass of a bfloat16 copy of the model over bfloat16 images; `passes` checks that the models agree in float32."""
    model, batches = copy.deepcopy(model).bfloat16(), [pixel_values.bfloat16() for pixel_values in batches]
    return torch.no_grad()(lambda: [model(pixel_values) for pixel_values in batches])


def onnx_session(model: MaskFormerForInstanceSegmentation) -> "InferenceSession":
    """An ONNX Runtime session of the model for any size, with as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with TemporaryDirectory() as folder:
        path = export_model(model, MaskFormerImageProcessor(), folder)
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def draw_latency(figures: dict[str, Figures], path: str) -> None:
    """Plots the time of a pass against the side of the images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.5), layout="constrained")
    axis = figure.subplots()
    for name in next(iter(figures.values())):
        axis.plot(PLOT_SIZES, [peers[name]["median_ms"] for peers in figures.values()], marker="o", label=name)
    axis.set(xlabel="side of the image, pixels", ylabel="milliseconds", ylim=0, xticks=PLOT_SIZES)
    axis.legend()
    figure.savefig(path, dpi=110)


def late_bound(
    model: MaskFormerForInstanceSegmentation, pixel_values: torch.Tensor, arguments: argparse.Namespace
) -> Callable[[], object]:
    """`predict` with a threshold that keeps `kept` queries of one image and at most as many of the others."""
    with torch.no_grad(), autocast(arguments):
        everything = model(pixel_values)
    scores = everything.class_queries_logits.float().softmax(-1)[..., :-1].amax(-1)
    # Random weights are confident about nothing, so the threshold depends on the scores: it is between the last query
    # to keep and the next one, of the image whose next one has the highest score.
    last, following = scores.topk(arguments.kept + 1).values[:, -2:].unbind(1)
    image = following.argmax()
    threshold = float(last[image] + following[image]) / 2

    def run() -> Any:
        with autocast(arguments):
            return model.predict(pixel_values, threshold=threshold)

    found = run().masks_queries_logits
    if found.shape[1] != arguments.kept:
        raise RuntimeError(f"The threshold {threshold} keeps {found.shape[1]} queries, not {arguments.kept}.")
    kept = likely_queries(everything.class_queries_logits, threshold)[..., None, None]
    check_equal(everything.masks_queries_logits.take_along_dim(kept, 1), found, tolerance(arguments))
    return run


def step(arguments: argparse.Namespace) -> Iterator[Comparison]:
    """Forward, loss and backward with deep supervision. Each model gets its own best form of the targets."""
    frozen = arguments.freeze_batch_norm
    stock, ours = (model.train() for model in build_models(arguments, deep_supervision=True, freeze_batch_norm=frozen))
    if frozen:
        freeze_batch_norm_of_stock(stock)
    pixel_values = random_images(arguments)
    index_map, labels = random_segments(arguments)
    masks = float_masks(index_map, arguments.segments)

    def run(model: torch.nn.Module, **inputs: Any) -> None:
        with autocast(arguments):
            loss = model(pixel_values, **inputs).loss
        loss.backward()
        model.zero_grad()  # at the end, so that every run starts with the same memory

    # Without hidden states transformers crashes under deep supervision; with them it has one more layer than ours.
    yield (
        "step",
        {
            "stock": lambda: run(stock, mask_labels=masks, class_labels=list(labels), output_hidden_states=True),
            "ours": lambda: run(ours, mask_labels=index_map, class_labels=labels),
        },
    )


def build_models(
    arguments: argparse.Namespace, deep_supervision: bool, freeze_batch_norm: bool
) -> tuple[transformers.MaskFormerForInstanceSegmentation, MaskFormerForInstanceSegmentation]:
    """transformers' model and ours with the same random weights."""
    config = new_config(arguments, deep_supervision=deep_supervision, freeze_batch_norm=freeze_batch_norm)
    ours = MaskFormerForInstanceSegmentation(config)
    return stock_of(ours).to(arguments.device), ours.to(arguments.device)


def new_config(arguments: argparse.Namespace, **settings: Any) -> MaskFormerConfig:
    settings = {"num_labels": NUM_LABELS, **settings}
    return MaskFormerConfig(backbone_config=BACKBONES[arguments.backbone], **settings)


def stock_of(ours: MaskFormerForInstanceSegmentation) -> transformers.MaskFormerForInstanceSegmentation:
    """transformers' model with the same weights and matching costs, and with deep supervision if ours has it."""
    with TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        stock = transformers.MaskFormerForInstanceSegmentation.from_pretrained(
            folder, use_auxiliary_loss=ours.config.deep_supervision
        )
    for name, cost in ours.config.matching_costs.items():
        cost_name = "cost_" + name.removesuffix("_cost")
        assert hasattr(stock.matcher, cost_name)
        setattr(stock.matcher, cost_name, cost)  # it does not read `class_cost` from the configuration
    return stock


def freeze_batch_norm_of_stock(stock: transformers.MaskFormerForInstanceSegmentation) -> None:
    """Does for transformers' model in training what `freeze_batch_norm` does for ours: it has no such setting."""
    for module in stock.model.pixel_level_module.encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval().requires_grad_(False)


def random_images(arguments: argparse.Namespace, width: int | None = None) -> torch.Tensor:
    return torch.randn(arguments.batch, 3, arguments.size, width or arguments.size, device=arguments.device)


def tolerance(arguments: argparse.Namespace) -> float:
    """How much results may differ: GPUs may round products to TF32, and bfloat16 has 8 bits."""
    if arguments.bf16:
        return 5e-2
    return 1e-2 if arguments.device.startswith("cuda") else 1e-4
