"""What a user installs: the wheel's files, an import that needs torch and NumPy alone, a `kernels` that hides none."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = ["triton", "av", "PIL", "matplotlib", "tqdm", "safetensors", "skimage", "scipy", "diffusers", "flash_attn"]

# Hides the optional packages as if they were not installed: find_spec answers None, import fails.
HIDE = f"""
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {OPTIONAL!r} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


def test_weights_are_small_and_say_how_they_were_made() -> None:
    files = sorted((ROOT / "stattn").rglob("weights/*.safetensors"))
    sizes = {path.stem: path.stat().st_size for path in files}
    assert {"tiny", "camera", "memory", "synth-r3d", "synth-frame", "synth-clip"} <= set(sizes)
    assert max(sizes.values()) <= 16e6
    assert sum(sizes.values()) <= 24e6
    for path in files:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        assert record["command"].startswith("python -m stattn.train --preset " + path.stem), path
        assert record["losses"] if "losses" in record else record["log"], path
        assert record.get("minutes", record.get("seconds", 1e9) / 60) <= 9, path
        assert record["machine"] == "NVIDIA H200", path


def python(code: str, cwd: Path, *path: Path, options: tuple[str, ...] = ()) -> str:
    """Run `code` in a new interpreter whose imports start with the folders `path`. Returns what it printed."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path:
        env["PYTHONPATH"] = os.pathsep.join(map(str, path))
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with a kernel and a weight file planted: both routes show, whatever the project holds."""
    tree = tmp_path_factory.mktemp("sources") / "stattn"
    tree.mkdir()
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    for name in ("stattn", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    (tree / "kernels" / "planted.py").write_text("ANSWER = 42\n")
    (tree / "stattn" / "weights").mkdir(exist_ok=True)
    (tree / "stattn" / "weights" / "planted.safetensors").write_bytes(b"weights")
    return tree


def build(tree: Path, hook: str, folder: Path) -> Path:
    """Call a build hook of the project's back end without the CUDA library, as pip does. Returns the wheel."""
    folder.mkdir()
    code = f"from setuptools import build_meta; build_meta.{hook}({str(folder)!r})"
    env = os.environ | {"STATTN_CUDA": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build(tree, "build_wheel", tmp_path_factory.mktemp("wheel") / "dist"))


@pytest.fixture(scope="module")
def installed(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the unpacked wheel and nothing else."""
    site = tmp_path_factory.mktemp("site")
    wheel.extractall(site)
    return site


class TestWheel:
    def test_a_wheel_without_the_library_is_for_any_platform(self, wheel: zipfile.ZipFile) -> None:
        assert Path(wheel.filename or "").name.endswith("-py3-none-any.whl")

    def test_every_module_and_every_kernel_is_in_the_wheel(self, tree: Path, wheel: zipfile.ZipFile) -> None:
        modules = {path.relative_to(tree).as_posix() for path in (tree / "stattn").rglob("*.py")}
        kernels = {f"stattn/kernels/{path.name}" for path in (tree / "kernels").glob("*.py")}
        assert "stattn/kernels/planted.py" in kernels
        assert modules | kernels == {name for name in wheel.namelist() if name.endswith(".py")}

    def test_weights_and_the_typing_marker_are_in_the_wheel(self, tree: Path, wheel: zipfile.ZipFile) -> None:
        weights = {f"stattn/weights/{path.name}" for path in (tree / "stattn" / "weights").iterdir() if path.is_file()}
        assert "stattn/weights/planted.safetensors" in weights
        assert weights | {"stattn/py.typed"} <= set(wheel.namelist())

    def test_nothing_but_the_package_is_in_the_wheel(self, wheel: zipfile.ZipFile) -> None:
        tops = {name.split("/")[0] for name in wheel.namelist()}
        assert {top for top in tops if not top.endswith(".dist-info")} == {"stattn"}

    def test_a_wheel_made_from_the_source_distribution_is_the_same(
        self, tree: Path, wheel: zipfile.ZipFile, tmp_path: Path
    ) -> None:
        code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True)
        (path,) = tmp_path.glob("*.tar.gz")
        shutil.unpack_archive(path, tmp_path / "sources", filter="data")
        (sources,) = (tmp_path / "sources").iterdir()
        again = zipfile.ZipFile(build(sources, "build_wheel", tmp_path / "dist"))
        assert sorted(again.namelist()) == sorted(wheel.namelist())
        assert (sources / "kernels" / "planted.py").exists()

    def test_the_version_is_one(self, wheel: zipfile.ZipFile) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert f'__version__ = "{project["version"]}"' in (ROOT / "stattn" / "__init__.py").read_text()
        assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()

    def test_the_core_depends_on_torch_and_numpy_alone(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert project["dependencies"] == ["torch>=2.11", "numpy"]
        for needs in project["optional-dependencies"].values():
            assert not [need for need in needs if need.startswith(("torch", "torchvision"))]


@pytest.mark.smoke
class TestImport:
    def test_the_package_imports_from_any_folder_without_optional_packages(
        self, installed: Path, tmp_path: Path
    ) -> None:
        code = HIDE + "import importlib.util, stattn; print(stattn.__file__, importlib.util.find_spec('triton'))"
        assert python(code, tmp_path, installed) == f"{installed}/stattn/__init__.py None"

    def test_importing_the_package_leaves_optional_packages_alone(self, installed: Path, tmp_path: Path) -> None:
        # What torch itself brings in is not ours to answer for.
        code = "import sys, torch; before = set(sys.modules); import stattn; print(*set(sys.modules) - before)"
        loaded = {name.split(".")[0] for name in python(code, tmp_path, installed).split()}
        assert "stattn" in loaded
        assert not loaded & set(OPTIONAL)

    def test_a_package_without_the_library_says_why(self, installed: Path, tmp_path: Path) -> None:
        code = HIDE + "from stattn import extension; print(extension.load(), extension.why_not())"
        assert python(code, tmp_path, installed).startswith("False the CUDA library was not built")

    def test_a_kernel_imports_as_part_of_the_package(self, installed: Path, tmp_path: Path) -> None:
        code = "from stattn.kernels import planted; print(planted.__name__, planted.ANSWER)"
        assert python(code, tmp_path, installed) == "stattn.kernels.planted 42"


class TestSourceTree:
    def test_stattn_kernels_is_a_relative_link_to_a_folder_that_is_no_package(self) -> None:
        assert os.readlink(ROOT / "stattn" / "kernels") == "../kernels"
        assert not (ROOT / "kernels" / "__init__.py").exists()

    def test_a_kernel_imports_as_part_of_the_package_from_the_source_tree(self, tree: Path, tmp_path: Path) -> None:
        code = "from stattn.kernels import planted; print(planted.__name__, planted.ANSWER)"
        assert python(code, tmp_path, tree) == "stattn.kernels.planted 42"

    def test_a_kernel_imports_as_part_of_the_package_from_an_editable_install(self, tree: Path, tmp_path: Path) -> None:
        site = tmp_path / "site"
        zipfile.ZipFile(build(tree, "build_editable", tmp_path / "dist")).extractall(site)
        # An editable install works through a .pth file, read in site folders only. Those of this environment are put on
        # the path without reading theirs (-S), since stattn may well be installed here in the same way.
        packages = [folder for folder in sys.path if folder.endswith("-packages")]
        code = f"import site, sys; site.addsitedir({str(site)!r}); sys.path += {packages!r}\n"
        code += "import stattn; from stattn.kernels import planted; print(stattn.__file__, planted.__name__)"
        assert python(code, tmp_path, options=("-S",)) == f"{tree}/stattn/__init__.py stattn.kernels.planted"

    def test_a_program_started_at_the_root_still_finds_the_installed_kernels_package(self, tmp_path: Path) -> None:
        package = tmp_path / "kernels"
        package.mkdir()
        (package / "__init__.py").write_text("WHOSE = 'somebody else'\n")
        # The root comes first twice: as the current folder and on the path.
        assert python("import kernels; print(kernels.WHOSE)", ROOT, ROOT, tmp_path) == "somebody else"
