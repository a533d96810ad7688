"""What is run, in which order, and for how long at most. Nothing here imports torch: who reads this list must not die of a GPU."""

from dataclasses import dataclass, replace

WORK = "benchmarks.gpu_suite.work"
HEADLINE = "h8192-v128256-d2048-4096"
# (tokens, vocabulary, student_dim, teacher_dim)
SIZES = {
    HEADLINE: (8192, 128256, 2048, 4096),
    "h1024-v128256-d2048-4096": (1024, 128256, 2048, 4096),
    "h128-v151936-d1024-4096": (128, 151936, 1024, 4096),
    "h4096-v128256-d4096-4096": (4096, 128256, 4096, 4096),
    "h8192-v262144-d2304-3584": (8192, 262144, 2304, 3584),
}
TINY = (3, 130, 16, 24)  # what a dry run makes of every one of them
RIGHT = (1025, 32024, 2048, 4096)  # more steps than any ring of buffers has places
CHUNKS = 3  # at least, of what is right or not: what a chunk leaves to the next, and a last one that is not full
# What a dry run makes of RIGHT. It is in an interpreter: one way alone is in chunks there, of a MiB.
DRY_RIGHT = {"triton chunked": ((9, 32024, 8, 8), CHUNKS)}
DRY_RIGHT_ELSE = (5, 200, 16, 32), 1
DRY_SECONDS = 120.0  # of a stage, on whatever else a processor is busy with
TEST_PROCESSES, DRY_TEST_PROCESSES = 12, 1


@dataclass(frozen=True)
class Stage:
    """A process. Those of one group run at once, the groups in order."""

    name: str
    seconds: float  # most
    run: str  # "module:function"
    arguments: tuple = ()
    group: str = ""


@dataclass(frozen=True)
class Comparison:
    """Variants timed in turns, each after it was found right at this very size. The products alone are the first of each."""

    name: str
    variants: tuple[str, ...]
    seconds: float
    case: str = HEADLINE
    dtype: str = "bfloat16"
    backward: bool = True
    dry: bool = True  # a dry run has it: others differ from one that it has in sizes alone, or are of what needs a GPU


OURS = ("ours", "ours, 2.5 GiB", "ours, 5 GiB")
COMPARISONS = (
    Comparison("headline", (*OURS, "eager"), 40),
    Comparison("headline: torch.compile", ("ours, 2.5 GiB", "torch.compile"), 60),
    Comparison("headline: Liger", ("ours, 2.5 GiB", "liger"), 40),
    Comparison("headline: Liger's Triton", ("ours, 2.5 GiB", "liger, triton"), 30, dry=False),
    Comparison("1,024 tokens", ("ours", "ours, 2.5 GiB", "eager"), 20, "h1024-v128256-d2048-4096", dry=False),
    Comparison("128 tokens", ("ours", "eager"), 20, "h128-v151936-d1024-4096", dry=False),
    Comparison("wide student", ("ours", "ours, 2.5 GiB", "eager"), 25, "h4096-v128256-d4096-4096", dry=False),
    Comparison("V = 262,144", ("ours", "ours, 5 GiB", "eager"), 40, "h8192-v262144-d2304-3584", dry=False),
    Comparison("forward", ("ours", "ours, chunked", "eager"), 25, backward=False),
    Comparison("sampled columns", ("ours", "8% of columns"), 25),
    Comparison("quantised sweeps", ("ours", "int8 sweep", "fp8 sweep"), 30),
    Comparison("cross entropy", ("ours, cross entropy", "eager, cross entropy"), 25),
    Comparison("cross entropy: CCE", ("ours, cross entropy", "cce"), 25, dry=False),
    Comparison("float32", ("ours", "ours, 2.5 GiB", "eager"), 30, "h1024-v128256-d2048-4096", "float32"),
)
# CUDA C++ after all of Triton's, and apart: one bad instruction in a kernel of ours must not cost what is known already.
CUDA_COMPARISONS = (
    Comparison("CUDA C++", ("ours", "cuda"), 25),
    Comparison("CUDA C++: forward", ("ours", "cuda"), 20, backward=False, dry=False),
    Comparison("CUDA C++: sampled columns", ("8% of columns", "cuda, 8% of columns"), 20, dry=False),
)
RIGHT_TRITON = ("triton chunked", "triton chunked, everything", "triton chunked, float32", "triton sweep", "triton sweep, everything")
RIGHT_CUDA = (
    "cuda chunked, cluster 1", "cuda chunked, cluster 2", "cuda chunked, cluster 4", "cuda chunked, everything",
    "cuda sweep, cluster 1", "cuda sweep, cluster 2", "cuda sweep, cluster 4", "cuda sweep, everything", "cuda columns",
)  # fmt: skip
TRITON_TESTS = (
    "tests/backends/triton/test_triton.py",
    "tests/backends/triton/test_sparse_triton.py",
    "tests/backends/triton/test_triton_graphs.py",
    "tests/backends/triton/test_triton_quantised.py",
    "tests/estimators/test_columns.py",
)
CUDA_TESTS = ("tests/backends/cuda/test_cuda.py", "tests/backends/cuda/test_cuda_sweep_backend.py")


