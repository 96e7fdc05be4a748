"""transformers' own pipeline with our objects, and the adapted one."""

import base64
import io
import itertools
import logging
import re
import threading
import warnings

import numpy as np
import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from models import tiny_model
from PIL import Image
from test_per_pixel_baseline import tiny_baseline
from transformers import pipeline
from transformers.models.maskformer.image_processing_pil_maskformer import MaskFormerImageProcessorPil

from hf_maskformer import MaskFormerImageProcessor
from hf_maskformer.evaluation import pipeline as pipeline_module
from hf_maskformer.evaluation.pipeline import OPTIONS, MaskFormerPipeline
from hf_maskformer.evaluation.tasks import instance_options, outputs_for
from hf_maskformer.modeling_maskformer_outputs import MaskFormerForInstanceSegmentationOutput
from hf_maskformer.modeling_maskformer_pixel_level import sizes_in_batch
from hf_maskformer.modeling_per_pixel_baseline import PerPixelBaselineOutput

THRESHOLDS = {"threshold": 0.0, "overlap_mask_area_threshold": 0.0}


def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((40, 60), (50, 30), (40, 60))
    ]


def processor(**settings) -> MaskFormerImageProcessor:
    return MaskFormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 200}, **settings)


def segmenter(model: torch.nn.Module | None = None, **settings) -> MaskFormerPipeline:
    return pipeline(
        "image-segmentation",
        model=(model or tiny_model()).eval(),
        image_processor=processor(**settings),
        pipeline_class=MaskFormerPipeline,
        device="cpu",
    )


@pytest.mark.parametrize("subtask", [None, "panoptic", "instance", "semantic"])
def test_the_stock_pipeline_takes_our_objects_without_a_word(subtask, caplog, recwarn):
    warnings.simplefilter("always")
    logging.getLogger("transformers").propagate = True
    with caplog.at_level("WARNING"):
        segment = pipeline("image-segmentation", model=tiny_model().eval(), image_processor=processor(), device="cpu")
        results = segment(images(), subtask=subtask, threshold=0.0)
    assert not caplog.records
    assert not recwarn.list
    assert [{segment["mask"].size for segment in segments} for segments in results] == [
        {image.size} for image in images()
    ]


def test_a_segment_has_mask_label_score_box_and_area():
    segments = segmenter(segmentation_task="instance")(images()[0], threshold=0.0)
    assert segments
    for segment in segments:
        mask = np.asarray(segment["mask"])
        assert mask.shape == (40, 60)
        rows, columns = np.nonzero(mask == 255)
        box = {"xmin": columns.min(), "ymin": rows.min(), "xmax": columns.max() + 1, "ymax": rows.max() + 1}
        assert segment["box"] == box
        assert segment["area"] == len(rows)
        assert segment["label"].startswith("LABEL_")
        assert 0 < segment["score"] <= 1


@pytest.mark.parametrize(
    ("task", "options", "threshold"),
    [
        ("panoptic", {}, 0.93),  # that of the image processor
        ("panoptic", {"threshold": 0.95}, 0.95),
        ("instance", {"threshold": 0.93}, 0.93),
        ("instance", {"threshold": 0.93, "top_k": 3}, 0.93),
        ("instance", {"threshold": 0.93, "top_k": None}, 0.93),
        ("instance", {}, 0.5),
    ],
)
def test_masks_that_post_processing_drops_are_not_computed(task, options, threshold, monkeypatch):
    model = tiny_model()
    with torch.no_grad():
        model.class_predictor.weight *= 10  # so that some queries are sure of a class
        [*model.mask_embedder.parameters()][-2].mul_(100)  # and of their pixels
    segment = segmenter(model, segmentation_task=task, panoptic_thresholds={"threshold": 0.93})
    thresholds, counts = [], []
    predict = model.predict

    def observed(*arguments, **options):
        outputs = predict(*arguments, **options)
        thresholds.append(options["threshold"])
        counts.append(outputs.masks_queries_logits.shape[1])
        return outputs

    monkeypatch.setattr(model, "predict", observed)
    options = {"overlap_mask_area_threshold": 0.0, **options}
    found = segment(images(), **options)
    assert set(thresholds) == {threshold}
    assert min(counts) < model.config.decoder_config.num_queries
    assert sum(map(len, found)) > 0
    monkeypatch.setattr(model, "predict", lambda threshold, **inputs: model(**inputs))
    for segments, expected in zip(found, segment(images(), **options), strict=True):
        for ours, plain in zip(segments, expected, strict=True):
            assert (np.asarray(ours["mask"]) == np.asarray(plain["mask"])).all()
            assert ours["score"] == pytest.approx(plain["score"], abs=1e-5)
            assert {**ours, "mask": 0, "score": 0} == {**plain, "mask": 0, "score": 0}


