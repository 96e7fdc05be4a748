"""The command `hf-maskformer`: the scripts by name."""

import errno
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from test_scripts import call, checkpoint, config, data  # noqa: F401  (fixtures)

from hf_maskformer import __version__, command_line
from hf_maskformer.__main__ import main
from hf_maskformer.__main__ import run as run_script
from hf_maskformer.command_line import COMMANDS, SYNONYMS, OptionParser, as_commands, errors_as_messages


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command line in this process; gives its exit code, stdout and stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(sys, "argv", ["hf-maskformer", *map(str, words)])
        monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
        for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
            monkeypatch.delitem(sys.modules, name)
        capsys.readouterr()
        try:
            code = main()
        except SystemExit as exit:
            code = exit.code or 0
        return code, *capsys.readouterr()

    return run


def test_the_help_names_every_command_with_an_example(run):
    code, output, _ = run("--help")
    assert code == 0
    blocks = {block.split()[0]: block for block in output.split("\n\n")[1:-1]}
    assert list(blocks) == list(COMMANDS)
    for name, block in blocks.items():
        assert f"\n            hf-maskformer {name} " in block
    assert "scripts/train.py" not in output


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_shows_an_example_and_its_options(run, command):
    code, output, _ = run(command, "--help")
    assert code == 0
    assert output.startswith(f"usage: hf-maskformer {command} ")
    assert f"\n    hf-maskformer {command} " in output
    assert "python scripts/" not in output
    assert all(Path(page).is_file() for page in re.findall(r"[^\s(]*docs/\w+\.md", output))
    assert "--help" in output


def test_the_help_says_of_both_forms_of_an_option_what_they_do(run):
    _, output, _ = run("evaluate", "--help")
    words = " ".join(output.split())
    assert "--check-data [CHECK_DATA] Read every sample once beforehand. (default: True)" in words
    assert "--no-check-data Same as --check_data false." in words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a command is missing"),
        (["trian"], "there is no command trian. Did you mean train?"),
        (["predict", "--chekpoint=a"], "there is no option --chekpoint. Did you mean --checkpoint?"),
        (["check", "a", "--fromat=b"], "Did you mean --format?\nhf-maskformer check --help shows the options."),
        (["predict"], "the following arguments are required: --checkpoint"),
        (["check"], "the following arguments are required: data"),
        (["benchmark", "forward", "--kept=0"], "--kept is 0, but must be 1 to 99"),
    ],
)
def test_a_command_line_that_cannot_be_understood_ends_with_2(run, words, message):
    code, output, errors = run(*words)
    assert (code, output) == (2, "")
    assert message in errors


