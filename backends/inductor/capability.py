"""Whether AOTInductor can build and run here."""

from __future__ import annotations

import os
import shutil
import sys

from ..capability import Capability, installed, version_of

NAME = "inductor"
TORCH = "pip install 'stepfold[compile]'"
COMPILERS = {"linux": "g++", "darwin": "clang++"}
"""The C++ compiler that Inductor calls on a system, unless the variable CXX names one."""
HOW = {"linux": "apt-get install g++ (conda install gxx)", "darwin": "xcode-select --install"}


def capability() -> Capability:
    """Running needs PyTorch, which loads the stage and has its kernels; building needs a C++ compiler too."""
    if not installed("torch"):
        return Capability(NAME, False, False, None, "torch is not installed", TORCH)
    version = version_of(("torch",))
    if sys.platform not in COMPILERS:
        reason = f"stages are shared objects for {' or '.join(COMPILERS)}; this system is {sys.platform}"
        return Capability(NAME, False, False, version, reason, "use another backend: stepfold backends")
    compiler = os.environ.get("CXX") or COMPILERS[sys.platform]
    if shutil.which(compiler) is None:
        reason = f"building needs a C++ compiler; {compiler} is not on the PATH"
        return Capability(NAME, False, True, version, reason, f"{HOW[sys.platform]}, or name one: CXX=clang++")
    return Capability(NAME, True, True, version, "", TORCH)