def test_candidates_are_counted_by_all_queries_unless_told_otherwise():
    model = tiny_model()  # with six queries
    assert instance_options(model, {"top_k": None, "min_area": 4}) == {"top_k": 6, "min_area": 4}
    assert instance_options(model, {"top_k": 0, "threshold": None}) == {"top_k": 0}
    assert instance_options(tiny_baseline(), {"threshold": 0.5}) == {"threshold": 0.5}


class Answering(torch.nn.Module):
    def forward(self, number):
        return number + 1

    def predict(self, number, threshold):
        return number + threshold


def test_a_model_that_is_compiled_or_has_hooks_is_called_as_it_is():
    hooked, compiled = Answering(), Answering()
    add_hook_to_module(hooked, ModelHook())
    compiled.compile(backend="eager")
    number = {"number": torch.zeros(1)}
    for model in (hooked, compiled, torch.compile(Answering(), backend="eager")):
        assert outputs_for("panoptic", model, processor(), number) == 1
    assert outputs_for("panoptic", Answering(), processor(), number) == 0.5
    assert outputs_for("instance", Answering(), processor(), number, 0.2) == pytest.approx(0.2)
    assert outputs_for("semantic", Answering(), processor(), number) == 1


def test_the_task_of_the_image_processor_is_done_unless_another_is_asked_for():
    segment, image = segmenter(segmentation_task="panoptic", label_ids_to_fuse=range(4)), images()[0]
    panoptic = segment(image, **THRESHOLDS)
    labels = [entry["label"] for entry in panoptic]
    assert len(labels) == len(set(labels))  # each stuff class once
    assert sum(entry["area"] for entry in panoptic) <= 40 * 60
    semantic = segment(image, subtask="semantic")
    assert sum(entry["area"] for entry in semantic) == 40 * 60
    segment.image_processor.segmentation_task = None
    assert [entry["area"] for entry in segment(image)] == [entry["area"] for entry in semantic]


def test_a_semantic_segment_scores_like_its_label_in_its_pixels():
    segment, image = segmenter(), images()[0]
    inputs = segment.image_processor(image)
    with torch.no_grad():
        outputs = segment.model(**inputs)
    (result,) = segment.image_processor.post_process_semantic_segmentation(outputs, [(40, 60)], True, mode="fast")
    shares = result.segmentation_scores / result.segmentation_scores.sum(0)
    for entry in segment(image):
        label = segment.model.config.label2id[entry["label"]]
        expected = shares[label][torch.from_numpy(np.array(entry["mask"])) > 0].mean()
        assert entry["score"] == pytest.approx(expected.item(), abs=0.02)  # nearest point instead of bilinear


def test_a_grey_image_of_sixteen_bits_looks_like_one_of_eight(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (40, 60), dtype=np.uint8)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    deep.save(tmp_path / "deep.png")
    expected, *others = segmenter()([Image.fromarray(grey), deep, str(tmp_path / "deep.png")])
    for entries in others:
        assert [entry["score"] for entry in entries] == [entry["score"] for entry in expected]


def with_output(model: torch.nn.Module, kind: type, **logits: torch.Tensor) -> torch.nn.Module:
    """A model that says the same of every image, of which it sees 32 x 32 pixels."""
    sizes = torch.tensor([[32, 32]])
    model.forward = lambda **inputs: kind(image_sizes=sizes, padded_sizes=sizes, **logits)
    return model


def test_scores_of_semantic_segments_are_parts_of_all_scores():
    classes = torch.tensor([[[0.8, 0.1, 1e-9, 1e-9, 0.1], [0.6, 0.3, 1e-9, 1e-9, 0.1]]]).log()
    masks = torch.logit(torch.tensor([0.9, 0.5]))[None, :, None, None].expand(1, 2, 8, 8)
    model = with_output(
        tiny_model(), MaskFormerForInstanceSegmentationOutput, class_queries_logits=classes, masks_queries_logits=masks
    )
    (entry,) = segmenter(model)(images()[0])
    # 0.8 x 0.9 + 0.6 x 0.5 = 1.02 for label 0 and 0.1 x 0.9 + 0.3 x 0.5 = 0.24 for label 1
    assert (entry["label"], entry["score"]) == ("LABEL_0", pytest.approx(1.02 / 1.26))


