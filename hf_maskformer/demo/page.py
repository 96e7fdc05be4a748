"""A web page: an image in, its segments out. Needs the extra `demo` (Gradio)."""

from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ..configuration_per_pixel_baseline import is_per_pixel_baseline
from ..data.generated_scenes import GeneratedScenes
from ..evaluation.drawing import label_colors, segment_shades
from ..evaluation.prediction import Prediction, predict, read_images, write_prediction
from ..evaluation.tasks import TASKS, Task, panoptic_thresholds
from ..image_processing_maskformer import MaskFormerImageProcessor
from ..training.starting_point import model_class_of

NUM_EXAMPLES = 5
EXAMPLE_SIDE = 128  # in pixels, as in the scenes on which scripts/demo.py trains
COLUMNS = ("segment", "score", "area in %")
# Title of each threshold and the tasks that have it.
SLIDERS = {
    "threshold": ("Smallest score", ("instance", "panoptic")),
    "mask_threshold": ("Smallest mask probability of a pixel", ("instance", "panoptic")),
    "overlap_mask_area_threshold": ("Smallest part of a mask on top", ("panoptic",)),
}
DISPLAY_SIDE = 1280  # pixels; larger images are shown at this size, but their files keep the original size
OPACITY = 0.6  # of a segment over the picture
# Gradio shows an image of each segment's mask over the input, in the order of the names below.
SHOW_NAMES = """() => document.addEventListener("mousemove", event => {
  const box = event.target.closest("#overlay .image-container");
  if (!box) return;
  const context = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const names = document.querySelectorAll("#overlay .legend button");
  const found = [...box.querySelectorAll("img.mask")].findIndex(mask => {
    const frame = mask.getBoundingClientRect();
    const scale = Math.min(frame.width / mask.naturalWidth, frame.height / mask.naturalHeight);
    const x = (event.clientX - frame.left - frame.width / 2) / scale + mask.naturalWidth / 2;
    const y = (event.clientY - frame.top - frame.height / 2) / scale + mask.naturalHeight / 2;
    context.clearRect(0, 0, 1, 1);
    context.drawImage(mask, Math.floor(x), Math.floor(y), 1, 1, 0, 0, 1, 1);
    return context.getImageData(0, 0, 1, 1).data[3] > 0;
  });
  box.title = found < 0 ? "" : names[found].textContent.trim();
})"""


def launch(checkpoint: str, **options: Any) -> Any:
    """Serves the page for a checkpoint, a folder or a name on the Hub, until it is interrupted.

    Args:
        checkpoint: the model to segment with.
        options: of `gradio.Blocks.launch`, such as `server_port` and `prevent_thread_lock`.
    """
    # System fonts, so that none is downloaded.
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return build_page(checkpoint).launch(theme=theme, js=SHOW_NAMES, footer_links=[], show_error=True, **options)


