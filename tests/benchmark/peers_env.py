"""Makes the environment that `python -m tests.benchmark.engine --peers ENVDIR` runs the other runtimes in.

`python -m tests.benchmark.peers_env ENVDIR`: onnxruntime-genai from its wheel, and llama-cpp-python built here for this
machine's own instructions but AMX, which needs cmake and a C++ compiler and takes some minutes. It is an environment of
its own because onnxruntime-genai brings onnxruntime, which would overwrite onnxruntime-gpu.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import venv
from pathlib import Path

PACKAGES = ("onnxruntime-genai==0.18.0", "llama-cpp-python==0.3.36", "gguf", "numpy")
BUILD_JOBS = 2
# Some virtual machines show these instructions and let no process use them, which ends llama.cpp by SIGILL.
WITHOUT_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    if not python_of(directory).exists():
        venv.create(directory, with_pip=True)
    environment = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF", "CMAKE_BUILD_PARALLEL_LEVEL": str(BUILD_JOBS)}
    if platform.machine() == "x86_64":
        environment |= {"CFLAGS": WITHOUT_AMX, "CXXFLAGS": WITHOUT_AMX}
    command = [str(python_of(directory)), "-m", "pip", "install", "--no-input", *PACKAGES]
    subprocess.run(command, check=True, env=os.environ | environment)


def python_of(directory: Path) -> Path:
    """The interpreter of an environment."""
    return directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


if __name__ == "__main__":
    main()
