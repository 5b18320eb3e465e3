"""Deliberate faults: does the suite notice? One at a time, in a copy of the tree.

    python -m tests.parity.mutants                 # all of them, about 15 minutes on two cores
    python -m tests.parity.mutants jax-epsilon     # those named

Each mutant is one small mistake of the kind that porting makes. The parity suite is run until its first
failure, which is printed; a mutant that nothing catches is printed as SURVIVED, and the exit status is 1.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SUITE = ["tests/test_losses.py", "tests/test_parity.py"]
SUITE += ["tests/test_parity_optimizers.py", "tests/test_parity_trajectory.py"]


class Mutant(NamedTuple):
    """In `file`, the text `right`, which occurs once, becomes `wrong`."""

    name: str
    file: str
    right: str
    wrong: str


LAYOUT, JAX_RESNET, JAX_STEP = "jax_resnet/state_dict.py", "jax_resnet/resnet.py", "jax_resnet/step.py"
BLOCKWISE = "jax_resnet/strategies/blockwise.py"
NUMPY_RESNET, BASE = "numpy_ref/resnet.py", "numpy_ref/optimizer_base.py"
CONVOLUTION = "jax_resnet/convolution.py"
JAX, JAX_OPTIMIZERS = "jax_resnet/layers.py", "jax_resnet/optimizers.py"
REPLICA = "numpy_ref/replica.py"
JAX_LOSSES, NUMPY_LOSSES = "jax_resnet/losses.py", "numpy_ref/losses.py"
PLAIN, FAST, NUMPY_BOUND = "numpy_ref/layers", "numpy_ref/fast", "numpy_ref/adabound.py"
BOUND, NUMPY_OPTIMIZERS = "jax_resnet/adabound.py", "numpy_ref/optimizers.py"

MUTANTS = [
    Mutant(
        "jax-im2col-padding",
        CONVOLUTION,
        "((0, 0), (ph, ph), (pw, pw), (0, 0))",
        "((0, 0), (0, 2 * ph), (pw, pw), (0, 0))",
    ),
    Mutant("jax-conv-padding", CONVOLUTION, "((ph, ph), (pw, pw)), dim", "((ph, ph), (0, 2 * pw)), dim"),
    Mutant(
        "jax-kernel-transposed",
        CONVOLUTION,
        "weight.reshape(kh * kw * i, o)",
        "weight.swapaxes(0, 1).reshape(kh * kw * i, o)",
    ),
    Mutant(
        "jax-columns-reversed",
        CONVOLUTION,
        "weight.transpose(0, 2, 1, 3)",
        "weight[:, ::-1].transpose(0, 2, 1, 3)",
    ),
    Mutant("jax-relu-passes-zero", JAX, "_where(x > 0, dx)", "_where(x >= 0, dx)"),
    Mutant("jax-epsilon", JAX, "eps: float = 1e-5", "eps: float = 1e-3"),
    Mutant("jax-momentum", JAX, "momentum: float = 0.1", "momentum: float = 0.01"),
    Mutant("jax-biased-running-variance", JAX, "var * (n / (n - 1))", "var"),
    Mutant(
        "jax-variance-is-constant",
        JAX,
        "var = (centered * centered)",
        "var = lax.stop_gradient(centered * centered)",
    ),
    Mutant(
        "jax-groups-of-distant-examples",
        JAX,
        "return x.reshape(-1, group, *x.shape[1:])",
        "return x.reshape(group, -1, *x.shape[1:]).swapaxes(0, 1)",
    ),
    Mutant(
        "jax-running-statistics-of-last-group",
        JAX,
        "batch = batch.mean(tuple(range(batch.ndim - 1)))",
        "batch = batch.reshape(-1, batch.shape[-1])[-1]",
    ),
    Mutant(
        "jax-groups-unbiased-by-batch",
        JAX,
        "n = math.prod(x32.shape[axis] for axis in axes)",
        "n = x.size // x.shape[-1]",
    ),
    Mutant("jax-blockwise-statistics-lost", BLOCKWISE, "rename(updated_stats, ", "rename(batch_stats, "),
    Mutant("jax-bias-sign", JAX, "* scale + self.bias[...]).astype", "* scale - self.bias[...]).astype"),
    Mutant("jax-max-pool-padding", JAX, "-jnp.inf,", "0.0,"),
    Mutant("jax-option-A-zeros-behind", JAX, "(extra // 2, extra - extra // 2)", "(0, extra)"),
    Mutant("jax-layout", LAYOUT, "{4: (3, 2, 0, 1), 2: (1, 0)}", "{4: (3, 2, 1, 0), 2: (1, 0)}"),
    Mutant(
        "jax-stride-placement",
        JAX_RESNET,
        "(stride, 1) if stride_in_1x1 else (1, stride)",
        "(1, stride) if stride_in_1x1 else (stride, 1)",
    ),
    Mutant(
        "jax-shortcut-lost",
        JAX_RESNET,
        "return relu(self.branch(x) + self.shortcut(x))",
        "return relu(self.branch(x) + 0 * self.shortcut(x))",
    ),
    Mutant("jax-loss-is-a-sum", JAX_LOSSES, "(logits, label).mean()", "(logits, label).sum()"),
    Mutant("jax-smoothing-of-each-class", JAX_LOSSES, "label_smoothing / num_classes\n", "label_smoothing\n"),
    Mutant(
        "jax-shares-swapped", JAX_LOSSES, "share * target + (1 - share) *", "(1 - share) * target + share *"
    ),
    Mutant("jax-bce-class-weights-lost", JAX_LOSSES, "class_weights * terms", "terms"),
    Mutant(
        "jax-bce-sum-over-classes",
        JAX_LOSSES,
        "class_weights * terms).mean()",
        "class_weights * terms).sum(1).mean()",
    ),
    Mutant(
        "numpy-smoothing-of-each-class", NUMPY_LOSSES, "label_smoothing / num_classes,", "label_smoothing,"
    ),
    Mutant(
        "numpy-shares-swapped",
        NUMPY_LOSSES,
        "share * target + (1 - share) *",
        "(1 - share) * target + share *",
    ),
    Mutant(
        "numpy-soft-gradient-without-weights",
        NUMPY_LOSSES,
        " * weighted.sum(1, keepdims=True) - weighted",
        " - weighted",
    ),
    Mutant(
        "numpy-bce-gradient-without-weights",
        NUMPY_LOSSES,
        "weight * (sigmoid - target)",
        "(sigmoid - target)",
    ),
    Mutant(
        "jax-adabound-corrected-root",
        BOUND,
        "(jnp.sqrt(nu) + eps)",
        "(jnp.sqrt(nu) + eps * correction.astype(nu.dtype))",
    ),
    Mutant(
        "jax-amsbound-forgets-maximum",
        BOUND,
        "jax.tree.map(jnp.maximum, state.nu_max, nu)",
        "nu",
    ),
    Mutant(
        "jax-amsgrad-is-optax",
        JAX_OPTIMIZERS,
        "return amsgrad(learning_rate, **adam, weight_decay=weight_decay)",
        "return optax.chain(l2, optax.amsgrad(learning_rate, **adam))",
    ),
    Mutant(
        "jax-sgd-nesterov",
        JAX_OPTIMIZERS,
        "optax.sgd(learning_rate, momentum, nesterov)",
        "optax.sgd(learning_rate, momentum, nesterov=True)",
    ),
    Mutant(
        "jax-nesterov-lost",
        JAX_OPTIMIZERS,
        "optax.sgd(learning_rate, momentum, nesterov)",
        "optax.sgd(learning_rate, momentum)",
    ),
    Mutant(
        "jax-drop-path-keeps-shortcut-out",
        JAX_RESNET,
        "kept * self.branch(x) + self.shortcut(x)",
        "kept * (self.branch(x) + self.shortcut(x))",
    ),
    Mutant("jax-drop-path-next-block", BLOCKWISE, "return list(array.T)", "return list(array.T[::-1])"),
    Mutant("jax-clip-not-applied", BLOCKWISE, "scale_gradients(grads, scale), lr)", "grads, lr)"),
    Mutant(
        "jax-average-the-wrong-way-round",
        JAX_STEP,
        "average + (1 - decay) * (latest - average)",
        "average + decay * (latest - average)",
    ),
    Mutant("jax-average-from-initial-weights", JAX_STEP, "step == 0, latest", "step < 0, latest"),
    Mutant(
        "jax-norm-decay-of-weights-alone",
        JAX_OPTIMIZERS,
        'if kind.startswith("norm.")',
        'if kind == "norm.weight"',
    ),
    Mutant(
        "jax-vectors-share-one-decay",
        JAX_STEP,
        'parameter_kind(name) if differs else "vectors"',
        '"vectors"',
    ),
    Mutant(
        "jax-decay-not-decoupled",
        JAX_OPTIMIZERS,
        "optax.adamw(learning_rate, **adam, weight_decay=weight_decay)",
        "optax.chain(l2, optax.adam(learning_rate, **adam))",
    ),
    Mutant("numpy-epsilon", f"{PLAIN}/normalization.py", "eps: float = 1e-5", "eps: float = 1e-3"),
    Mutant("numpy-momentum", f"{PLAIN}/normalization.py", "momentum: float = 0.1", "momentum: float = 0.01"),
    Mutant("numpy-biased-running-variance", f"{PLAIN}/normalization.py", "var * (n / (n - 1))", "var"),
    Mutant(
        "numpy-plain-norm-sign",
        f"{PLAIN}/normalization.py",
        "d = d - (dbias + z * dweight)",
        "d = d - (dbias - z * dweight)",
    ),
    Mutant(
        "numpy-fast-norm-sign",
        f"{FAST}/normalization.py",
        "b, c = -scale * inverse_std**2",
        "b, c = scale * inverse_std**2",
    ),
    Mutant(
        "numpy-groups-unbiased-by-batch",
        f"{PLAIN}/normalization.py",
        "n = groups.shape[1]",
        "n = groups.shape[0] * groups.shape[1]",
    ),
    Mutant(
        "numpy-group-gradient-by-batch",
        f"{PLAIN}/normalization.py",
        "dweight) / z.shape[1]",
        "dweight) / (z.shape[0] * z.shape[1])",
    ),
    Mutant(
        "numpy-running-statistics-of-last-group",
        f"{FAST}/normalization.py",
        "sums = statistics.sum(0, np.float64)",
        "sums = statistics[-1] * len(norms)",
    ),
    Mutant(
        "numpy-group-gradient-of-other-group",
        f"{FAST}/normalization.py",
        "dx[part] = norm.backward(dy[part])",
        "dx[part] = norm.backward(dy[::-1][part])",
    ),
    Mutant(
        "numpy-group-shortcut-gradient-lost",
        f"{FAST}/batch_norm_add_relu.py",
        "self.dshortcut[part] = norm.dshortcut",
        "self.dshortcut[part] = 0",
    ),
    Mutant(
        "numpy-kernel-transposed",
        f"{PLAIN}/convolution.py",
        "return self.weight.value.reshape",
        "return self.weight.value.swapaxes(0, 1).reshape",
    ),
    Mutant(
        "numpy-fast-padding",
        f"{FAST}/im2col.py",
        "padded[:, ph : ph + h, pw : pw + w] = x",
        "padded[:, :h, :w] = x",
    ),
    Mutant("numpy-tap-turned", f"{FAST}/shifted.py", "weight[tap].T)", "weight[-1 - tap].T)"),
    Mutant(
        "numpy-strided-1x1-shifted",
        f"{FAST}/pointwise.py",
        "rows = x[:, ::sh, ::sw]",
        "rows = x[:, sh - 1 :: sh, ::sw][:, : -(-x.shape[1] // sh)]",
    ),
    Mutant("numpy-max-pool-ties-share", f"{FAST}/pooling.py", "left[:, *out] -= taken", "pass"),
    Mutant("numpy-max-pool-padding", f"{FAST}/pooling.py", "y.fill(-np.inf)", "y.fill(0)"),
    Mutant("numpy-loss-sign", f"{PLAIN}/loss.py", "dlogits[at_label] -= 1", "dlogits[at_label] += 1"),
    Mutant(
        "numpy-flatten-order",
        f"{PLAIN}/activation.py",
        "(x.transpose(0, 3, 1, 2)).reshape(len(x)",
        "(x).reshape(len(x)",
    ),
    Mutant("numpy-option-A-front", f"{PLAIN}/convolution.py", "front = self.pad[0]", "front = self.pad[1]"),
    Mutant(
        "numpy-shortcut-gradient-lost",
        NUMPY_RESNET,
        "+ self.shortcut().backward(dsum)",
        "+ 0 * self.shortcut().backward(dsum)",
    ),
    Mutant(
        "numpy-fused-shortcut-gradient-lost",
        f"{FAST}/block.py",
        "dx += self.shortcut()",
        "dx += 0 * self.shortcut()",
    ),
    Mutant(
        "numpy-relu-passes-all",
        f"{FAST}/batch_norm_add_relu.py",
        "np.multiply(d[part], y[part] > 0,",
        "np.multiply(d[part], y[part] >= 0,",
    ),
    Mutant("numpy-adabound-upper-bound", NUMPY_BOUND, "ratio * (1 + 1 / x)", "ratio * (1 + 2 / x)"),
    Mutant(
        "numpy-adabound-correction",
        NUMPY_BOUND,
        "/ (1 - h.b1**self.count)",
        "/ (1 - h.b1 ** (self.count + 1))",
    ),
    Mutant(
        "numpy-amsbound-forgets-maximum",
        BASE,
        "return np.maximum(moments[2], moments[1], out=moments[2])",
        "return moments[1]",
    ),
    Mutant("numpy-adam-epsilon", NUMPY_OPTIMIZERS, "h.eps * root", "h.eps"),
    Mutant("numpy-sgd-dampening", NUMPY_OPTIMIZERS, "trace += grad", "trace += 0.9 * grad"),
    Mutant("numpy-nesterov-without-gradient", NUMPY_OPTIMIZERS, "            delta += grad\n", ""),
    Mutant(
        "numpy-drop-path-gradient-whole",
        NUMPY_RESNET,
        "dsum if keep is None else per_example(keep, dsum) * dsum",
        "dsum",
    ),
    Mutant(
        "numpy-fused-drop-path-gradient-whole",
        f"{FAST}/batch_norm_add_relu.py",
        "block = order.scale(block, factors, part, dnorm[part])",
        "dnorm[part] = block",
    ),
    Mutant(
        "numpy-rows-kernel-gradient-not-shifted",
        f"{FAST}/row_products.py",
        "dout[:, pixels(tap.outputs, n)].T",
        "dout[:, pixels(tap.inputs, n)].T",
    ),
    Mutant(
        "numpy-rows-kernel-not-turned",
        f"{FAST}/row_products.py",
        "for i in reversed(range(kh))",
        "for i in range(kh)",
    ),
    Mutant(
        "numpy-rows-drop-path-by-column",
        f"{FAST}/memory_order.py",
        "np.tile(keep",
        "np.repeat(keep",
    ),
    Mutant(
        "numpy-clip-epsilon",
        NUMPY_OPTIMIZERS,
        "np.minimum(max_norm / (grad_norm + 1e-6)",
        "np.minimum(max_norm / (grad_norm + 1e-2)",
    ),
    Mutant("numpy-average-the-wrong-way-round", REPLICA, "change *= 1 - decay", "change *= decay"),
    Mutant("numpy-average-from-initial-weights", REPLICA, "if step == 1:", "if step < 1:"),
    Mutant(
        "numpy-biases-of-norms-not-biases",
        NUMPY_OPTIMIZERS,
        'if kind.endswith("bias")',
        'if kind == "bias"',
    ),
    Mutant(
        "numpy-decay-unscaled",
        BASE,
        "delta += h.lr * h.weight_decay * value",
        "delta += h.weight_decay * value",
    ),
    Mutant("numpy-second-moment-decay", BASE, "scratch *= 1 - b2", "scratch *= 1 - b1"),
]


def copy_of_tree(to: Path) -> Path:
    """What git would commit, in `to`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    return to


