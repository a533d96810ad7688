"""Memory and communication of the loss on clusters, by `plan`: python -m benchmarks.capacity writes results/capacity.csv and prints it.

Of each rank, one step of TOKENS tokens in bfloat16, both gradients, exact, as the torch backend would; ranks of one node (up to 8) share a
vocabulary, nodes have other tokens. Times are what the parts would take alone at the rates below: published peaks or, for products, a share
of them that large ones reach. Nothing here was measured.
"""

import torch

import distill_kernels
from benchmarks import record

TOKENS = 8192  # of the ranks that share a vocabulary
# Vocabulary and hidden size of the head, from the models' configurations.
TEACHERS = {
    "8B (Llama 3.1)": (128256, 4096),
    "27B (Gemma 3)": (262144, 5376),
    "70B (Llama 3.1)": (128256, 8192),
    "235B (Qwen 3)": (151936, 4096),
    "405B (Llama 3.1)": (128256, 16384),
    "671B (DeepSeek V3)": (129280, 7168),
}
STUDENT_DIM = 2048
VOCABULARY_RANKS = (1, 2, 4, 8)
ACCELERATORS = (8, 64, 1024)
NODE = 8
GIB = 2**30
PRODUCTS = 700e12  # flops a second of large bfloat16 products on an H100, whose peak is 989e12
NVLINK = 450e9  # bytes a second in one direction
NETWORK = 50e9  # 400 Gb/s


def row(teacher: str, ranks: int) -> dict:
    vocabulary, teacher_dim = TEACHERS[teacher]
    sizes = TOKENS, vocabulary, STUDENT_DIM, teacher_dim
    plan = distill_kernels.plan(*sizes, dtype=torch.bfloat16, device="cuda", backend="torch", ranks=ranks)
    own = -(-vocabulary // ranks)
    gradient = own * STUDENT_DIM * 2
    result = {
        "teacher": teacher,
        "vocabulary": vocabulary,
        "teacher_dim": teacher_dim,
        "vocabulary_ranks": ranks,
        "heads_gib": own * (STUDENT_DIM + teacher_dim) * 2 / GIB,
        "peak_above_inputs_gib": plan.peak_bytes / GIB,
        "eager_above_inputs_gib": (plan.eager_bytes + plan.gradient_bytes + plan.cast_bytes) / GIB,
        "received_mib": plan.exchanged_bytes / 2**20,
        "products_ms": 1e3 * (plan.forward_flops + plan.backward_flops) / PRODUCTS,
        "exchange_nvlink_ms": 1e3 * plan.exchanged_bytes / NVLINK,
        "exchange_network_ms": 1e3 * plan.exchanged_bytes / NETWORK,
    }
    for accelerators in ACCELERATORS:
        replicas = accelerators // ranks
        # By the wrapper: each replica's gradient of the head, in a ring; inside of a node by NVLink.
        rate = NVLINK if accelerators <= NODE else NETWORK
        result[f"head_gradient_of_{accelerators}_ms"] = 1e3 * 2 * (replicas - 1) / replicas * gradient / rate
    return result


def main():
    rows = [row(teacher, ranks) for teacher in TEACHERS for ranks in VOCABULARY_RANKS]
    names = list(rows[0])
    print("\n".join(["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]))
    for made in rows:
        print("| " + " | ".join(f"{value:.3g}" if isinstance(value, float) else f"{value}" for value in made.values()) + " |")
    print(f"written: {record.write('capacity', rows, ('teacher', 'vocabulary_ranks'))}")


if __name__ == "__main__":
    main()
