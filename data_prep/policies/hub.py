"""Fetch a policy at one commit: `python -m data_prep.policies.hub --out DIR --repo R --revision C`.

A commit means the same bytes for good; every file must have the digest that the hub records for
it, and nothing is fetched that could be executed. The files are linked from the hub's own cache,
where a download that broke off goes on. With `HF_HUB_OFFLINE=1` they come from that cache alone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep import manifest
from data_prep.command import CommandParser, check_output, commit, first_line, run, staging
from data_prep.policies.folder import check_no_code_in
from hpo_verl.errors import DataError
from hpo_verl.runs.files import sha256_once

MANIFEST = "fetched.json"
# transformers reads model.safetensors or model-00001-of-....safetensors.
WEIGHTS = "model*.safetensors"
# Tokenizer, configuration and licence.
SMALL = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "USE_POLICY*")
UNWANTED = ("*/*", ".*")
HOW_TO_GIVE_A_FOLDER = (
    "or copy the model to this machine and give its folder, actor_rollout_ref.model.path=FOLDER"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; raise HpoVerlError on bad input."""
    options = make_parser().parse_args(argv)
    names = fetch(options.out, options.repo, options.revision)["files"]
    print(f"{options.out}: {options.repo} at {options.revision}, {len(names)} files")


def make_parser() -> CommandParser:
    """The command's arguments."""
    parser = CommandParser(description="Fetch a policy from the hub at one commit.")
    parser.add_argument("--out", required=True, type=Path, help="folder to make")
    parser.add_argument("--repo", required=True, help="organisation/model")
    parser.add_argument("--revision", required=True, type=commit, help="commit of the model")
    return parser


def fetch(out: str | Path, repo: str, revision: str) -> dict[str, Any]:
    """Fetch a model into the folder `out`, which appears when it is complete.

    Returns:
        The manifest, which is also in the folder.

    Raises:
        DataError: The folder cannot be written or is in use; no such model, access or
            network; the model has no safetensors or brings code; a file is not the commit's.
    """
    out = Path(out).absolute()
    check_output(out)
    if out.is_dir() and any(out.iterdir()):
        raise DataError(f"{out}: is not empty; name a new folder")
    listed = _hub(repo, revision, [*SMALL, WEIGHTS], dry_run=True)
    weights = [file.filename for file in listed if file.filename.endswith(".safetensors")]
    small = [file.filename for file in listed if file.filename not in weights]
    if not weights:
        raise DataError(f"{repo}: commit {revision} has no weights in safetensors")
    needed = sum(file.file_size for file in listed if file.will_download)
    free = shutil.disk_usage(next(parent for parent in out.parents if parent.exists())).free
    if needed > free:
        raise DataError(f"{out}: needs {needed / 1e9:.1f} GB; its disk has {free / 1e9:.1f} GB")
    with staging(out.parent) as temporary:
        new = temporary / out.name
        new.mkdir()
        # The small files first: code is refused before gigabytes are fetched.
        for names in (small, weights):
            snapshot = Path(_hub(repo, revision, names))
            for name in names:
                _place((snapshot / name).resolve(), new / name, f"{repo} at commit {revision}")
            check_no_code_in(new, f"{repo}@{revision}")
        facts = {"repo": repo, "revision": revision}
        written = manifest.write_manifest(new, MANIFEST, facts)
        os.replace(new, out)
    return written


def read_manifest(directory: Path) -> dict[str, Any]:
    """Which commit of which model a fetched folder holds, and its files' digests; or DataError."""
    return manifest.read_manifest(directory, MANIFEST, ("repo", "revision"))


def _hub(repo: str, revision: str, names: Sequence[str], dry_run: bool = False) -> Any:
    """Return the cache's folder with these files of a commit, or with `dry_run` what they are."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(names),
            ignore_patterns=list(UNWANTED),
            dry_run=dry_run,
        )
    except GatedRepoError as error:
        raise DataError(
            f"{repo}: is gated; accept its terms on the hub and set HF_TOKEN, "
            f"{HOW_TO_GIVE_A_FOLDER}"
        ) from error
    except RepositoryNotFoundError as error:
        raise DataError(f"{repo}: the hub has no such model, or HF_TOKEN may not see it") from error
    # The client raises errors of several libraries; each of them means the same here.
    except Exception as error:
        raise DataError(
            f"{repo}: commit {revision} cannot be read from the hub "
            f"({type(error).__name__}: {first_line(error)}); mend that, {HOW_TO_GIVE_A_FOLDER}"
        ) from error


def _place(cached: Path, target: Path, origin: str) -> None:
    """Link a file of the cache if it is what the hub recorded, or copy it to another disk.

    The cache names a file by the hub's digest: SHA-256 of a large one, git's SHA-1 of a small one.
    """
    if len(cached.name) == hashlib.sha256().digest_size * 2:
        digest = sha256_once(cached)
    else:
        content = cached.read_bytes()
        header = b"blob %d\0" % len(content)
        digest = hashlib.sha1(header + content, usedforsecurity=False).hexdigest()
    if digest != cached.name:
        raise DataError(
            f"{cached}: its content is not that of {target.name} in {origin}; "
            "move it away and try again"
        )
    try:
        os.link(cached, target)
    except OSError:
        shutil.copyfile(cached, target)


if __name__ == "__main__":
    sys.exit(run(main))