def first_failure(tree: Path, mutant: Mutant) -> str | None:
    """The test that catches a mutant, or None. The tree is as before afterwards.

    Raises ValueError if its text does not occur just once; RuntimeError if the suite could not be run.
    """
    file = tree / mutant.file
    source = file.read_text(encoding="utf-8")
    if source.count(mutant.right) != 1:
        raise ValueError(
            f"{mutant.name}: {source.count(mutant.right)} times in {mutant.file}: {mutant.right}"
        )
    optimizers_first = "optimizer" in mutant.file or "adabound" in mutant.file
    suite = sorted(SUITE, key=lambda name: "optimizers" in name, reverse=True) if optimizers_first else SUITE
    file.write_text(source.replace(mutant.right, mutant.wrong), encoding="utf-8")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *suite],
            cwd=tree,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
        )
    finally:
        file.write_text(source, encoding="utf-8")
    if done.returncode == 0:
        return None
    failure = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if failure is None:
        raise RuntimeError(f"{mutant.name}: the suite could not be run:\n{done.stdout}{done.stderr}")
    return failure[1]


def main(names: Sequence[str]) -> int:
    """Run the mutants named, or all; two at a time, each in its own copy of the tree."""
    unknown = set(names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        print(f"error: no mutant {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as executor:
        trees: SimpleQueue[Path] = SimpleQueue()
        for number in "01":
            trees.put(copy_of_tree(Path(folder) / number))

        def run(mutant: Mutant) -> str | None:
            tree = trees.get()
            try:
                return first_failure(tree, mutant)
            finally:
                trees.put(tree)

        survived = 0
        for mutant, caught_by in zip(chosen, executor.map(run, chosen), strict=True):
            survived += caught_by is None
            print(f"{mutant.name:32} {caught_by or 'SURVIVED'}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
