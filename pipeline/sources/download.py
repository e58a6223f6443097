"""MovieLens archives, downloaded once from GroupLens and verified by its checksums.

    download("ml-1m", Path("~/.cache/bert4rec").expanduser())    # .../ml-1m.zip

Their licences forbid redistribution; see the README inside each archive.
"""

import hashlib
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from pipeline.errors import UserError, first_remedy
from pipeline.files import lock, make_folder, whole_file

GROUPLENS = "https://files.grouplens.org/datasets/movielens"
# As published beside each archive (NAME.zip.md5).
CHECKSUMS = {
    "ml-100k": "0e33842e24a9c977be4e0107933c0723",
    "ml-1m": "c4d9eecfca2ab87c1945afe126590906",
    "ml-20m": "cd245b17a1ae2cc31bb14903e1204af3",
    "ml-25m": "6b51fb2759a8657d3bfcbfc42b592ada",
    "ml-32m": "d472be332d4daa821edc399621853b57",
}
_TIMEOUT_SECONDS = 20


def download(name: str, folder: Path) -> Path:
    """Path of the archive in `folder`, downloaded if it is missing.

    Many processes may call this at once: one downloads, the others wait.
    """
    archive = folder / f"{name}.zip"
    if archive.exists():
        return archive
    try:
        make_folder(folder)
        with lock(folder / f".{archive.name}.lock"):
            if not archive.exists():
                _fetch(name, archive)
    except urllib.error.URLError as error:
        raise _failure(name, f"cannot download ({error.reason})") from error
    except OSError as error:
        if first := first_remedy(error):
            raise UserError(
                f"{name}: cannot download to {folder} ({error.strerror}); {first}, or name another "
                "folder with --cache_dir"
            ) from error
        raise _failure(name, f"cannot download to {folder} ({error})") from error
    return archive


def _fetch(name: str, archive: Path) -> None:
    url, digest = f"{GROUPLENS}/{name}.zip", hashlib.md5(usedforsecurity=False)
    with (
        urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response,
        whole_file(archive) as file,
    ):
        size = int(response.headers.get("Content-Length") or 0) or None
        with tqdm(total=size, unit="B", unit_scale=True, desc=archive.name) as progress:
            while block := response.read(1 << 20):
                file.write(block)
                digest.update(block)
                progress.update(len(block))
        if digest.hexdigest() != CHECKSUMS[name]:
            found = f"md5 {digest.hexdigest()} where GroupLens publishes {CHECKSUMS[name]}"
            raise _failure(name, f"{url} is not the archive ({found})")


def _failure(name: str, problem: str) -> UserError:
    return UserError(
        f"{name}: {problem}; try again, or fetch {GROUPLENS}/{name}.zip elsewhere and give its "
        "place with --dataset_path"
    )