def test_a_pixel_in_no_mask_has_a_score():
    classes, masks = torch.zeros(1, 2, 5), torch.full((1, 2, 8, 8), -1000.0)
    model = with_output(
        tiny_model(), MaskFormerForInstanceSegmentationOutput, class_queries_logits=classes, masks_queries_logits=masks
    )
    assert [entry["score"] for entry in segmenter(model)(images()[0])] == [0]


def test_a_segment_of_a_per_pixel_baseline_scores_the_probability_of_its_label():
    logits = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.2, 0.6, 0.1, 0.1]]).log().T[None, :, None, :]
    model = with_output(
        tiny_baseline(), PerPixelBaselineOutput, logits=logits.repeat_interleave(4, 3).expand(1, 4, 8, 8)
    )
    entries = segmenter(model)(images()[0])
    assert [entry["label"] for entry in entries] == ["LABEL_0", "LABEL_1"]
    # Between the two, the nearest point and the interpolated winner differ for a pixel or so.
    assert [entry["score"] for entry in entries] == pytest.approx([0.7, 0.6], abs=0.02)


def test_a_per_pixel_baseline_segments_images_in_batches_and_knows_no_instances(caplog):
    logging.getLogger("transformers").propagate = True
    segment = segmenter(tiny_baseline())
    assert not caplog.records
    for image, entries in zip(images(), segment(images(), batch_size=3), strict=True):
        assert sum(entry["area"] for entry in entries) == image.width * image.height
        assert all(0 < entry["score"] <= 1 for entry in entries)
    with pytest.raises(ValueError, match='set subtask="semantic"'):
        segment(images()[0], subtask="instance")


def that_sees_bright_channels() -> torch.nn.Module:
    """A model whose masks are the bright parts of the three colour channels, whatever lies beside the image."""

    def forward(pixel_values, pixel_mask):
        image_sizes, padded_sizes = sizes_in_batch(pixel_values, pixel_mask)
        return MaskFormerForInstanceSegmentationOutput(
            class_queries_logits=9 * torch.eye(3, 5).expand(len(pixel_values), 3, 5),
            masks_queries_logits=20 * torch.nn.functional.avg_pool2d(pixel_values, 4),
            image_sizes=image_sizes,
            padded_sizes=padded_sizes,
        )

    model = tiny_model()
    model.forward = forward
    model.predict = lambda threshold, **inputs: forward(**inputs)
    return model


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_images_of_any_sizes_go_through_in_batches(task):
    segment = segmenter(that_sees_bright_channels(), segmentation_task=task)
    one_by_one, together = (segment(images(), batch_size=size, **THRESHOLDS) for size in (1, 3))
    for image, *both in zip(images(), one_by_one, together, strict=True):
        alone, beside_others = ({entry["label"]: np.asarray(entry["mask"]) for entry in entries} for entries in both)
        assert alone.keys() == beside_others.keys() == {"LABEL_0", "LABEL_1", "LABEL_2"}
        for label, mask in alone.items():
            assert mask.shape == (image.height, image.width)
            # The last row and column are interpolated with the padding, where there is any.
            assert np.mean(mask != beside_others[label]) < 0.03


def test_a_generator_is_read_one_batch_ahead_at_most():
    read = []

    def photographs():
        for number in range(6):
            read.append(number)
            yield images()[0]

    results = segmenter()(photographs(), batch_size=2)
    next(results)
    assert len(read) == 2
    assert len(list(results)) == 5


def test_a_progress_bar_counts_images(capsys):
    segmenter()(images(), batch_size=2, progress_bar=True)
    assert "3/3" in capsys.readouterr().err


