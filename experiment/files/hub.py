"""Weights by name: hf://OWNER/NAME@REVISION is model.safetensors of a repository on Hugging Face's Hub.

huggingface_hub downloads the file into its cache, and reads HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN itself.
It does not check what it downloaded; here the file's hash is compared with the one that the server announced.
"""

import hashlib
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

from experiment.errors import UserError, named_line
from experiment.files.run_folder import file_sha256
from experiment.options.paths import HUB
from experiment.program import install_command

FILE = "model.safetensors"
NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


class HubFile(NamedTuple):
    """A file in the cache of huggingface_hub.

    Attributes:
        path: where it is.
        commit: of the repository, 40 hexadecimal digits.
        sha256: of its content.
    """

    path: Path
    commit: str
    sha256: str


def local_file(name: str | Path) -> Path:
    """Return the path of a file of weights, which is downloaded if its name begins with hf://.

    Raises:
        UserError: as `fetch` does.
    """
    return fetch(name).path if isinstance(name, str) and name.startswith(HUB) else Path(name)


def fetch(name: str, commit: str | None = None) -> HubFile:
    """Return the file of a repository, from the cache or from the server.

    Args:
        name: hf://OWNER/NAME, or hf://OWNER/NAME@REVISION with a branch, a tag or a commit.
        commit: the commit that `name` stood for before, to be taken now.

    Raises:
        UserError: another name; huggingface_hub is absent; no such repository, revision or file; the server
            cannot be reached, or what it sent is not what it announced. The cache then has no such file.
    """
    match = NAME.fullmatch(name.removeprefix(HUB))
    if match is None:
        raise UserError(f"{name}: is no name on the Hub; write hf://OWNER/NAME, or hf://OWNER/NAME@REVISION")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError(
            f"{name}: needs huggingface_hub, which the extra `hub` brings: run `{install_command('hub')}`"
        )
    path = _download(name, match[1], commit or match[2] or "main")
    sha256 = file_sha256(path)
    _check(name, path, sha256)
    return HubFile(path, path.parent.name, sha256)


def _download(name: str, repository: str, revision: str) -> Path:
    """Return the path in the cache: .../snapshots/COMMIT/model.safetensors."""
    import huggingface_hub
    from huggingface_hub import errors

    # Of its warnings each says that it goes on after a broken connection, and has two lines
    huggingface_hub.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        return Path(huggingface_hub.hf_hub_download(repository, FILE, revision=revision))
    except errors.GatedRepoError:
        reason = "access must be granted on its page; then set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        reason = "the server has no such repository, or it is private; check the name, or set HF_TOKEN"
    except errors.RevisionNotFoundError:
        reason = f"the repository has no revision {revision}; name another after @"
    except errors.RemoteEntryNotFoundError:
        reason = f"the repository has no {FILE}, and no other file is read; name another repository"
    except errors.LocalEntryNotFoundError:
        offline = huggingface_hub.constants.is_offline_mode()
        why = "HF_HUB_OFFLINE is set" if offline else "the server cannot be reached"
        remedy = "unset it once" if offline else "try again with a connection"
        reason = f"{why}, and the file is not in the cache; {remedy}"
    except OSError as error:
        reason = f"the download failed ({_words(error)}); the same command tries again"
    except Exception as error:  # of the HTTP library that huggingface_hub uses, another in each version
        reason = f"the download was interrupted ({_words(error)}); the same command tries again"
    raise UserError(f"{name}: {reason}")


def _words(error: BaseException) -> str:
    """Return an error in a few words, without addresses: they may hold a signature."""
    return re.sub(r"\w+://\S+", "URL", named_line(error))[:150]


def _check(name: str, path: Path, sha256: str) -> None:
    """Raise UserError, and remove the file from the cache, if it is not what the server announced.

    The cache names a file's content by the announced hash: SHA-256, or for a small file Git's SHA-1.
    """
    content = path.resolve()
    announced = content.name
    if re.fullmatch("[0-9a-f]{64}", announced):
        is_same = announced == sha256
    elif re.fullmatch("[0-9a-f]{40}", announced):
        data = content.read_bytes()
        is_same = announced == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    else:  # a file system without links: the hash is not recorded
        return
    if not is_same:
        path.unlink()
        content.unlink(missing_ok=True)
        raise UserError(
            f"{name}: the file has another hash than the server announced, {announced[:12]}...; it was "
            "removed from the cache; run the command again, and if this comes again, take another source"
        )
