"""Build the CUDA library where a CUDA compiler is at hand; everything else about the package is in pyproject.toml.

The library is one shared object, stattn/libstattn.so, for Hopper (sm_90a). It uses PyTorch's stable ABI alone, and of
Python's what it finds in the process, so one file serves every Python and every torch from 2.11 on. It is built without
a GPU, from the headers of any such torch, CPU builds included.

    python setup.py build_ext --inplace     # into the source tree; compiles only what changed

The variable STATTN_CUDA steers the build: with 1 it fails where the library cannot be built, with 0 it leaves the
library out, and unset it builds the library if it can and says why if it cannot.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
NVCC = (13, 0)
TORCH = (2, 11)
BUILDING = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"}

COMPILE = [
    "-O3",
    "-std=c++17",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-lineinfo",
    "-Xptxas=-warn-spills,-warn-lmem-usage",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
    # The oldest torch that the library may meet, whatever torch the headers come from.
    f"-DTORCH_TARGET_VERSION=0x{TORCH[0]:02x}{TORCH[1]:02x}000000000000",
]
# What ptxas says when it serialises matrix products, ignores setmaxnreg, or keeps registers in memory.
REFUSED = r"\(C75\d\d\)|[Ss]pill|local memory"
# torch loads its libraries out of sight of others: DT_NEEDED is what makes libtorch_cpu's symbols visible to this one.
# With "-z defs", a symbol that only a CUDA build of torch has stops the link, not the loading on somebody's CPU.
LINK = ["-shared", "-cudart=static", "-gencode=arch=compute_90a,code=sm_90a", "-Xlinker=-z,defs"]


def version(text: str) -> tuple[int, int]:
    major, minor = re.match(r"(\d+)\.(\d+)", text).groups()
    return int(major), int(minor)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    beside = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None
    return beside or shutil.which("nvcc")


def find_ninja() -> str | None:
    # The ninja package puts its command beside the python that runs this, which need not be on PATH.
    return shutil.which("ninja", path=os.path.dirname(sys.executable)) or shutil.which("ninja")


def why_not() -> str | None:
    """The reason why the library cannot be built here, or None."""
    nvcc = find_nvcc()
    if nvcc is None:
        return "no nvcc on PATH or in CUDA_HOME"
    shown = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+\.\d+)", shown)
    if release is None or version(release[1]) < NVCC:
        return f"{nvcc} is release {release[1] if release else 'unknown'}, older than {NVCC[0]}.{NVCC[1]}"
    if util.find_spec("torch") is None:
        return "torch cannot be imported while building (pip install --no-build-isolation sees the installed one)"
    if version(metadata.version("torch")) < TORCH:
        return f"torch {metadata.version('torch')} is older than {TORCH[0]}.{TORCH[1]}"
    if find_ninja() is None:
        return "no ninja on PATH"
    return None


def ninja_path(path: str | Path) -> str:
    return re.sub(r"([$: ])", r"$\1", str(path))


def ninja_file(sources: list[str], objects: Path, library: Path) -> str:
    """Text of the build file that, run from the root, compiles `sources` into `objects` and links `library`."""
    torch = Path(util.find_spec("torch").origin).parent
    include = ["-Icsrc", f"-isystem={torch}/include", f"-isystem={torch}/include/torch/csrc/api/include"]

    def command(*words: str) -> str:
        return shlex.join(words).replace("$", "$$")

    nvcc = find_nvcc()
    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {ninja_path(objects)}",
        "rule compile",
        f"  command = {command(nvcc, *COMPILE, *include)} -MD -MF $out.d -c $in -o $out",
        "  description = nvcc $in",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {command(nvcc, *LINK)} $in -o $out {command(f'-L{torch}/lib', '-ltorch_cpu')}",
        "  description = link $out",
    ]
    built = [ninja_path(objects / f"{Path(source).name}.o") for source in sources]
    for source, target in zip(sources, built, strict=True):
        lines.append(f"build {target}: compile {ninja_path(source)}")
    lines.append(f"build {ninja_path(library)}: link {' '.join(built)}")
    return "\n".join(lines) + "\n"


class BuildLibrary(build_ext):
    """Build the library with nvcc through ninja, in place of the compiler that built Python."""

    def get_ext_filename(self, fullname: str) -> str:
        # A plain library for torch.ops.load_library, not a Python module: no interpreter tag in its name.
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        objects = Path(self.build_temp).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        objects.mkdir(parents=True, exist_ok=True)
        # Sources keep their paths relative to the root: those are what error messages and profilers show. Objects, too:
        # a copy of the tree, with its times, has nothing to compile again.
        relative = Path(os.path.relpath(objects, ROOT))
        (objects / "build.ninja").write_text(ninja_file(ext.sources, relative, library))
        command = [find_ninja(), "-C", str(ROOT), "-f", str(objects / "build.ninja")]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise SystemExit(
                f"{done.stdout}\nstattn: the CUDA library does not build; STATTN_CUDA=0 installs without it"
            )
        if re.search(REFUSED, done.stdout):
            for built in objects.glob("*.o"):  # or the next build would find them ready and say nothing
                built.unlink()
            raise SystemExit(f"{done.stdout}\nstattn: a kernel is not what was written: see the compiler's lines above")
        if "warning" in done.stdout:
            print(done.stdout)
        print("stattn: built the CUDA library")


class Wheel(bdist_wheel):
    """Tag a wheel that holds the library with its platform, and with no Python: the library knows none."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


def extensions() -> list[Extension]:
    switch = os.environ.get("STATTN_CUDA", "")
    if switch not in ("", "0", "1"):
        raise SystemExit(f"stattn: STATTN_CUDA={switch!r} must be 0 or 1")
    reason = "STATTN_CUDA=0" if switch == "0" else why_not()
    if reason is None:
        sources = sorted(path.relative_to(ROOT).as_posix() for kind in ("*.cpp", "*.cu") for path in CSRC.glob(kind))
        return [Extension("stattn.libstattn", sources)]
    if switch == "1":
        raise SystemExit(f"stattn: STATTN_CUDA=1, but the CUDA library cannot be built: {reason}")
    if BUILDING & set(sys.argv):
        print(f"stattn: building without the CUDA library: {reason}")
    return []


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel})