def test_options_reach_the_post_processing_of_the_subtask():
    segment, image = segmenter(segmentation_task="instance"), images()[0]
    assert len(segment(image, **THRESHOLDS)) > 3
    assert len(segment(image, **THRESHOLDS, top_k=3)) == 3
    assert all(entry["area"] >= 900 for entry in segment(image, **THRESHOLDS, min_area=900))
    panoptic = segment(image, **THRESHOLDS, subtask="panoptic", label_ids_to_fuse=range(4))
    labels = [entry["label"] for entry in panoptic]
    assert len(labels) == len(set(labels))
    assert segment(image, subtask="semantic", mode="fast")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"treshold": 0.9}, "treshold=0.9 is not an option of the pipeline. Did you mean threshold?"),
        ({"colour": "red"}, "colour='red' is not an option of the pipeline. Options are"),
        ({"subtask": "panoptic", "top_k": 3}, "top_k is not an option of panoptic segmentation, which has"),
        ({"subtask": "semantic", "label_ids_to_fuse": [1]}, "label_ids_to_fuse is not an option of semantic"),
    ],
)
def test_options_without_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        segmenter()(images()[0], **options)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    images()[0].save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-4000])
    stream = segmenter()(
        (str(tmp_path / name) for name in ("whole.png", "whole.png", "whole.png", "cut.png")), batch_size=2
    )
    assert len(list(itertools.islice(stream, 2))) == 2
    with pytest.raises(ValueError, match=r"Image 3 \(.*cut\.png\) cannot be read: image file is truncated"):
        next(stream)


def test_an_unknown_subtask_is_refused():
    with pytest.raises(ValueError, match="subtask is 'boxes'; it must be one of semantic, instance, panoptic"):
        segmenter()(images()[0], subtask="boxes")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_results_do_not_depend_on_the_rest_of_the_batch(num_workers):
    segment = segmenter(segmentation_task="panoptic")
    alone = [segment(image, **THRESHOLDS) for image in images()]
    together = list(segment((image for image in images()), batch_size=3, num_workers=num_workers, **THRESHOLDS))
    for found, expected in zip(together, alone, strict=True):
        assert [each["label"] for each in found] == [each["label"] for each in expected]
        torch.testing.assert_close(
            [each["score"] for each in found], [each["score"] for each in expected], rtol=1e-4, atol=1e-5
        )
        for one, other in zip(found, expected, strict=True):
            assert (np.asarray(one["mask"]) != np.asarray(other["mask"])).mean() < 0.01  # float32 decides ties


def test_workers_stay_one_batch_ahead_of_a_stream():
    taken = []

    def stream():
        for image in images() * 10:
            taken.append(image)
            yield image

    results = segmenter()(stream(), batch_size=2, num_workers=2)
    next(iter(results))
    assert 2 <= len(taken) <= 5


def test_all_workers_have_something_to_do_where_batches_are_small(monkeypatch):
    segment, together = segmenter(), threading.Barrier(3)
    prepare = segment.preprocess

    def wait_for_the_others(*args, **options):
        together.wait(timeout=30)
        return prepare(*args, **options)

    monkeypatch.setattr(segment, "preprocess", wait_for_the_others)
    assert len(list(segment((image for image in images() * 2), batch_size=1, num_workers=3))) == 6


def test_an_image_that_a_worker_cannot_read_is_an_error():
    with pytest.raises(ValueError, match="missing"):
        list(segmenter()((image for image in [images()[0], "missing.jpg"]), num_workers=1))


def test_images_before_an_error_of_their_source_are_segmented():
    def stream():
        yield from images()
        raise LookupError("the source is gone")

    results = segmenter()(stream(), batch_size=1, num_workers=4)
    for _ in images():
        next(results)
    with pytest.raises(LookupError, match="the source is gone"):
        next(results)


@pytest.mark.parametrize("nothing", [[], ()])
def test_no_images_give_no_segments(nothing):
    assert segmenter()(nothing, batch_size=2) == []


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": -1}, {"num_workers": -1}])
def test_numbers_that_mean_nothing_are_refused(options):
    with pytest.raises(ValueError, match="the minimum is 1 and 0"):
        list(segmenter()((image for image in images()), **options))


@pytest.mark.parametrize("subtask", ["semantic", "panoptic", "instance"])
def test_the_model_of_transformers_gives_equal_segments(tmp_path, subtask):
    model = tiny_model(num_labels=4)
    model.save_pretrained(tmp_path)
    stock = transformers.MaskFormerForInstanceSegmentation.from_pretrained(tmp_path)
    options = {"subtask": subtask} if subtask == "semantic" else {"subtask": subtask, **THRESHOLDS}
    ours, theirs = (segmenter(each)(images(), **options) for each in (model, stock))
    for found, expected in zip(theirs, ours, strict=True):
        areas = [[(segment["label"], segment["area"]) for segment in segments] for segments in (found, expected)]
        assert areas[0] == areas[1]


