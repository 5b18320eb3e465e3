"""How this program was started, and where it lies: in a checkout, or installed from a wheel.

Messages suggest commands, and usage lines begin, with the program that the user typed.
"""

import importlib.resources
import sys
from pathlib import Path

SCRIPT = "threeway-resnet"
"""The console script, and the name of the distribution."""

ROOT = Path(__file__).resolve().parents[1]
"""The folder that holds the packages: of a checkout, or site-packages."""


def in_checkout() -> bool:
    """True if the packages lie in a checkout, which has train.py beside them; no wheel has it."""
    return (ROOT / "train.py").is_file()


def command(name: str) -> str:
    """Return the words with which the user would start the command `name`.

    They are `python train.py` and `python -m experiment NAME`, or `threeway-resnet NAME` if that was typed.
    Training is `python -m experiment train` if that was typed, or if there is no train.py.

    Examples:
        >>> command("report")
        'python -m experiment report'
    """
    typed = Path(sys.argv[0])
    if typed.name == SCRIPT:
        return f"{SCRIPT} {name}"
    trains_as_module = typed.parts[-2:] == ("experiment", "__main__.py") and sys.argv[1:2] == ["train"]
    if name == "train" and in_checkout() and not trains_as_module:
        return "python train.py"
    return f"python -m experiment {name}"


def label() -> str:
    """Return what begins a line of training on stderr: `train.py: `, or nothing if that was not typed."""
    return "train.py: " if command("train").endswith("train.py") else ""


def install_command(extra: str) -> str:
    """Return the command that installs an extra; WHEEL stands for the file that was installed."""
    what = "-c constraints.txt -e '.[{}]'" if in_checkout() else "'WHEEL[{}]'"
    return f"pip install {what.format(extra)}"


def shipped(name: str) -> Path:
    """Return the folder `name`, "recipes", "studies" or "weights", which is data of `experiment`.

    A checkout has links there to the folders at its top.
    """
    return Path(str(importlib.resources.files("experiment") / name))


def found(path: Path) -> Path:
    """Return `path`; if nothing is there, the shipped file of that name, such as weights/digit.png."""
    inside = path.parts[:1] in (("studies",), ("weights",)) and ".." not in path.parts
    data = shipped(path.parts[0]).joinpath(*path.parts[1:]) if inside else path
    return data if not path.exists() and data.exists() else path