def all_stages(dry: bool) -> list[Stage]:
    sizes = dict.fromkeys(SIZES, TINY) if dry else SIZES

    def stage_of(comparison: Comparison, only_warm: bool) -> Stage:
        arguments = (comparison, sizes[comparison.case], only_warm)
        if only_warm:
            return Stage(f"warm: {comparison.name}", 45, f"{WORK}.compare:compare", arguments, "warm")
        return Stage(f"time: {comparison.name}", comparison.seconds, f"{WORK}.compare:compare", arguments)

    def right_of(name: str, seconds: float, group: str) -> Stage:
        shape, chunks = DRY_RIGHT.get(name, DRY_RIGHT_ELSE) if dry else (RIGHT, CHUNKS)
        return Stage(f"right: {name}", seconds, f"{WORK}.right:right", (name, shape, chunks), group)

    comparisons, cuda_comparisons = ([one for one in of if one.dry or not dry] for of in (COMPARISONS, CUDA_COMPARISONS))
    right_cuda = [name for name in RIGHT_CUDA if not (dry and name.endswith(("cluster 2", "cluster 4")))]
    found = [Stage("machine", 40, f"{WORK}.machine:machine")]
    found += [stage_of(comparison, only_warm=True) for comparison in (comparisons[:1] if dry else comparisons)]
    found += [right_of(name, 30, "right: Triton") for name in RIGHT_TRITON]
    found += [right_of(name, 20, "right: CUDA") for name in right_cuda]
    found += [
        Stage("ceilings", 20, f"{WORK}.ceilings:ceilings", (dry,)),
        Stage("row kernels", 15, f"{WORK}.ceilings:row_kernels", ("triton", dry)),
    ]
    found += [stage_of(comparison, only_warm=False) for comparison in comparisons]
    found += [Stage("row kernels: CUDA", 15, f"{WORK}.ceilings:row_kernels", ("cuda", dry))]
    found += [stage_of(comparison, only_warm=False) for comparison in cuda_comparisons]
    processes = DRY_TEST_PROCESSES if dry else TEST_PROCESSES
    for title, files, seconds in (("Triton", TRITON_TESTS, 90), ("CUDA", CUDA_TESTS, 60)):
        found += [
            Stage(f"tests: {title} {i + 1}", seconds, f"{WORK}.own_tests:own_tests", (files, i, processes, dry), f"tests: {title}")
            for i in range(processes)
        ]
    return [replace(stage, seconds=DRY_SECONDS) for stage in found] if dry else found


def profile_stages(dry: bool) -> list[Stage]:
    """The second use of a machine: what the counters say of the slowest kernels, and what the sanitizer says of CUDA C++."""
    sizes = TINY if dry else SIZES[HEADLINE]
    found = [Stage("slowest kernels", 40, f"{WORK}.profile:slowest", (sizes,)), Stage("counters", 80, f"{WORK}.profile:counters", (sizes,))]
    right = TINY if dry else (260, 5000, 256, 512)  # small: the sanitizer takes a hundred times as long
    return found + [
        Stage(f"sanitizer: {tool}", 60, f"{WORK}.profile:sanitized", (tool, right), "sanitizer")
        for tool in ("memcheck", "racecheck", "synccheck", "initcheck")
    ]
