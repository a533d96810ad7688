"""The emulation that CUDA kernels are tested in: it computes what a GPU would, and says what a GPU would be silent about."""

import re
import subprocess

import cuda_emulated
import pytest

PROGRAM = """
#include <cstdio>
#include <memory>
#include "instructions.h"
#define SHARED(T, name) T* name = reinterpret_cast<T*>(emulation::shared())
void kernel(float* out) {{
  const int t = int(threadIdx.x), lane = t % 32;
  (void)lane, (void)out;
  {body}
}}
int main(int, char** arguments) try {{
  emulation::schedule(unsigned(atoi(arguments[1])));
  std::unique_ptr<float[]> out(new float[{floats}]());
  emulation::launch(&kernel, dim3({grid}), {cluster}, dim3({threads}), {shared}, out.get());
  for (int i = 0; i < {floats}; ++i) printf("%g ", out[i]);
  return 0;
}} catch (const emulation::Error& error) {{
  printf("refused: %s", error.what());
  return 3;
}}
"""


def run(tmp_path, body, sanitizer="", seeds=(0, 1, 2), *, floats=64, grid=1, cluster=1, threads=64, shared=1024):
    """What the kernel writes, the same under every seed, or what the emulation or a sanitizer said."""
    source = tmp_path / "program.cpp"
    source.write_text(PROGRAM.format(body=body, floats=floats, grid=grid, cluster=cluster, threads=threads, shared=shared))
    program = cuda_emulated.program(source, (), sanitizer)
    said = set()
    for seed in seeds:
        command = (["setarch", "-R"] if sanitizer == "thread" else []) + [str(program), str(seed)]
        options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1", "PATH": "/usr/bin:/bin"}
        made = subprocess.run(command, capture_output=True, text=True, env=options, timeout=600)
        said.add(made.stdout + made.stderr)
        if made.returncode:
            return made.stdout + made.stderr
    assert len(said) == 1
    return [float(word) for word in said.pop().split()]


NEIGHBOUR = "SHARED(float, all); all[t] = float(t); {} out[t] = all[(t + 40) % 64];"


