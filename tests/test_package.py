"""The package as it is built and installed, and the files beside it that name its version."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import warnings
import zipfile
from pathlib import Path

import pytest
import yaml

from hf_maskformer.data.generated_scenes import write_generated_scenes

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_citation_and_the_changes_know_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["preferred-citation"]["title"].startswith("Per-Pixel Classification is Not All You Need")
    assert re.search(rf"(?m)^## {re.escape(PROJECT['version'])}$", (ROOT / "CHANGELOG.md").read_text())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source distribution of a copy of what is under version control or could be, and the wheel made from it."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("build")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a checkout")
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (sdist,), (wheel,) = (list((folder / "dist").glob(ending)) for ending in ("*.tar.gz", "*.whl"))
    return folder / "source", sdist, wheel


@pytest.mark.slow
def test_the_wheel_holds_the_code_and_what_it_reads_and_nothing_else(built):
    source, _, wheel = built
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in names if not re.match(r"hf_maskformer-[^/]*\.dist-info/", name)}
    expected = {path.relative_to(source).as_posix() for path in (source / "hf_maskformer").rglob("*") if path.is_file()}
    for folder in ("scripts", "docs"):  # whole: the command runs those and names these
        files = (path for path in (source / folder).rglob("*") if path.is_file())
        expected |= {f"hf_maskformer/{path.relative_to(source).as_posix()}" for path in files}
    assert package == expected
    assert {"hf_maskformer/py.typed", "hf_maskformer/hub/model_card_template.md"} <= package
    assert any(re.fullmatch(r"hf_maskformer/data/label_names/\w+\.json", name) for name in package)


@pytest.mark.slow
def test_the_source_distribution_holds_what_belongs_to_a_release(built):
    _, sdist, _ = built
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "scripts/train.py"} <= names
    assert {"docs/data.md", "docs/images/demo.png", "Makefile", "constraints.txt", "model_cards/README.md"} <= names
    assert not any(name.startswith("tests") for name in names)


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, built, tmp_path_factory):
    """Runs a command of an environment that has this package alone, beside the libraries that it asks for."""
    source, _, wheel = built
    folder = tmp_path_factory.mktemp(request.param)
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    what = [wheel] if request.param == "wheel" else ["--no-build-isolation", "--editable", source]
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", *what]
    purelib = sysconfig.get_path("purelib", vars={"base": str(folder / "env")})
    # A .pth inside of a folder named here is not followed, so that no other installation of the package is found.
    (Path(purelib) / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(pip, check=True, capture_output=True, text=True, env=environment)
    (folder / "work").mkdir()

    def run(*words):
        command = [folder / "env" / "bin" / words[0], *map(str, words[1:])]
        done = subprocess.run(command, cwd=folder / "work", capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_the_installed_package_trains_evaluates_and_predicts_by_its_command(installed, tmp_path):
    where = installed("python", "-c", "import hf_maskformer; print(hf_maskformer.__file__)")
    assert not Path(where).is_relative_to(ROOT)
    assert installed("hf-maskformer", "--version").strip() == PROJECT["version"]
    (config,) = re.findall(r"--config (\S+small\.json)", installed("hf-maskformer", "--help"))
    (page,) = re.findall(r"\S+data\.md", installed("hf-maskformer", "check", "--help"))
    assert Path(page).is_file()
    write_generated_scenes(tmp_path / "data", num_train=2, num_val=1, image_size=(64, 64))
    data, output = f"--data={tmp_path / 'data'}", tmp_path / "run"
    installed(
        "hf-maskformer", "train", data, f"--config={config}", "--image_size=64", "--max_steps=1",
        f"--output_dir={output}", "--report_to=none", "--use_cpu=true", "--per_device_train_batch_size=2",
    )  # fmt: skip
    figures = json.loads(installed("hf-maskformer", "evaluate", f"--checkpoint={output}", data, "--json"))
    assert 0 <= figures["mean_iou"] <= 1
    image = tmp_path / "data" / "images" / "val" / "scene_00000.png"
    installed("hf-maskformer", "predict", f"--checkpoint={output}", f"--input={image}", f"--output={tmp_path / 'out'}")
    assert len(list((tmp_path / "out").iterdir())) == 3
    assert "benchmark forward" in installed("hf-maskformer", "benchmark", "forward", "--help")


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_what_is_deprecated_is_an_error_in_our_own_code(category):
    for module in ("hf_maskformer", "hf_maskformer.data.rle", "script_train", "__main__"):
        with pytest.raises(category):
            warnings.warn_explicit("old", category, "file.py", 1, module=module)
    code = f"import warnings; warnings.warn('old', {category.__name__})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"{category.__name__}: old" in done.stderr
    assert done.returncode == 1
