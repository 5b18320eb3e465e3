"""Paths as users give them: `~` stands for the home folder, and only local paths are taken."""

import os

from experiment.errors import UserError

HUB = "hf://"
"""What begins the name of weights on Hugging Face's Hub, where a file of weights is expected."""


def local_path(name: str, text: str, *, any_bytes: bool = False) -> str:
    """Return the local path that the flag or argument `name` was given, with `~` expanded.

    Args:
        name: the flag or argument.
        text: its value.
        any_bytes: take file names that are not UTF-8, too. TFDS, Orbax, TensorBoard and HTML cannot.

    Raises:
        UserError: the text is a URL, is not UTF-8, or begins with `~` and there is no such home folder.
    """
    if "://" in text:
        raise UserError(f"{name}: {text} is a URL; name a local path, such as a mounted folder")
    if "\0" in text:
        raise UserError(f"{name}: {text!r} holds a null character; name another path")
    sizes = [len(part.encode(errors="surrogatepass")) for part in (text, *text.split("/"))]
    if sizes[0] > 4095 or max(sizes[1:]) > 255:
        raise UserError(f"{name}: {text[:40]!r}... is longer than a file name may be; name another path")
    if not any_bytes and any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{name}: the name {text!r} is not UTF-8; rename it")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise UserError(f"{name}: the home folder of {text} is not known; write the path out, or ./{text}")
    return path