def test_threads_meet_at_barriers_and_exchange_by_shuffles(tmp_path):
    assert run(tmp_path, NEIGHBOUR.format("__syncthreads();")) == [(t + 40) % 64 for t in range(64)]
    body = "float x = float(t); for (int o = 16; o; o /= 2) x += __shfl_xor_sync(~0u, x, o); out[t] = x;"
    assert run(tmp_path, body) == [496] * 32 + [1520] * 32
    assert run(tmp_path, "out[t] = float(__ballot_sync(~0u, lane % 3 == 0) >> 24);") == [0b01001001] * 64
    body = "out[t] = 0; if (lane < 8) out[t] = __shfl_sync(0xffu, float(t), lane ^ 1) + __shfl_down_sync(0xffu, float(t), lane < 7);"
    wanted = [(t ^ 1) + min(t % 32 + 1, 7) + t // 32 * 32 if t % 32 < 8 else 0 for t in range(64)]
    assert run(tmp_path, body) == wanted


def test_blocks_of_a_cluster_read_each_others_shared_memory(tmp_path):
    body = """SHARED(float, mine); mine[t] = float(t + 100 * int(emulation::cluster_rank()));
      emulation::cluster_arrive(); emulation::cluster_wait();
      const float* theirs = static_cast<const float*>(emulation::shared_of(mine, (emulation::cluster_rank() + 1) % 3));
      out[blockIdx.x * 8 + t] = theirs[7 - t];
      emulation::cluster_arrive(); emulation::cluster_wait();"""
    shape = {"floats": 48, "grid": 6, "cluster": 3, "threads": 8}
    wanted = [100 * ((block % 3 + 1) % 3) + 7 - t for block in range(6) for t in range(8)]
    assert run(tmp_path, body, **shape) == wanted


def test_shared_memory_of_a_block_that_has_ended_is_gone(tmp_path):
    body = """SHARED(float, mine); mine[t] = 1.0f;
      if (emulation::cluster_rank() == 0) return;
      for (int i = 0; i < 20; ++i) __syncthreads();
      out[t] = *static_cast<const float*>(emulation::shared_of(mine, 0));"""
    assert "nan" in str(run(tmp_path, body, seeds=(0,), grid=2, cluster=2))


def test_tensor_cores_multiply_what_ldmatrix_hands_out(tmp_path):
    body = """SHARED(uint16_t, memory); uint16_t *a = memory, *b = memory + 256;
      for (int i = lane; i < 256; i += 32) a[i] = __float2bfloat16_rn(float(i % 7) - 3).bits;
      for (int i = lane; i < 128; i += 32) b[i] = __float2bfloat16_rn(float(i % 5) - 2).bits;
      __syncwarp();
      uint32_t of_a[4], of_b[2];
      emulation::ldmatrix(of_a, a + (lane % 16) * 16 + lane / 16 * 8);
      emulation::ldmatrix(of_b, b + (lane % 8) * 16 + lane / 8 % 2 * 8);
      float d[4] = {1, 1, 1, 1};
      emulation::mma_m16n8k16_bf16(d, of_a, of_b);
      for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];"""
    a = [[(16 * row + k) % 7 - 3 for k in range(16)] for row in range(16)]
    b = [[(16 * row + k) % 5 - 2 for k in range(16)] for row in range(8)]
    wanted = [1 + sum(x * y for x, y in zip(row, column, strict=True)) for row in a for column in b]
    assert run(tmp_path, body, floats=128, threads=32) == wanted
    transposed = body.replace("of_b, b + (lane % 8) * 16 + lane / 8 % 2 * 8", "of_b, b + lane % 16 * 8, true")
    b = [[(8 * k + row) % 5 - 2 for k in range(16)] for row in range(8)]
    wanted = [1 + sum(x * y for x, y in zip(row, column, strict=True)) for row in a for column in b]
    assert run(tmp_path, transposed, floats=128, threads=32) == wanted
    halves = body.replace("bfloat16_rn", "half_rn").replace("k16_bf16", "k16_f16")
    b = [[(16 * row + k) % 5 - 2 for k in range(16)] for row in range(8)]
    assert run(tmp_path, halves, floats=128, threads=32) == [
        1 + sum(x * y for x, y in zip(row, column, strict=True)) for row in a for column in b
    ]


COPY = """SHARED(float, memory); float* source = out + 64; (void)lane;
  emulation::cp_async(memory + 4 * t, source + 4 * t, 16, t == 3 ? 8 : 16); emulation::cp_async_commit();
  {} out[4 * t] = memory[4 * t] + memory[4 * t + 3]; memory[4 * t] = 5.0f;"""


def test_late_and_early_copies_find_what_waits_wrongly(tmp_path):
    fill = "for (int i = 0; i < 4; ++i) out[64 + 4 * t + i] = float(4 * t + i);\n"
    wanted = run(tmp_path, fill + COPY.format("emulation::cp_async_wait(0);"), floats=96, threads=8)
    assert wanted[:32:4] == [8 * t + 3 if t != 3 else 12 for t in range(8)]
    late = run(tmp_path, fill + COPY.format(""), floats=96, threads=8, seeds=(2,))
    assert "nan" in str(late)


@pytest.mark.parametrize(
    "body, said",
    [
        ("if (t < 40) __syncthreads();", "a barrier waits for threads that have exited|deadlock"),
        ("if (t < 32) __syncthreads();\n else __syncthreads();", "wait at different barriers"),
        ("out[t] = __shfl_xor_sync(0xffffu, float(t), 1);", "lane 16 calls a collective that its mask leaves out|its mask leaves out"),
        ("if (lane < 16) out[t] = __shfl_xor_sync(0xffffu, float(t), 16);", "outside of its mask"),
        ("if (lane == 5) return;\n __syncwarp();", "waits for lane 5, which has exited|deadlock"),
        ("if (lane < 16) __syncwarp(); else out[t] = __shfl_xor_sync(~0u, float(t), 1);", "different collectives"),
        ("emulation::cluster_wait();", "without having arrived"),
        ("emulation::shared_of(emulation::shared(), 1);", "shared memory of block 1 in a cluster of 1"),
        ("emulation::cp_async(emulation::shared(), reinterpret_cast<char*>(out) + 4, 16, 16);", "unaligned"),
    ],
)
def test_what_a_gpu_would_hang_on_or_leave_undefined_is_refused_in_words(body, said, tmp_path):
    assert re.search(said, str(run(tmp_path, body, seeds=(0,))))


def test_sanitizers_see_races_and_accesses_beyond(tmp_path):
    clean = NEIGHBOUR.format("__syncthreads();")
    for sanitizer in ("thread", "address"):
        assert run(tmp_path, clean, sanitizer, (0, 1)) == [(t + 40) % 64 for t in range(64)]
    assert "data race" in run(tmp_path, NEIGHBOUR.format(""), "thread", (0,))
    # Between blocks, of the same and of different clusters, nothing orders memory.
    assert "data race" in run(tmp_path, "if (t == 0) out[0] = float(blockIdx.x);", "thread", (0,), grid=2)
    assert "heap-buffer-overflow" in run(tmp_path, "out[t + (t == 9) * 64] = 1;", "address", (0,))
    assert "heap-buffer-overflow" in run(tmp_path, "SHARED(float, all); all[256 * (t == 9)] = 1;", "address", (0,))
