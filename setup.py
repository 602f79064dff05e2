"""Build nlpfast's native library with CMake and ninja; CMakeLists.txt says how."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

NATIVE = os.environ.get("NLPFAST_NATIVE", "auto")
SITE = sysconfig.get_path("purelib")


class CMakeBuild(build_ext):
    """Run the CMake build; unless NLPFAST_NATIVE=required, a failure leaves an installation without it."""

    def run(self) -> None:
        if NATIVE == "0":
            print("nlpfast: NLPFAST_NATIVE=0, installing without the native library")
            return
        try:
            self.build()
        except (OSError, subprocess.CalledProcessError) as error:
            if NATIVE == "required":
                raise
            print(f"nlpfast: warning: native build failed ({error}); installing without it", file=sys.stderr)

    def build(self) -> None:
        source = Path(__file__).parent.resolve()
        target = source / "nlpfast" if self.inplace else Path(self.build_lib).resolve() / "nlpfast"
        folder = source / "build" / f"cmake-{sys.implementation.cache_tag}"
        cmake, ninja = shutil.which("cmake") or "cmake", shutil.which("ninja") or "ninja"
        settings = [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        for command in (
            [cmake, "-S", source, "-B", folder, "-G", "Ninja", *settings],
            [cmake, "--build", folder],
            [cmake, "--install", folder, "--prefix", target],
        ):
            subprocess.run(command, check=True)


# An isolated build of pip sees the environment's own torch, if it has one, only by looking into its folder.
has_torch = importlib.util.find_spec("torch") is not None or Path(SITE, "torch").is_dir()
setup(
    packages=[*find_packages(include=["nlpfast*"]), "nlpfast.benchmarks"],
    package_dir={"nlpfast": "nlpfast", "nlpfast.benchmarks": "benchmarks"},
    package_data={"nlpfast": ["py.typed", "*.so"]},
    setup_requires=[] if has_torch or NATIVE == "0" else ["torch>=2.10"],
    ext_modules=[Extension("nlpfast._C", [])],
    cmdclass={"build_ext": CMakeBuild},
)
