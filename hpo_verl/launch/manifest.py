"""What a run was made of: `manifest.json` in its folder, and beside its checkpoints.

verl goes on from whatever checkpoint its folder holds. The manifest beside the
checkpoints tells whose they are, so that no run goes on from those of another
algorithm, policy, tokenizer, data file, number of ranks or of DataLoader workers.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data_prep.policies import hub as hub_policy
from hpo_verl.checks.model_folders import policy_folder
from hpo_verl.config.settings import cards_a_copy, data_files, leaves
from hpo_verl.errors import DataError
from hpo_verl.installed import package_versions
from hpo_verl.runs.checkpoints import holds_checkpoints
from hpo_verl.runs.files import file_sha256, sha256_once, write_atomically

FILE_NAME = "manifest.json"
CONFIG_NAME = "config.yaml"
WORKERS_KEY = "data.dataloader_num_workers"
MASK = "***"
# Words of a key, in snake_case or upper case, whose text is nobody else's business.
SECRET_WORDS = {"token", "secret", "password", "passwd", "pass", "credential", "credentials"}
SECRET_ENDINGS = {("api", "key"), ("access", "key"), ("private", "key"), ("auth", "key")}
# Keys of well-known services, by their prefix, and passwords inside URLs.
SECRET_TEXT = re.compile(
    r"\b(?:hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[abprs]-|AKIA)[A-Za-z0-9_-]{8,}"
    r"|(?<=://)[^/@\s:]{1,100}:[^/@\s]{1,200}(?=@)"
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def is_secret(key: str) -> bool:
    """Whether a key's last part names something secret, such as `HF_TOKEN` or `api_key`."""
    words = key.rsplit(".", 1)[-1].lower().replace("-", "_").split("_")
    return bool(SECRET_WORDS & set(words)) or tuple(words[-2:]) in SECRET_ENDINGS


def masked(value: Any, key: str = "") -> Any:
    """Plain containers with secret texts replaced by `***`; everything else as it is."""
    if isinstance(value, dict):
        return {name: masked(entry, str(name)) for name, entry in value.items()}
    if isinstance(value, list):
        return [masked(entry, key) for entry in value]
    if isinstance(value, str) and value:
        return MASK if is_secret(key) else SECRET_TEXT.sub(MASK, value)
    return value


def masked_command(command: Sequence[str]) -> list[str]:
    """A command line whose `key=value` arguments are masked where the key is secret."""
    shown = []
    for text in command:
        key, sign, value = text.partition("=")
        shown.append(key + sign + masked(value, key) if sign else masked(text))
    return shown


def folder_sha256(files: Sequence[Path]) -> str:
    """SHA-256 over the names and contents of files, whatever their order."""
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda file: file.name):
        digest.update(f"{path.name}\0{sha256_once(path)}\n".encode())
    return digest.hexdigest()


def _policy(config: DictConfig) -> dict[str, Any]:
    """Folder of the policy, SHA-256 of its files, and the hub's commit where it came from there."""
    folder = policy_folder(config)
    fetched = (folder / hub_policy.MANIFEST).is_file()
    origin = hub_policy.read_manifest(folder)[0] if fetched else {}
    return {
        "path": str(folder),
        "sha256": folder_sha256([file for file in folder.iterdir() if file.is_file()]),
        "repo": origin.get("repo"),
        "revision": origin.get("revision"),
    }


def _tokenizer(config: DictConfig) -> str:
    """SHA-256 of the tokenizer's files."""
    model = config.actor_rollout_ref.model
    folder = Path(str(model.get("tokenizer_path") or model.path)).expanduser()
    return folder_sha256([folder / file for file in TOKENIZER_FILES if (folder / file).is_file()])


def _commit() -> dict[str, Any] | None:
    """Commit of the repository that this code lies in, and whether files differ from it."""
    git = shutil.which("git")
    if git is None:
        return None
    here = Path(__file__).resolve().parent

    def ask(*arguments: str) -> str:
        done = subprocess.run(  # noqa: S603
            [git, *arguments], cwd=here, capture_output=True, text=True, timeout=30, check=True
        )
        return done.stdout.strip()

    try:
        # Not a repository around an installed package.
        ask("ls-files", "--error-unmatch", Path(__file__).name)
        changed = bool(ask("status", "--porcelain", "--untracked-files=no"))
        return {"commit": ask("rev-parse", "HEAD"), "changed": changed}
    except (OSError, subprocess.SubprocessError):
        return None


def identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """What must stay the same for a run to go on from a checkpoint."""
    return {
        "algorithm": manifest["algorithm"],
        "model": manifest["policy"]["sha256"],
        "tokenizer": manifest["tokenizer"],
        **{
            key: [file["sha256"] for file in manifest["data"] if file["key"] == key]
            for key in ("data.train_files", "data.val_files")
        },
        "world size": manifest["world_size"],
        "number of cards that share one copy of the weights": manifest.get(
            "cards_a_copy", manifest["world_size"]
        ),
        # The loader of the data takes its own state back with as many workers only.
        WORKERS_KEY: manifest.get(WORKERS_KEY),
    }


def describe_run(config: DictConfig, config_text: str, command: Sequence[str]) -> dict[str, Any]:
    """Gather a manifest; reads every data file and the policy once.

    Args:
        config: the resolved configuration, without Hydra's own part.
        config_text: what `config.yaml` holds.
        command: the command line.
    """
    actor = config.actor_rollout_ref.actor
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": masked_command(command),
        "git": _commit(),
        "versions": {"python": platform.python_version(), **package_versions()},
        "configuration": {
            "file": CONFIG_NAME,
            "sha256": hashlib.sha256(config_text.encode()).hexdigest(),
        },
        "algorithm": {
            "adv_estimator": str(config.algorithm.adv_estimator),
            "loss_mode": str(actor.policy_loss.loss_mode),
            "loss_agg_mode": str(actor.loss_agg_mode),
        },
        "policy": _policy(config),
        "tokenizer": _tokenizer(config),
        "data": [
            {"key": key, "path": str(path), "sha256": file_sha256(path)}
            for key, path in data_files(config)
        ],
        "world_size": config.trainer.nnodes * config.trainer.n_gpus_per_node,
        "cards_a_copy": cards_a_copy(config),
        WORKERS_KEY: OmegaConf.select(config, WORKERS_KEY),
        "seeds": {
            key: value
            for key, value in leaves(OmegaConf.to_container(config, resolve=True))
            if key.endswith("seed")
        },
    }


def check_checkpoints(folder: Path, manifest: dict[str, Any]) -> None:
    """Refuse a folder with checkpoints of another run.

    Args:
        folder: where verl looks for checkpoints, and writes them.
        manifest: of the run that is about to start.

    Raises:
        DataError: names what differs; or the folder has checkpoints and no manifest.
    """
    if not holds_checkpoints(folder):
        return
    way_out = "choose another folder with trainer.default_local_dir="
    path = folder / FILE_NAME
    try:
        recorded = identity(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} holds checkpoints and no {FILE_NAME}: they are no run's of ours, and verl "
            f"would execute them (pickle); {way_out}"
        ) from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}); {way_out}") from error
    for key, now in identity(manifest).items():
        # None: written before this was recorded.
        if recorded[key] not in (now, None):
            raise DataError(
                f"{folder} holds checkpoints of a run with another {key}: {recorded[key]}, "
                f"now {now}; {way_out}"
            )


@dataclass(frozen=True)
class Record:
    """What a run is about to write of itself.

    Attributes:
        config_text: content of `config.yaml`.
        manifest: content of `manifest.json`.
        checkpoints: where verl writes checkpoints; they get a copy of the first manifest.
    """

    config_text: str
    manifest: dict[str, Any]
    checkpoints: Path

    def write(self, folder: Path) -> None:
        """Write both files to the run's folder, which exists."""
        shown = json.dumps(self.manifest, indent=2) + "\n"
        write_atomically(folder / CONFIG_NAME, self.config_text)
        write_atomically(folder / FILE_NAME, shown)
        if not holds_checkpoints(self.checkpoints):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomically(self.checkpoints / FILE_NAME, shown)


def checked_record(config: DictConfig, command: Sequence[str]) -> Record:
    """Describe a run, and refuse to go on from checkpoints of another.

    Args:
        config: the resolved configuration, without Hydra's own part;
            `trainer.default_local_dir` is where verl looks for checkpoints.
        command: the command line.

    Raises:
        DataError: the checkpoints there are another run's. Nothing is written.
    """
    text = OmegaConf.to_yaml(OmegaConf.create(masked(OmegaConf.to_container(config, resolve=True))))
    manifest = describe_run(config, text, command)
    checkpoints = Path(config.trainer.default_local_dir).expanduser()
    if config.trainer.get("resume_mode") == "resume_path":
        check_checkpoints(Path(config.trainer.resume_from_path).expanduser().parent, manifest)
    check_checkpoints(checkpoints, manifest)
    return Record(text, manifest, checkpoints)
