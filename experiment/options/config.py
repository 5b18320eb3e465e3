"""The options of a run: one frozen dataclass holds defaults, help and ranges; the parser is made from it."""

import dataclasses
import json
import math
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiment.errors import UserError

FRAMEWORKS = ("jax", "numpy")
IMAGENET_MODELS = ("resnet101", "resnet18", "resnet34", "resnet50", "resnet152")
CIFAR_MODELS = ("resnet8", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
MODELS = (*IMAGENET_MODELS, *CIFAR_MODELS, "cnn")
# A new optimizer also goes into `OPTIMIZERS` (and `BOUNDED`) and `make_optimizer` of jax_resnet, numpy_ref
# and torch_oracle, into `USED_BY` and the defaults of resolving.py, tests/parity/cases.py, the lists of names
# in the tests (search for "amsgrad"), and the table of docs/training.md. Its update works coordinate by
# coordinate: the engines apply it to some parameters at a time. A new option of it gets limits beside
# `check_hyperparameters`.
OPTIMIZERS = ("adam", "adabound", "amsbound", "adaboundw", "sgdbound", "amsgrad", "adamw", "sgd")
EXTERNAL = re.compile(r"optax:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*|[^:]+\.py:[A-Za-z_]\w*")
"""The names of optimizers beside the table: any transformation of optax, or of a file."""
HYPERPARAMETERS = (
    *("final_lr", "gamma", "beta1", "beta2", "eps", "momentum", "nesterov"),
    *("weight_decay", "norm_weight_decay", "bias_weight_decay"),
)
"""The options of the table's optimizers beside lr; the others have arguments of their own."""
SCHEDULES = ("cosine", "constant", "multistep", "plateau")
PRECISIONS = ("float32", "bfloat16", "float64")
# A new augmentation also goes into `_change` (and `moves_only`, if it only moves pixels) of
# data/augmentation.py and into docs/data.md.
LOSSES = ("cross-entropy", "bce")
AUGMENTATIONS = ("none", "crop-flip", "crop-flip-pca", "autoaugment", "autoaugment-cifar10")
MIN_IMAGE_SIZE = 32

# Enough epochs to reach an accuracy of 0.97 on digits, in a few minutes on two CPU cores. The default for
# other sets is 1: an epoch of a larger set takes longer.
DEFAULT_EPOCHS = {"digits": 7}


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    flag: str | None = None,
    **limits: float,
) -> Any:
    """A field of Config: its default, its help, and the choices or limits (see `LIMITS`) of its values."""
    metadata = {"help": help, "choices": choices, "limits": limits, "flag": flag}
    return dataclasses.field(default=default, metadata=metadata)