@pytest.mark.parametrize(
    "words",
    [
        ["predict", "--checkpoint=nowhere", "--input=nowhere", "--output=nowhere"],
        ["convert", "nowhere.pkl", "nowhere", "--preset=ade20k-r50"],
        ["check", "nowhere"],
    ],
)
def test_wrong_input_ends_with_1_and_a_message(run, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, output, errors = run(*words)
    assert code == 1
    assert "nowhere" in output + errors
    assert not any(tmp_path.iterdir())


def test_options_may_be_shortened(run):
    code, _, errors = run("predict", "--check=nowhere", "--inp=nowhere", "--outp=nowhere", "--tas=depth")
    assert code == 2
    assert "invalid choice: 'depth'" in errors


def test_an_interruption_ends_with_130_and_no_traceback(capsys):
    with pytest.raises(SystemExit) as end, errors_as_messages():
        raise KeyboardInterrupt
    assert end.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_a_message_names_commands_and_the_pages_where_they_are(run, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    for words in (["evaluate", "--checkpoint=nowhere", f"--data={nowhere}"], ["check", nowhere, "--split=val"]):
        _, output, errors = run(*words)
        (page,) = re.findall(r"\S+data\.md", output + errors)
        assert Path(page).is_absolute()
        assert Path(page).is_file()


def test_files_of_the_user_keep_their_paths_in_messages():
    message = "my/docs/notes.md, /home/ada/scripts/train.py and x-scripts/configs/a.json"
    assert as_commands(message) == message
    text = "python scripts/train.py --config scripts/configs/small.json, see docs/data.md"
    assert as_commands(as_commands(text)) == as_commands(text)


def test_evaluate_prints_the_figures_of_its_file_as_json_alone(run, checkpoint, data, tmp_path):  # noqa: F811
    code, output, errors = run(
        "evaluate", f"--checkpoint={checkpoint}", f"--data={data}", "--json", f"--output={tmp_path / 'metrics.json'}"
    )
    assert code == 0
    assert json.loads(output) == json.loads((tmp_path / "metrics.json").read_text())
    assert "Checking samples" in errors


def test_predict_prints_the_segments_as_json_alone_and_what_it_skipped(run, checkpoint, data, tmp_path):  # noqa: F811
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "broken.png").write_bytes(b"no image")
    (photos / "scene.png").write_bytes((data / "images" / "val" / "scene_00000.png").read_bytes())
    code, output, errors = run(
        "predict", f"--checkpoint={checkpoint}", f"--input={photos}", f"--output={tmp_path / 'out'}", "--json"
    )
    assert code == 1
    results = json.loads(output)
    assert results["skipped"] == [str(photos / "broken.png")]
    (image,) = results["images"]
    assert sum(segment["area"] for segment in image["segments"]) == image["height"] * image["width"] == 64 * 64
    assert sorted(image["files"]) == sorted(map(str, (tmp_path / "out").iterdir()))
    assert "Segmenting" in errors


def test_check_prints_its_findings_as_json_alone(run, data, tmp_path):  # noqa: F811
    code, output, errors = run("check", data, "--json")
    assert code == 0
    findings = json.loads(output)
    assert findings["train"]["num_samples"] == 4
    assert sum(counts["pixels"] for counts in findings["val"]["classes"].values()) == 2 * 64 * 64
    assert "Checking samples" in errors

    code, output, errors = run("check", tmp_path / "nowhere", "--split", "train", "--json")
    assert code == 1
    assert "nowhere" in json.loads(output)["train"]["problems"][0]


def test_a_command_does_what_its_script_does(run, checkpoint, data, tmp_path):  # noqa: F811
    image = data / "images" / "val" / "scene_00001.png"
    call("predict", checkpoint=checkpoint, input=image, output=tmp_path / "script")
    assert run("predict", f"--checkpoint={checkpoint}", f"--input={image}", f"--output={tmp_path / 'command'}")[0] == 0
    for file in (tmp_path / "script").iterdir():
        assert file.read_bytes() == (tmp_path / "command" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("option", "meant"), [("--batch_size=4", "per_device_train_batch_size"), ("--lr", "learning_rate")]
)
def test_an_option_by_its_name_elsewhere_is_answered_by_the_one_here(run, option, meant):
    code, _, errors = run("train", "--data=nowhere", option)
    assert code == 2
    assert f"Did you mean --{meant}?" in errors


def test_a_file_in_the_place_of_a_folder_is_named(run, checkpoint, tmp_path):  # noqa: F811
    (tmp_path / "file").touch()
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    options = [f"--checkpoint={checkpoint}", f"--input={tmp_path / 'a.png'}", f"--output={tmp_path / 'file'}"]
    code, _, errors = run("predict", *options)
    assert code == 1
    assert f"but {tmp_path / 'file'} is a file. Choose another path" in errors


def test_words_that_belong_to_no_option_are_no_command_line(run):
    code, _, errors = run("evaluate", "--checkpoint=x", "--data=y", "--split", "train", "val")
    assert code == 2
    assert "unexpected arguments: val." in errors


@pytest.mark.parametrize(("option", "meant"), SYNONYMS.items())
def test_every_name_of_an_option_elsewhere_is_answered_by_one_that_means_the_same(run, option, meant):
    same = {"--lr": "--learning_rate", "--epochs": "--num_train_epochs", "--num_steps": "--max_steps"}
    same |= {"--batch_size": "--per_device_train_batch_size", "--num_epochs": "--num_train_epochs"}
    assert same == SYNONYMS
    code, _, errors = run("train", "--data=nowhere", option, "1")
    assert (code, f"Did you mean {meant}?" in errors) == (2, True)


def test_the_version_and_the_help_have_short_answers(run):
    assert run("--version") == (0, f"{__version__}\n", "")
    assert run("-h") == run("--help")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("no"), 1, "\nerror: no\n"),
        (ImportError("pip install it"), 1, "\nerror: pip install it\n"),
        (subprocess.CalledProcessError(75, "train"), 75, ""),
        (FileExistsError("out is not empty."), 1, "\nerror: out is not empty.\n"),
        (FileExistsError(errno.EEXIST, "File exists", "/"), 1, "\nerror: [Errno 17] File exists: '/'\n"),
    ],
)
def test_the_exit_code_and_the_message_are_those_of_the_error(error, code, message, capsys):
    with pytest.raises(SystemExit) as end, errors_as_messages():
        raise error
    assert end.value.code == code
    assert capsys.readouterr() == ("", message)