def build_page(checkpoint: str) -> gr.Blocks:
    """Builds the page with its model. Raises like `from_pretrained` if there is no such checkpoint."""
    model = model_class_of(checkpoint).from_pretrained(checkpoint).eval()
    image_processor: Any = MaskFormerImageProcessor.from_pretrained(checkpoint)
    names: dict[int, str] = model.config.id2label
    tasks = TASKS[:1] if is_per_pixel_baseline(model) else TASKS
    folder = Path(mkdtemp(prefix="hf-maskformer-"))

    def segment(
        path: str | None, task: Task, threshold: float, mask_threshold: float, overlap_mask_area_threshold: float
    ) -> tuple[Any, ...]:
        if path is None:
            raise gr.Error("Choose a picture first.", print_exception=False)
        try:
            ((name, image),) = read_images(path)
            values = (threshold, mask_threshold, overlap_mask_area_threshold)
            options = {name: value for name, value in zip(SLIDERS, values, strict=True) if task in SLIDERS[name][1]}
            prediction = predict(model, image_processor, image, task, **options)
        except (ValueError, OSError) as error:
            message = str(error).replace(path, Path(path).name)
            raise gr.Error(message, duration=None, print_exception=False) from error
        output = Path(mkdtemp(dir=folder))
        labels, segments, overlay = write_prediction(prediction, image, names, task, output, name)
        image.thumbnail((DISPLAY_SIDE, DISPLAY_SIDE))
        masks, colors = annotations(prediction, names, image.size)
        if not masks:
            # A lower mask threshold would enlarge all masks, which then occlude each other.
            helpful = (SLIDERS[name] for name in ("threshold", "overlap_mask_area_threshold"))
            titles = [f'"{title}"' for title, used_by in helpful if task in used_by]
            gr.Warning(f"No segment was found. Try lower values for {' and '.join(titles)}.")
        files = [gr.DownloadButton(value=file, interactive=True) for file in (overlay, labels, segments)]
        return gr.AnnotatedImage((image, masks), color_map=colors), table(prediction), *files

    with gr.Blocks(title="MaskFormer", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(
            f"# MaskFormer\n`{checkpoint}`: {len(names)} labels. Point at a segment to see its name, or at a name to "
            "see its segment."
        )
        with gr.Row():
            with gr.Column(scale=2):
                picture: Any = gr.Image(
                    label="Picture", type="filepath", sources=["upload", "clipboard"], elem_id="picture", height=320
                )
                # `read_images` handles what cameras and scanners write; for a file that is not an image, Gradio would
                # report how its own code failed. (For a subclass of its class, it writes a file next to this one.)
                picture.preprocess = lambda file: file and file.path
                gr.Examples(draw_examples(folder), picture, label="Drawn examples", examples_per_page=NUM_EXAMPLES)
                task = gr.Radio(tasks, value=image_processor.segmentation_task or tasks[0], label="Task")
                thresholds = panoptic_thresholds(image_processor)
                sliders = [
                    gr.Slider(
                        0,
                        1,
                        thresholds[name],
                        step=0.01,
                        label=label,
                        info=f"For {' and '.join(used_by)} segmentation.",
                        interactive=task.value in used_by,
                        elem_id=name,
                    )
                    for name, (label, used_by) in SLIDERS.items()
                ]
                button = gr.Button("Segment", variant="primary", elem_id="segment")
            with gr.Column(scale=3):
                overlay = gr.AnnotatedImage(label="Segments", elem_id="overlay", height=460)
                segments = gr.Dataframe(headers=list(COLUMNS), label="Segments", elem_id="segments", interactive=False)
                with gr.Row():
                    files = [
                        gr.DownloadButton(title, interactive=False, elem_id=name)
                        for title, name in (("Picture (PNG)", "png"), ("Ids (PNG)", "ids"), ("Segments (JSON)", "json"))
                    ]
        task.change(
            lambda task: [gr.Slider(interactive=task in used_by) for _, used_by in SLIDERS.values()], task, sliders
        )
        button.click(segment, [picture, task, *sliders], [overlay, segments, *files])
    return page


def annotations(
    prediction: Prediction, names: dict[int, str], size: tuple[int, int]
) -> tuple[list[tuple[np.ndarray, str]], dict[str, str]]:
    """Mask and title of each segment, and their colours, for `gradio.AnnotatedImage` at a size (width, height)."""
    ids = np.asarray(Image.fromarray(prediction.segmentation.astype(np.int32)).resize(size, Image.Resampling.NEAREST))
    shades = segment_shades(prediction.segments, label_colors(max(names) + 1))
    titles = segment_titles(prediction)
    masks = [(OPACITY * (ids == number), title) for number, title in titles.items()]
    colors = {title: "#" + "".join(f"{int(value):02x}" for value in shades[number]) for number, title in titles.items()}
    return masks, colors


def segment_titles(prediction: Prediction) -> dict[int, str]:
    """The title of each non-empty segment: its label, numbered if several segments share it."""
    segments = [segment for segment in prediction.segments if segment["area"]]
    labels = [segment["label"] for segment in segments]
    return {
        segment["id"]: label if labels.count(label) == 1 else f"{label} {labels[: place + 1].count(label)}"
        for place, (segment, label) in enumerate(zip(segments, labels, strict=True))
    }


def table(prediction: Prediction) -> list[list[Any]]:
    """A row of COLUMNS for each non-empty segment, the largest first."""
    titles = segment_titles(prediction)
    return [
        [
            titles[segment["id"]],
            round(segment["score"], 3) if "score" in segment else None,
            round(100 * segment["area"] / prediction.segmentation.size, 2),
        ]
        for segment in sorted(prediction.segments, key=lambda segment: -segment["area"])
        if segment["area"]
    ]


def draw_examples(folder: Path) -> list[str]:
    """Draws scenes into a folder and returns their paths."""
    # From another series than the scenes on which scripts/demo.py trains.
    scenes = GeneratedScenes(NUM_EXAMPLES, seed=1, image_size=(EXAMPLE_SIDE, EXAMPLE_SIDE))
    paths = [folder / f"{scenes.name(index)}.png" for index in range(len(scenes))]
    for index, path in enumerate(paths):
        Image.fromarray(scenes.scene(index).image).save(path)
    return [str(path) for path in paths]