@pytest.mark.parametrize("settings", [{}, {"segmentation_task": "panoptic"}])
def test_the_image_processor_of_transformers_is_answered_by_how_to_get_ours(tmp_path, settings):
    tiny_model().save_pretrained(tmp_path)
    processor(**settings).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Call register_auto_classes\(\) before pipeline"):
        pipeline("image-segmentation", model=str(tmp_path), pipeline_class=MaskFormerPipeline, device="cpu")


def test_a_processor_of_ones_own_that_knows_no_task_is_answered_too():
    class Own(MaskFormerImageProcessorPil):
        pass

    with pytest.raises(ValueError, match=r"Own, not one of this package"):
        MaskFormerPipeline(model=tiny_model().eval(), image_processor=Own(), device="cpu")


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_every_segment_has_its_own_mask_and_box(task):
    stripes = np.zeros((64, 96, 3), dtype=np.uint8)
    for channel in range(3):
        stripes[:, 32 * channel : 32 * channel + 32, channel] = 255
    entries = segmenter(that_sees_bright_channels(), segmentation_task=task)(Image.fromarray(stripes))
    assert sorted(entry["label"] for entry in entries) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    for entry in entries:
        channel = int(entry["label"][-1])
        expected = stripes[..., channel]
        assert np.mean(np.asarray(entry["mask"]) != expected) < 0.03
        assert entry["box"]["xmin"] == pytest.approx(32 * channel, abs=2)
        assert entry["box"]["xmax"] == pytest.approx(32 * channel + 32, abs=2)


def test_a_photograph_stored_sideways_is_segmented_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    images()[0].save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        opened.load()
        for source in (str(tmp_path / "turned.png"), opened):
            assert {entry["mask"].size for entry in segmenter()(source)} == {(40, 60)}


def test_padding_does_not_count_in_the_score_of_a_semantic_segment():
    logits = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.2, 0.6, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]]).log().T
    logits = logits.repeat_interleave(torch.tensor([2, 2, 4]), dim=1)[None, :, :, None].expand(1, 4, 8, 8)
    model, sizes = tiny_baseline(), {"image_sizes": torch.tensor([[16, 32]]), "padded_sizes": torch.tensor([[32, 32]])}
    model.forward = lambda **inputs: PerPixelBaselineOutput(logits=logits, **sizes)
    entries = segmenter(model)(images()[0])
    assert [entry["label"] for entry in entries] == ["LABEL_0", "LABEL_1"]
    assert [entry["score"] for entry in entries] == pytest.approx([0.7, 0.6], abs=0.04)


def test_all_labels_of_the_only_sure_query_are_candidates_for_instances():
    classes = torch.tensor([[[0.4, 0.35, 0.1, 0.05, 0.1]]]).log()
    kind = MaskFormerForInstanceSegmentationOutput
    model = with_output(
        tiny_model(), kind, class_queries_logits=classes, masks_queries_logits=torch.full((1, 1, 8, 8), 20.0)
    )
    model.predict = lambda threshold, **inputs: model(**inputs)
    entries = segmenter(model, segmentation_task="instance")(images()[0], threshold=0.3)
    assert [(entry["label"], round(entry["score"], 2)) for entry in entries] == [("LABEL_0", 0.4), ("LABEL_1", 0.35)]


@pytest.mark.parametrize("subtask", OPTIONS)
def test_every_option_reaches_post_processing_with_its_value(subtask, monkeypatch):
    values = {"mode": "fast", "top_k": 2, "min_area": 5, "label_ids_to_fuse": [1]}
    options = {name: values.get(name, 0.1 * place) for place, name in enumerate(OPTIONS[subtask], start=1)}
    segment, name, given = segmenter(), f"post_process_{subtask}_segmentation", {}
    post_process = getattr(segment.image_processor, name)
    observed = lambda outputs, **options: given.update(options) or post_process(outputs, **options)  # noqa: E731
    monkeypatch.setattr(segment.image_processor, name, observed, raising=False)
    segment(images()[0], subtask=subtask, **options)
    expected = {"mode": "fast"} if subtask == "semantic" else options
    assert {name: given[name] for name in expected} == expected


