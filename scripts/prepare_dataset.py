"""Checks a data set before training (`check`), or writes a compact Parquet version of it (`parquet`).

    python scripts/prepare_dataset.py check DATA
    python scripts/prepare_dataset.py check DATA --split train val --format coco-panoptic
    python scripts/prepare_dataset.py parquet DATA OUT

`check` reads every sample and reports missing and damaged files, mismatched sizes, labels out of range, empty segments,
how often each class occurs and which never do, and classes that the splits number differently; it exits with status 1
if anything would stop training. `parquet` writes OUT/data/*.parquet and OUT/classes.json, which train.py, evaluate.py
and the Hub read. DATA is a folder in a layout of docs/data.md, or with --image_column a data set on the Hub.
"""

import argparse
import json
import sys
from contextlib import redirect_stdout
from typing import Any

from hf_maskformer.command_line import OptionParser, errors_as_messages, message_of
from hf_maskformer.data.check import DataReport, inspect_samples, missing_classes, report_as_json, report_as_table
from hf_maskformer.data.opening import COLUMN_FORMATS, FORMATS, open_dataset
from hf_maskformer.data.parquet import write_parquet
from hf_maskformer.training.checks import check_eval_classes

MAX_LINES = 50


def main(arguments: argparse.Namespace) -> int:
    results: dict[str, Any] = {}
    first: Any = None
    # With --json, the human-readable output goes to stderr.
    with redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        for split in arguments.split:
            print(f"{arguments.data}, {split}")
            try:
                dataset = open_split(arguments, split)
                if arguments.command == "parquet":
                    paths = write_parquet(dataset, arguments.output, split)
                    print(f"{len(dataset)} samples in {len(paths)} files of {arguments.output}")
                    continue
            except (FileNotFoundError, ValueError) as error:
                message = message_of(error)
                print(message)
                results[split] = {"problems": [message]}
                if arguments.command == "parquet":
                    print(f"{arguments.output} is incomplete: {split} and any later splits were not written.")
                    break
                continue
            report = inspect_samples(dataset, arguments.num_workers)
            first = dataset if first is None else first
            try:
                check_eval_classes(first, dataset)
            except ValueError as error:
                report.problems.append(str(error))
            print(report_as_table(report, dataset.labels))
            print_findings(report, missing_classes(report, dataset.labels))
            results[split] = report_as_json(report, dataset.labels)
    if arguments.json:
        print(json.dumps(results, indent=1))
    return int(any(result["problems"] for result in results.values()))


def open_split(arguments: argparse.Namespace, split: str) -> Any:
    return open_dataset(
        arguments.data,
        split,
        arguments.image_column,
        arguments.label_column,
        arguments.classes,
        format=arguments.format,
        streaming=arguments.streaming,
    )


def print_findings(report: DataReport, missing: str) -> None:
    kinds = {"problems": report.problems, "samples with empty segments": report.empty_segments}
    print(f"{report.num_samples} samples, {', '.join(f'{len(lines)} {kind}' for kind, lines in kinds.items())}")
    if report.num_crowds:
        print(f"{report.num_crowds} crowds (iscrowd 1), which training leaves out")
    if missing:
        print(missing)
    for kind, lines in kinds.items():
        if lines:
            print(f"{kind}{f', the first {MAX_LINES}' if len(lines) > MAX_LINES else ''}:")
            print(*(f"  {line}" for line in lines[:MAX_LINES]), sep="\n")


def parse_arguments(command_line: list[str] | None = None) -> argparse.Namespace:
    parser = OptionParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {"check": "reads every sample and reports what is wrong", "parquet": "writes a compact Parquet version"}
    for name, text in helps.items():
        command = commands.add_parser(name, description=__doc__, help=text)
        command.add_argument("data", help="folder or Hub name of the data set")
        if name == "parquet":
            command.add_argument("output", help="folder to write to")
        command.add_argument("--split", nargs="+", default=["train", "val"], help="splits")
        command.add_argument("--format", choices=(*FORMATS, *COLUMN_FORMATS), help="layout, if a folder is ambiguous")
        command.add_argument("--image_column", help="column of images of a `datasets` data set")
        command.add_argument("--label_column", default="label", help="column of label maps")
        command.add_argument("--classes", help="classes.json, if the data has none of its own")
        command.set_defaults(streaming=False, json=False)
    commands.choices["check"].add_argument("--num_workers", type=int, default=8, help="threads that read in parallel")
    commands.choices["check"].add_argument("--streaming", action="store_true", help="stream the columns")
    commands.choices["check"].add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser.parse_args(command_line)


if __name__ == "__main__":
    with errors_as_messages():
        sys.exit(main(parse_arguments()))
