"""Fetch a policy at one commit: `python -m data_prep.policies.hub --out DIR --repo R --revision C`.

A name on the hub means whatever its owner puts there next; a commit means the same
bytes for good. Fetched are the weights in safetensors, the tokenizer, the
configuration and the licence, and nothing that could be executed. Every file must have
the digest that the hub records for that commit. They are kept in the hub's own cache,
where a download that broke off goes on, and linked from the new folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.command import CommandParser, commit, run
from data_prep.output import check_output, first_line
from data_prep.policies.folder import check_no_code_in
from hpo_verl.errors import DataError
from hpo_verl.runs.files import remember_sha256, sha256_once

MANIFEST = "fetched.json"
WEIGHTS = ".safetensors"
# The tokenizer's and the configuration's files.
SUFFIXES = (".json", ".jinja", ".model", ".txt")
TERMS = ("LICENSE", "NOTICE", "USE_POLICY")
HUB_SECONDS = 30.0
REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HOW_TO_GIVE_A_FOLDER = (
    "or copy the model to this machine and give its folder, actor_rollout_ref.model.path=FOLDER"
)


@dataclass(frozen=True)
class HubFile:
    """A file of a commit.

    Attributes:
        name: in the repository's uppermost folder.
        bytes: its size.
        digest: SHA-256 of a large file's content, git's SHA-1 of a small one's.
    """

    name: str
    bytes: int
    digest: str

    @property
    def is_weights(self) -> bool:
        """Whether it holds parameters."""
        return self.name.endswith(WEIGHTS)

    @property
    def has_sha256(self) -> bool:
        """Whether the digest is a SHA-256."""
        return len(self.digest) == hashlib.sha256().digest_size * 2

    def describes(self, path: Path) -> bool:
        """Whether a file on disk has this digest."""
        if self.has_sha256:
            return sha256_once(path) == self.digest
        content = path.read_bytes()
        header = b"blob %d\0" % len(content)
        return hashlib.sha1(header + content, usedforsecurity=False).hexdigest() == self.digest


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; raise HpoVerlError on bad input."""
    parser = CommandParser(description="Fetch a policy from the hub at one commit.")
    parser.add_argument("--out", required=True, type=Path, help="folder to make")
    parser.add_argument("--repo", required=True, type=_repo, help="organisation/model")
    parser.add_argument("--revision", required=True, type=commit, help="commit of the model")
    arguments = parser.parse_args(argv)
    manifest = fetch(arguments.out, arguments.repo, arguments.revision)
    size = sum(file["bytes"] for file in manifest["files"].values())
    print(
        f"{arguments.out}: {arguments.repo} at {arguments.revision}, {len(manifest['files'])} "
        f"files, {size / 1e9:.1f} GB"
    )


def fetch(out: str | Path, repo: str, revision: str) -> dict[str, Any]:
    """Fetch a model into the folder `out`, which appears when it is complete.

    Args:
        out: Folder; must not exist, or be empty.
        repo: `organisation/model` on the hub.
        revision: Commit, 40 hexadecimal digits.

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
    files = _list_files(repo, revision)
    _check_space(out, files)
    made = [folder for folder in out.parents if not folder.exists()]
    done = False
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
            partial = Path(folder) / out.name
            partial.mkdir()
            # The small files first: code is refused before gigabytes are fetched.
            for file in sorted(files, key=lambda file: (file.is_weights, file.name)):
                if file.is_weights:
                    check_no_code_in(partial, f"{repo}@{revision}")
                _place(_download(repo, revision, file), partial / file.name)
            manifest = {
                "repo": repo,
                "revision": revision,
                "files": {file.name: asdict(file) for file in files},
            }
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
            os.replace(partial, out)
        done = True
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {first_line(error)}") from error
    finally:
        for folder in () if done else made:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
    return manifest


def read_manifest(directory: Path) -> tuple[dict[str, Any], list[HubFile]]:
    """Read what a fetched policy's folder says of itself, and which files it should hold.

    Raises:
        DataError: The manifest is missing or damaged.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = [HubFile(**entry) for entry in manifest["files"].values()]
        return {key: manifest[key] for key in ("repo", "revision", "files")}, files
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}; remove {directory}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: is not a manifest of this package; remove {directory}") from error


def check(directory: str | Path) -> dict[str, Any]:
    """Verify a policy that was fetched earlier, and return its manifest.

    Raises:
        DataError: A file is missing or not that of the commit; names it and the remedy.
    """
    directory = Path(directory)
    manifest, files = read_manifest(directory)
    command = f"--repo {manifest['repo']} --revision {manifest['revision']} --out {directory}"
    remedy = f"remove {directory} and fetch it anew: python -m data_prep.policies.hub {command}"
    for file in files:
        found = directory / Path(file.name).name
        if not found.is_file():
            raise DataError(f"{found}: no such file, but {MANIFEST} lists it; {remedy}")
        if not file.describes(found):
            raise DataError(f"{found}: its content is not that of the commit; {remedy}")
    return manifest


def made(directory: Path) -> None:
    """Take over the digests of what the command has just fetched, so that nothing is read twice."""
    for file in read_manifest(directory)[1]:
        if file.has_sha256:
            remember_sha256(directory / Path(file.name).name, file.digest)


def _repo(text: str) -> str:
    if not REPO.fullmatch(text):
        raise ArgumentTypeError(f"{text!r} is not of the form organisation/model")
    return text


def _list_files(repo: str, revision: str) -> list[HubFile]:
    """The files of a commit that a policy needs.

    Raises:
        DataError: The hub does not answer or refuses, or there are no safetensors.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        facts = HfApi().model_info(
            repo, revision=revision, files_metadata=True, timeout=HUB_SECONDS
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
    files = [
        HubFile(
            entry.rfilename, entry.size or 0, entry.lfs.sha256 if entry.lfs else str(entry.blob_id)
        )
        for entry in facts.siblings or []
        if _is_wanted(entry.rfilename)
    ]
    if not any(file.is_weights for file in files):
        raise DataError(f"{repo}: commit {revision} has no weights in safetensors")
    return files


def _is_wanted(name: str) -> bool:
    if "/" in name or name.startswith("."):
        return False
    if name.endswith(WEIGHTS):
        # transformers reads model.safetensors or model-00001-of-....safetensors.
        return name.startswith("model")
    return name.endswith(SUFFIXES) or name.startswith(TERMS)


def _check_space(out: Path, files: Sequence[HubFile]) -> None:
    existing = next(folder for folder in out.parents if folder.exists())
    needed, free = sum(file.bytes for file in files), shutil.disk_usage(existing).free
    if needed > free:
        raise DataError(f"{out}: needs {needed / 1e9:.1f} GB; {existing} has {free / 1e9:.1f} GB")


def _download(repo: str, revision: str, file: HubFile) -> Path:
    """A file in the hub's cache, of which the content is that of the commit.

    Raises:
        DataError: It cannot be fetched, or is another.
    """
    import huggingface_hub

    try:
        path = Path(huggingface_hub.hf_hub_download(repo, file.name, revision=revision)).resolve()
    except Exception as error:
        raise DataError(
            f"{repo}: {file.name} at commit {revision} cannot be fetched "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    if not file.describes(path):
        raise DataError(
            f"{path}: its content is not that of {file.name} in {repo} at commit {revision}; "
            "remove it and try again"
        )
    return path


def _place(source: Path, target: Path) -> None:
    """Link a file, or copy it where the cache lies on another disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


if __name__ == "__main__":
    sys.exit(run(main))