def test_in_dev_mode_errors_keep_their_traceback(monkeypatch):
    flags = SimpleNamespace(dev_mode=True)
    monkeypatch.setattr(command_line, "sys", SimpleNamespace(flags=flags, argv=["x"], stderr=None, exit=None))
    with pytest.raises(ValueError, match="no"), errors_as_messages():
        raise ValueError("no")


def test_a_message_of_a_command_names_commands(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["hf-maskformer train"])
    with pytest.raises(SystemExit), errors_as_messages():
        raise ValueError("Convert it by scripts/convert_checkpoint.py.")
    assert capsys.readouterr().err == "\nerror: Convert it by hf-maskformer convert.\n"


def test_a_command_of_several_processes_is_named_by_its_module():
    text = "accelerate launch scripts/train.py --preset ade20k-r50"
    assert as_commands(text) == "accelerate launch -m hf_maskformer train --preset ade20k-r50"


def test_objects_of_a_script_may_go_to_processes_that_it_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    script = tmp_path / "script.py"
    script.write_text("import pickle\nclass Own: pass\nprint(type(pickle.loads(pickle.dumps(Own()))) is Own, __file__)")
    run_script(script)
    assert capsys.readouterr().out == f"True {script}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_usage_has_the_name_of_a_command_once(run, command):
    _, output, _ = run(command, "--help")
    assert output.split("\n\n")[0].split().count(command) == 1


def test_a_path_below_a_file_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit), errors_as_messages():
        (tmp_path / "file" / "out").mkdir()
    assert f"{tmp_path / 'file' / 'out'} is a file, or inside one, where a folder is needed" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_options_without_a_default_name_none(run, command):
    _, output, _ = run(command, "--help")
    assert "(default: " in output
    assert "(default: None)" not in " ".join(output.split())


def test_a_message_of_a_script_names_scripts(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["scripts/evaluate.py"])
    with pytest.raises(SystemExit), errors_as_messages():
        raise ValueError("Convert it by scripts/convert_checkpoint.py.")
    assert capsys.readouterr().err == "\nerror: Convert it by scripts/convert_checkpoint.py.\n"


def test_configurations_of_examples_are_where_they_are_said_to_be():
    *_, path = as_commands("python scripts/train.py --config scripts/configs/small.json").split()
    assert Path(path).is_absolute()
    assert Path(path).is_file()


def test_the_description_of_a_script_names_scripts_and_that_of_a_command_names_commands():
    text = "python scripts/train.py --preset coco-r50"
    assert OptionParser(prog="train.py", description=text).description == text
    assert (
        OptionParser(prog="hf-maskformer train", description=text).description
        == "hf-maskformer train --preset coco-r50"
    )


def test_the_module_ends_with_the_exit_code_of_the_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["hf_maskformer", "trian"])
    monkeypatch.delitem(sys.modules, "hf_maskformer.__main__")  # of which runpy would warn
    with pytest.raises(SystemExit) as end:
        runpy.run_module("hf_maskformer", run_name="__main__")
    assert end.value.code == 2
    assert "Did you mean train?" in capsys.readouterr().err
