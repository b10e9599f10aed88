"""Locating weights: in a folder, or in a Hub repository at one commit."""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gdro.common.errors import UserError

CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Source:
    """What `from_pretrained` takes: a folder (no commit), or a Hub id and the commit to pin it to."""

    name: str  # folder or Hub id
    commit: str | None
    index: Path  # the local path of the requested file

    @property
    def version(self) -> str:
        """Changes with the weights: the Hub commit, or the digest of every safetensors file in the folder."""
        return self.commit or digest(sorted(Path(self.name).rglob("*.safetensors")))


def locate(name: str, file: str, *, field: str, expected: str, revision: str | None = None) -> Source:
    """The folder or Hub repository `name`, which must hold `file`; downloads only that file.

    Raises UserError naming `field` if it is not found; offline, if it is not in the Hub's cache.
    """
    folder = Path(os.path.expanduser(name))
    if os.path.exists(folder):
        if not os.path.isfile(folder / file):
            raise UserError(f"{field}: {name} has no {file}; expected {expected}")
        return Source(str(folder), None, folder / file)
    if not HUB_ID.fullmatch(name):
        raise UserError(f"{field}: {name} not found; expected {expected}")
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import GatedRepoError

    commit, cause = None, ""
    try:
        commit = HfApi().model_info(name, revision=revision, timeout=10).sha
    except Exception as error:  # no network or no such model: fail at once, whereas a download would keep retrying
        cause = _cause(error)
    try:
        path = Path(hf_hub_download(name, file, revision=commit or revision, local_files_only=commit is None))
    except GatedRepoError:
        raise UserError(
            f"{field}: {name} is gated; expected its terms accepted on its Hub page, and that account's token "
            "(hf auth login, or HF_TOKEN)"
        ) from None
    except Exception as error:
        cause = cause or _cause(error)
        raise UserError(f"{field}: {name} is neither a folder nor on the Hub ({cause}); expected {expected}") from None
    return Source(name, path.parent.name, path)


def fetch(source: str, commit: str | None, file: str) -> Path:
    """The file in the folder `source`, or in a Hub repository at `commit`; OSError or ValueError if it is missing."""
    if commit is None:
        path = Path(source) / file
        if not path.is_file():
            raise FileNotFoundError(path)
        return path
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(source, file, revision=commit))


def _cause(error: Exception) -> str:
    """The error in one line, with environment variables that may be related."""
    proxies = [f"{kind}_proxy" for kind in ("http", "https", "all", "no")]
    names = [*proxies, *map(str.upper, proxies), *CERTIFICATES, "HF_ENDPOINT", "HF_HUB_OFFLINE"]
    given = [name for name in names if os.environ.get(name)]
    said = f"{type(error).__name__}: {' '.join(str(error).split()):.150}"
    return f"{said}; {', '.join(given)} set" if given else said


def digest(files: Iterable[Path]) -> str:
    """Digest of the files' contents, in order."""
    total = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{total.hexdigest()[:16]}"