GROUPS = {
    "framework": "model",
    "dataset": "data",
    "augment": "augmentation",
    "loss": "loss",
    "optimizer": "optimizer",
    "schedule": "schedule",
    "init_from": "transfer",
    "epochs": "run",
    "recipe": "output",
}
"""The first option of each group in the help, and the name of the group."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Every option of `python train.py`. `None` stands for a default that depends on other options."""

    framework: str = option("jax", "engine that trains", choices=FRAMEWORKS)
    model: str = option("resnet101", "network", choices=MODELS)
    batch_norm: bool = option(True, "batch norm; without it convolutions get biases", flag="no-batch-norm")
    batch_norm_group: int | None = option(
        None, "batch norm: images that share statistics (default: the batch, or micro-batch)", least=1
    )
    stride_in_1x1: bool = option(False, "a bottleneck's stride on its first 1x1, as in the paper")
    residual_scale: float = option(
        0.2, "initial weight of each block's last batch norm; torchvision's is 1", least=0
    )
    small_images: bool = option(False, "3x3 stride-1 stem without pooling")
    precision: str = option("float32", "compute type; state stays float32 or wider", choices=PRECISIONS)
    drop_path: float = option(
        0.0, "probability of dropping the last block's branch; linearly less before it", least=0, below=1
    )

    dataset: str = option(
        "digits", "digits, synthetic, folder (images in --data-dir), or a TFDS name: NAME[/CONFIG][:VERSION]"
    )
    data_dir: str | None = option(None, "folder of images, or where TFDS keeps its data (default: TFDS' own)")
    train_subset: float = option(1.0, "seeded fraction of the training split to use", above=0, most=1)
    val_fraction: float = option(0.1, "fraction used for validation", least=0, below=1)
    test_fraction: float | None = option(
        None, "fraction held out for the test, of a set that has no test part (default 0.1)", above=0, below=1
    )
    skip_bad: bool = option(False, "folder: pass over files that are no images")
    image_size: str | None = option(None, "96, or 64x96 (height x width); at least 32")
    resize: tuple[int, ...] = option(
        (),
        "shorter side before the crop to --image-size; two: training draws from this range",
        least=MIN_IMAGE_SIZE,
    )
    grayscale: bool = option(False, "convert color images to one channel")
    crop_to_bbox: bool = option(False, "crop images to their bounding box")
    mean_only: bool = option(False, "subtract the mean, do not divide by the standard deviation")
    test_size: str | None = option(None, "size of validation and test images (default: --image-size)")
    augment: str = option("none", "random changes of the training images", choices=AUGMENTATIONS)
    randaugment: tuple[int, ...] = option((), "RandAugment: N operations of magnitude M (0 to 30)", least=0)
    random_erase: float = option(0.0, "probability of filling a random box with the mean", least=0, most=1)
    mixup_alpha: float = option(0.0, "mixup: alpha of the share's Beta distribution; 0 is off", least=0)
    cutmix_alpha: float = option(0.0, "CutMix: the same; with both, each image takes one of them", least=0)

    loss: str = option("cross-entropy", "what training minimizes; bce: a sigmoid a class", choices=LOSSES)
    label_smoothing: float = option(0.0, "part of each target that all classes share", least=0, below=1)
    class_weights: str = option(
        "none", "balanced: the rarer a class, the more it counts", choices=("none", "balanced")
    )

    optimizer: str = option(
        "adam", "optimizer; or, with JAX, optax:NAME or FILE.py:FUNCTION", choices=OPTIMIZERS
    )
    optimizer_arguments: tuple[str, ...] = option(
        (), "arguments of optax:NAME or FILE.py:FUNCTION, such as b1=0.9 nesterov=true"
    )
    lr: float | None = option(None, "learning rate (default 0.001; sgd 0.1)", above=0)
    final_lr: float = option(0.1, "AdaBound: the SGD learning rate its bounds close in on", above=0)
    gamma: float = option(1e-3, "AdaBound: how fast the bounds close in", above=0)
    beta1: float = option(0.9, "decay of the first moment", least=0, below=1)
    beta2: float = option(0.999, "decay of the second moment", least=0, below=1)
    eps: float = option(1e-8, "added to the root of the second moment", least=0)
    momentum: float = option(0.9, "momentum of sgd", least=0, below=1)
    weight_decay: float | None = option(
        None, "L2 on all parameters; decoupled for adamw (default 0.01) and adaboundw; else 0", least=0
    )
    norm_weight_decay: float | None = option(None, "weight decay of batch norm's parameters", least=0)
    bias_weight_decay: float | None = option(None, "weight decay of biases, batch norm's among them", least=0)
    nesterov: bool = option(False, "Nesterov's momentum in sgd")
    clip_grad_norm: float | None = option(None, "largest norm of all gradients together", above=0)
    model_ema_decay: float | None = option(
        None, "evaluate an exponential average of the weights, with this decay per step", above=0, below=1
    )

    schedule: str = option("cosine", "learning-rate schedule", choices=SCHEDULES)
    milestones: tuple[int, ...] = option((), "multistep: steps at which the rate is multiplied", least=1)
    decay_factor: float = option(0.1, "multistep, plateau: the factor", above=0, most=1)
    patience: int = option(10, "plateau: validations without a better loss before the factor", least=0)
    cooldown: int = option(0, "plateau: validations ignored after a change", least=0)
    warmup_steps: int | None = option(
        None, "linear warm-up before any schedule (default: an epoch at most, never over a tenth)", least=0
    )
    schedule_steps: int | None = option(None, "length of the schedule (default: the run's)", least=1)

    init_from: str | None = option(
        None, "begin from weights: a safetensors file of torchvision's names, or hf://OWNER/NAME"
    )
    freeze_backbone: bool = option(False, "train the head alone, batch statistics frozen too")

    epochs: int | None = option(
        None, "passes over the training data (default 7 on digits, else 1)", least=0, most=2**31 - 1
    )
    steps: int | None = option(None, "optimizer steps; wins over --epochs", least=0, most=2**31 - 1)
    batch_size: int = option(32, "training batch", least=1)
    eval_batch_size: int = option(128, "evaluation batch", least=1)
    early_stopping_patience: int | None = option(
        None, "end the run after so many validations without a new lowest loss", least=1
    )
    seed: int = option(0, "seed of weights, split and order", least=0, most=2**32 - 1)
    accumulate: int = option(1, "JAX: micro-batches of each batch, computed in turn to save memory", least=1)
    remat: bool = option(False, "JAX: less memory, residual blocks computed twice")
    distributed: bool = option(
        False, "JAX: one of several processes, see docs/scaling.md for how they are started"
    )
    deterministic: bool = option(False, "bit-exact GPU kernels (slower)")

    recipe: str | None = option(None, "options of recipes/NAME.toml; flags override them")
    run_dir: str | None = option(None, "folder of the run (default: a fresh one under runs/)")
    resume: bool = option(False, "continue the run in --run-dir")
    checkpoint_every: int | None = option(None, "steps between checkpoints (default: an epoch)", least=1)
    eval_every: int | None = option(None, "steps between validations (default: an epoch)", least=1)
    log_every: int = option(10, "steps between updates of the metrics", least=1)
    verify_every: int = option(
        0, "steps between those that are computed again and compared; 0: none", least=0
    )
    log_gradients: bool = option(False, "the norm of each parameter's gradient in the metrics and the report")
    keep_checkpoints: int = option(3, "how many of the newest checkpoints to keep", least=1)
    test: bool = option(True, "evaluate the test set after the last step", flag="no-test")
    report: bool = option(True, "a report at the end, and TensorBoard files", flag="no-report")

    def check(self) -> None:
        """Raise UserError, naming the flag and the remedy, for the first option that is out of range."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            choices = field.metadata["choices"]
            if choices and value not in choices and not (field.name == "optimizer" and is_external(value)):
                fault = f"{flag_of(field)}: unknown value {value!r}"
                others = (*choices, "optax:NAME, FILE.py:FUNCTION") if field.name == "optimizer" else choices
                raise UserError(f"{fault}; choose one of {', '.join(others)}")
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and not isinstance(number, bool):
                    check_limits(flag_of(field), number, **field.metadata["limits"])
        for name, size in (("--image-size", self.image_size), ("--test-size", self.test_size)):
            if size is not None:
                parse_image_size(size, name)
        for fault in (*self._faults(), *self._external_faults(), *self._network_faults()):
            raise UserError(fault)

    def _faults(self) -> Iterator[str]:
        """Yield a line for each pair of options that do not fit together."""
        if len(self.resize) > 2 or list(self.resize) != sorted(self.resize):
            yield f"--resize: {' '.join(map(str, self.resize))}: give one number, or two, the smaller first"
        if len(self.resize) == 2 and self.augment == "none":
            yield "--resize: a range is for training at random sizes; give one number, or --augment crop-flip"
        if self.randaugment and (len(self.randaugment) != 2 or not self.randaugment[0] >= 1):
            numbers = " ".join(map(str, self.randaugment))
            yield f"--randaugment: {numbers}: give the number of operations, and their magnitude, such as 2 9"
        elif self.randaugment and self.randaugment[1] > 30:
            yield f"--randaugment: magnitude {self.randaugment[1]} is too large; give 30 or less"
        if self.randaugment and self.augment.startswith("autoaugment"):
            yield f"--randaugment: {self.augment} changes colors already; give --augment crop-flip with it"
        if list(self.milestones) != sorted(set(self.milestones)):
            yield f"--milestones: {' '.join(map(str, self.milestones))} must increase"
        if self.milestones and self.schedule != "multistep":
            yield "--milestones: only for --schedule multistep; add it, or leave the milestones out"
        if self.schedule == "multistep" and not self.milestones:
            yield "--schedule multistep: needs --milestones STEP [STEP ...]"
        needs_validation = {
            "--schedule plateau": self.schedule == "plateau",
            "--early-stopping-patience": self.early_stopping_patience is not None,
        }
        for flag, asked in needs_validation.items():
            if asked and not self.val_fraction:
                yield f"{flag}: needs validation; give a --val-fraction above 0, or leave it out"
        if self.freeze_backbone and self.init_from is None:
            yield "--freeze-backbone: needs trained weights; give them with --init-from FILE, or leave it out"
        if self.nesterov and not self.momentum:
            yield "--nesterov: needs a --momentum above 0; raise it, or leave the flag out"
        if self.freeze_backbone:
            given = {"--drop-path": self.drop_path, "--batch-norm-group": self.batch_norm_group}
            given |= {"--norm-weight-decay": self.norm_weight_decay is not None}
            for flag in (flag for flag, value in given.items() if value):
                yield f"{flag}: with --freeze-backbone the head alone is trained; leave one of the flags out"
        if self.run_dir == "":
            yield "--run-dir: is empty; name a folder"
        if self.resume and self.run_dir is None:
            yield "--resume: name the run to continue with --run-dir DIR"

    def _external_faults(self) -> Iterator[str]:
        """Yield a line for each option that does not fit an optimizer beside the table."""
        name = self.optimizer
        if not is_external(name):
            if self.optimizer_arguments:
                yield f"--optimizer-arguments: {name} has flags of its own; leave the arguments out"
            return
        if self.framework != "jax":
            yield f"--optimizer: {name} needs --framework jax; use that, or choose {', '.join(OPTIMIZERS)}"
        if self.verify_every:
            yield f"--verify-every: the NumPy engine has no {name}; leave the flag out"
        for option_name in HYPERPARAMETERS:
            value = getattr(self, option_name)
            if value != getattr(Config, option_name) and not (option_name == "weight_decay" and not value):
                fault = f"{name} takes arguments of its own"
                yield f"--{option_name.replace('_', '-')}: {fault}; give --optimizer-arguments NAME=VALUE"
        for argument in self.optimizer_arguments:
            if not argument.partition("=")[0].isidentifier() or "=" not in argument:
                yield f"--optimizer-arguments: {argument!r} is no argument; write NAME=VALUE, such as b1=0.9"

    def _network_faults(self) -> Iterator[str]:
        """Yield a line for each option that the engine or the network does not have."""
        numpy, cnn = self.framework == "numpy", self.model == "cnn"
        if numpy and self.precision == "bfloat16":
            yield "--precision: bfloat16 needs --framework jax; NumPy has float32 and float64"
        for name in ("accumulate", "remat", "distributed"):
            if numpy and getattr(self, name) != getattr(Config, name):
                yield f"--{name}: needs --framework jax; use that, or leave the flag out"
        yield from self._verification_faults()
        if self.batch_size % self.accumulate:
            fault = f"{self.accumulate} does not divide --batch-size {self.batch_size}"
            yield f"--accumulate: {fault}; change one"
        if cnn and self.test_size:
            yield "--test-size: the head of cnn fits one size of images; leave the flag out"
        if cnn and self.drop_path:
            yield "--drop-path: cnn has no residual blocks; leave the flag out"
        for name in ("norm_weight_decay", "batch_norm_group"):
            if getattr(self, name) is not None and (cnn or not self.batch_norm):
                without = "cnn" if cnn else "with --no-batch-norm the network"
                yield f"--{name.replace('_', '-')}: {without} has no batch norm; leave the flag out"
        if self.batch_size // self.accumulate % (self.batch_norm_group or 1):
            parts = f" in {self.accumulate} micro-batches" if self.accumulate > 1 else ""
            fault = f"{self.batch_norm_group} does not divide --batch-size {self.batch_size}{parts}"
            yield f"--batch-norm-group: {fault}; change one"
        if cnn and self.remat:
            yield "--remat: cnn has no residual blocks; leave the flag out"
        if cnn and not self.batch_norm:
            yield "--no-batch-norm: cnn has no batch norm; leave the flag out"
        if self.stride_in_1x1 and self.model not in ("resnet50", "resnet101", "resnet152"):
            yield f"--stride-in-1x1: {self.model} has no bottlenecks; choose resnet50, resnet101 or resnet152"
        if self.small_images and self.model not in IMAGENET_MODELS:
            yield f"--small-images: {self.model} has a 3x3 stem already; leave the flag out"

    def _verification_faults(self) -> Iterator[str]:
        """Yield a line for each option with which the engines do not compute the same step."""
        if not self.verify_every:
            return
        if self.precision != "float32":
            yield f"--verify-every: float64 decides on float32, not on {self.precision}; leave one flag out"
        if self.distributed:
            yield "--verify-every: not with --distributed; leave one of the flags out"
        if self.accumulate > 1 and self.batch_norm and self.model != "cnn" and not self.freeze_backbone:
            yield "--verify-every: NumPy has no batch norm over the parts of --accumulate; leave one flag out"

    def check_batch_norm(self, height: int, width: int) -> None:
        """Raise UserError if images of this size leave batch norm a single value, whose variance is 0."""
        shrinks = self.model in IMAGENET_MODELS and not self.small_images  # by 32
        single = 1 in (self.batch_size // self.accumulate, self.batch_norm_group) and not self.freeze_backbone
        if single and self.batch_norm and shrinks and max(height, width) <= 32:
            many = f"--accumulate: {self.batch_size} parts of 1"
            flag = "--batch-size: 1" if self.batch_size == 1 else many
            if self.batch_norm_group is not None and self.batch_size > self.accumulate:
                flag = "--batch-norm-group: 1"
            reason = f"as {self.model} brings {height}x{width} images down to 1x1"
            raise UserError(f"{flag} is too few for batch norm, {reason}; use 2 or more")

    def data_options(self) -> dict[str, Any]:
        """The keyword arguments of `data.load`, beside the data set's name."""
        names = [
            *("data_dir", "batch_size", "seed", "train_subset", "val_fraction", "test_fraction", "skip_bad"),
            *("resize", "grayscale", "crop_to_bbox", "mean_only", "augment", "randaugment", "random_erase"),
            *("mixup_alpha", "cutmix_alpha"),
        ]
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        sizes = {"image_size": self.image_size, "eval_size": self.test_size}
        return options | {name: parse_image_size(size) if size else None for name, size in sizes.items()}

    def model_options(self) -> dict[str, Any]:
        """The keyword arguments of the network's builder that differ from its defaults."""
        options: dict[str, Any] = {
            name: True for name in ("stride_in_1x1", "small_images") if getattr(self, name)
        }
        if not self.batch_norm:
            options["batch_norm"] = False
        elif self.model != "cnn":
            options["residual_scale"] = self.residual_scale
        if self.batch_norm_group is not None:
            options["batch_norm_group"] = self.batch_norm_group
        return options

    def engine_options(self) -> dict[str, Any]:
        """The keyword arguments of an engine that follow from the options alone, without its optimizer."""
        jax_only = ["accumulate", "remat"] if self.framework == "jax" else []
        names = ["model", "precision", "seed", "log_gradients", "clip_grad_norm", *jax_only]
        names += ["loss", "label_smoothing"]
        options = {name: getattr(self, name) for name in names}
        return {"model_options": self.model_options(), "ema_decay": self.model_ema_decay, **options}

    def external_arguments(self) -> dict[str, Any]:
        """The keyword arguments of an optimizer beside the table: values are JSON, and else text.

        Examples:
            >>> Config(optimizer_arguments=("b1=0.9", "nesterov=true")).external_arguments()
            {'b1': 0.9, 'nesterov': True}
        """
        pairs = (argument.partition("=")[::2] for argument in self.optimizer_arguments)
        return {name: _value(text) for name, text in pairs}

    def optimizer_options(self) -> dict[str, Any]:
        """The hyper-parameters of the optimizer, but for the learning rate."""
        if is_external(self.optimizer):
            return {"base_lr": self.lr}  # its own are `external_arguments`
        return {
            "base_lr": self.lr,
            "final_lr": self.final_lr,
            "gamma": self.gamma,
            "b1": self.beta1,
            "b2": self.beta2,
            "eps": self.eps,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "norm_weight_decay": self.norm_weight_decay,
            "bias_weight_decay": self.bias_weight_decay,
            "nesterov": self.nesterov,
        }

    def total_steps(self, steps_per_epoch: int) -> int:
        """The length of the run in steps."""
        if self.steps is not None:
            return self.steps
        return steps_per_epoch * (DEFAULT_EPOCHS.get(self.dataset, 1) if self.epochs is None else self.epochs)


