"""What a user can do about an error of the compiler."""

from __future__ import annotations

from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

# Of what cannot be computed while a graph is captured, since it is not known before it is run.
DEPENDS_ON_DATA = (DataDependentOutputException, DynamicOutputShapeException)


def remedy_for(error: BaseException) -> str:
    """What a user can do about an error of the compiler, in one clause."""
    error = cause_of(error)
    text = f"{type(error).__name__} {error}"
    if "InvalidCxxCompiler" in text or "No working C++ compiler" in text:
        return "install a C++ compiler (for example the package g++) or name one in CXX"
    if isinstance(error, PermissionError) or "Read-only file system" in text:
        return "set TORCHINDUCTOR_CACHE_DIR to a directory that can be written"
    if isinstance(error, DEPENDS_ON_DATA):
        return (
            "a size or a Python number depends on the data; torch.where(mask, value, x) in place of "
            "x[mask] = value, and nn.Embedding(sparse=False), avoid that"
        )
    if "recurrent layers are not captured" in text:
        return (
            "with AVX-512 and a C++ compiler they are, but for LSTMs with projections and layers with a "
            "forward of their own; what is in other modules of yours is compiled"
        )
    if "hooks of all modules" in text:
        return "remove them when they are done, or register them with modules of the model"
    if "No space left" in text:
        return "free disk space, or set TORCHINDUCTOR_CACHE_DIR to another disk"
    if "CppCompileError" in text or "C++ compile error" in text:
        return "the C++ compiler rejected generated code: try a newer one and name it in CXX"
    return "optcpu.inspect(model, ...) shows the graph; TORCH_LOGS=+inductor shows the whole error"


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    cause = cause_of(error)
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0].strip()}" if lines else type(cause).__name__


def cause_of(error: BaseException) -> BaseException:
    """What went wrong, without what Dynamo and Inductor have put around it."""
    while (inner := getattr(error, "inner_exception", None)) is not None:
        error = inner
    return error