def test_a_model_of_half_precision_gives_nearly_the_same_scores():
    model, image = tiny_model().eval(), images()[0]
    expected = segmenter(model)(image)
    half = MaskFormerPipeline(model=model.bfloat16(), image_processor=processor(), device="cpu")
    found = {entry["label"]: entry["score"] for entry in half(image)}
    assert found == pytest.approx({entry["label"]: entry["score"] for entry in expected}, abs=0.05)


def test_an_image_may_be_base64_alone_broken_into_lines_or_a_data_url():
    content = io.BytesIO()
    images()[0].save(content, "png")
    text = base64.encodebytes(content.getvalue()).decode()
    assert "\n" in text.strip()
    expected, *others = segmenter()([images()[0], text, "data:image/png;base64," + text.replace("\n", "")])
    for entries in others:
        assert [entry["score"] for entry in entries] == [entry["score"] for entry in expected]
    with pytest.raises(ValueError, match="Image 0") as error:
        segmenter()("A" * 10_000)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("num_images", [1, 2])
def test_a_timeout_holds_for_the_download_of_every_image(num_images, monkeypatch):
    seconds = []
    monkeypatch.setattr(pipeline_module, "download_image", lambda url, *limit: seconds.append(limit) or images()[0])
    segmenter()(["http://a/b.png"] * num_images, timeout=0.5)
    segmenter()("http://a/b.png", timeout=0.5)
    assert seconds == [(0.5,)] * (num_images + 1)


def test_the_score_of_a_semantic_segment_is_taken_right_below_each_pixel():
    # Two labels meet in the middle of the grid and of the photograph.
    logits = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1]]).log().T.repeat_interleave(4, 1)
    for halves in (logits[None, :, None, :], logits[None, :, :, None]):
        model = with_output(tiny_baseline(), PerPixelBaselineOutput, logits=halves.expand(1, 4, 8, 8))
        entries = segmenter(model)(images()[0])
        assert [entry["area"] for entry in entries] == [1200, 1200]
        assert [entry["score"] for entry in entries] == pytest.approx([0.7, 0.7])


def test_an_image_may_be_a_path_and_what_is_none_is_named_with_its_type(tmp_path):
    segment, photograph = segmenter(), images()[0]
    photograph.save(tmp_path / "a.png")
    assert [entry["score"] for entry in segment(tmp_path / "a.png")] == [
        entry["score"] for entry in segment(photograph)
    ]
    with pytest.raises(ValueError, match=r"Image 0 \(.*b\.png\) cannot be read: there is no such file"):
        segment(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"Image 1 cannot be read: it is a ndarray; pass a PIL image, a path"):
        segment([photograph, np.zeros((40, 60, 3), np.uint8)])


def test_there_is_no_progress_bar_unless_asked_for(capsys):
    segmenter()(images(), batch_size=2)
    assert capsys.readouterr().err == ""


def test_a_model_of_another_kind_is_said_to_be_unsupported(caplog):
    logging.getLogger("transformers").propagate = True
    config = transformers.ResNetConfig(hidden_sizes=[4], depths=[1], embedding_size=4, layer_type="basic")
    MaskFormerPipeline(model=transformers.ResNetModel(config), image_processor=processor(), device="cpu")
    assert "ResNetModel' is not supported" in caplog.text


@pytest.mark.parametrize("kind", ["x-png", "vnd.mozilla.apng", "svg+xml"])
def test_a_data_url_may_name_any_kind_of_image(kind):
    content = io.BytesIO()
    images()[0].save(content, "png")
    entries = segmenter()(f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}")
    assert {entry["mask"].size for entry in entries} == {(60, 40)}


def test_a_name_whose_letters_would_be_base64_is_that_of_a_missing_file():
    with pytest.raises(ValueError, match=r"Image 0 \(photos/ab\.png\) cannot be read: there is no such file"):
        segmenter()("photos/ab.png")


class Photographs(torch.utils.data.Dataset):
    """Has a length and an image at every index, so that iterating over it does not end."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return images()[0]


def test_a_data_set_is_read_up_to_its_length():
    assert len(list(itertools.islice(segmenter()(Photographs(), batch_size=3), 7))) == 2