def is_external(optimizer: str) -> bool:
    """True for the name of a transformation beside the table: optax:NAME, or FILE.py:FUNCTION."""
    return EXTERNAL.fullmatch(optimizer) is not None


def as_arguments(table: Mapping[str, Any]) -> tuple[str, ...]:
    """Return arguments of a function as `optimizer_arguments` has them, sorted by name.

    Examples:
        >>> as_arguments({"nesterov": True, "b1": 0.9})
        ('b1=0.9', 'nesterov=true')
    """
    return tuple(f"{name}={json.dumps(table[name])}" for name in sorted(table))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def parse_image_size(text: str, flag: str = "--image-size") -> tuple[int, int]:
    """'96' to (96, 96), '64x96' to (64, 96): height, width. Raises UserError, which names the flag."""
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if not match:
        raise UserError(f"{flag}: {text!r} is no size; write 96, or 64x96 for height x width")
    height, width = int(match[1]), int(match[2] or match[1])
    check_image_size(height, width, flag)
    return height, width


def check_image_size(height: int, width: int, flag: str = "--image-size") -> None:
    """Raise UserError for a size that is too small for a network."""
    if min(height, width) < MIN_IMAGE_SIZE:
        size = str(height) if height == width else f"{height}x{width}"
        remedy = "the network halves it five times, give at least 32"
        raise UserError(f"{flag}: {size} is too small; {remedy}")


def flag_of(field: dataclasses.Field[Any]) -> str:
    """The command-line flag of a field of Config."""
    return "--" + (field.metadata["flag"] or field.name.replace("_", "-"))


LIMITS = {
    "above": ("above", operator.gt),
    "least": ("at least", operator.ge),
    "below": ("below", operator.lt),
    "most": ("at most", operator.le),
}


def check_limits(flag: str, value: float, **limits: float) -> None:
    """Raise UserError, naming the flag, if a value is not finite, not within its limits, or too large."""
    rules = [(*LIMITS[name], limit) for name, limit in limits.items()]
    largest = 2**63 if isinstance(value, int) else math.inf
    if not abs(value) < largest or not all(holds(value, limit) for _, holds, limit in rules):
        allowed = " and ".join(f"{words} {limit:g}" for words, _, limit in rules)
        raise UserError(f"{flag}: {value} is out of range; give a number {allowed}")
