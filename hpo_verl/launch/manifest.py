"""What a run was made of: `manifest.json` in its folder, and beside its checkpoints.

verl continues from whatever checkpoint its folder holds. The manifest beside the checkpoints
says whose they are, so that no run continues from those of another algorithm, policy,
tokenizer, data file, number of ranks or of DataLoader workers.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data_prep.policies import hub as hub_policy
from hpo_verl.config.redaction import masked, masked_command
from hpo_verl.config.settings import cards_a_copy, data_files, policy_folder
from hpo_verl.errors import DataError
from hpo_verl.installed import package_versions
from hpo_verl.runs.checkpoints import holds_checkpoints
from hpo_verl.runs.files import file_sha256, sha256_once, write_atomically

FILE_NAME = "manifest.json"
CONFIG_NAME = "config.yaml"
WORKERS_KEY = "data.dataloader_num_workers"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("added_tokens.json", "special_tokens_map.json", "chat_template.jinja"),
)


def _folder_sha256(files: Sequence[Path]) -> str:
    """SHA-256 over the names and contents of files, whatever their order."""
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda file: file.name):
        digest.update(f"{path.name}\0{sha256_once(path)}\n".encode())
    return digest.hexdigest()


def _commit() -> dict[str, Any] | None:
    """Commit of the repository that tracks this code, and whether tracked files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=30, check=True
        )
        return done.stdout.strip()

    try:
        # An installed package may lie in a repository that does not track it.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"commit": git("rev-parse", "HEAD"), "changed": changed}
    except (OSError, subprocess.SubprocessError):
        return None


def _adapter(model: DictConfig) -> str:
    """A LoRA adapter in words."""
    rank = model.get("lora_rank")
    return f"rank {rank}, alpha {model.get('lora_alpha')}" if rank else "none"


def _describe_run(config: DictConfig, config_text: str, command: Sequence[str]) -> dict[str, Any]:
    """Gather a manifest; reads every data file and the policy once."""
    model, actor = config.actor_rollout_ref.model, config.actor_rollout_ref.actor
    policy = policy_folder(config)
    fetched = (policy / hub_policy.MANIFEST).is_file()
    origin = hub_policy.read_manifest(policy) if fetched else {}
    tokenizer = Path(str(model.get("tokenizer_path") or model.path)).expanduser()
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": masked_command(command),
        "git": _commit(),
        "versions": package_versions(),
        "configuration": {
            "file": CONFIG_NAME,
            "sha256": hashlib.sha256(config_text.encode()).hexdigest(),
        },
        "algorithm": {
            "adv_estimator": str(config.algorithm.adv_estimator),
            "loss_mode": str(actor.policy_loss.loss_mode),
            "loss_agg_mode": str(actor.loss_agg_mode),
        },
        "policy": {
            "path": str(policy),
            "sha256": _folder_sha256([file for file in policy.iterdir() if file.is_file()]),
            "repo": origin.get("repo"),
            "revision": origin.get("revision"),
        },
        "adapter": _adapter(model),
        "tokenizer": _folder_sha256(
            [tokenizer / file for file in TOKENIZER_FILES if (tokenizer / file).is_file()]
        ),
        "data": [
            {"key": key, "path": str(path), "sha256": file_sha256(path)}
            for key, path in data_files(config)
        ],
        "world_size": config.trainer.nnodes * config.trainer.n_gpus_per_node,
        "cards_a_copy": cards_a_copy(config),
        WORKERS_KEY: OmegaConf.select(config, WORKERS_KEY),
    }


def _identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """What must stay the same for a run to continue from a checkpoint."""
    ranks = manifest["world_size"]
    return {
        "algorithm": manifest["algorithm"],
        "model": manifest["policy"]["sha256"],
        "adapter": manifest.get("adapter"),
        "tokenizer": manifest["tokenizer"],
        **{
            key: [file["sha256"] for file in manifest["data"] if file["key"] == key]
            for key in ("data.train_files", "data.val_files")
        },
        "world size": ranks,
        "number of cards that share one copy of the weights": manifest.get("cards_a_copy", ranks),
        # A DataLoader restores its state only with the same number of workers.
        WORKERS_KEY: manifest.get(WORKERS_KEY),
    }


def _check_checkpoints(folder: Path, manifest: dict[str, Any]) -> None:
    """Refuse a folder with checkpoints of another run, or without a manifest."""
    if not holds_checkpoints(folder):
        return
    remedy = "choose another folder with trainer.default_local_dir="
    path = folder / FILE_NAME
    try:
        recorded = _identity(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} holds checkpoints and no {FILE_NAME}, so no run of ours wrote them, and "
            f"verl would execute them (pickle); {remedy}"
        ) from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}); {remedy}") from error
    for key, now in _identity(manifest).items():
        # None: the manifest is older than this entry.
        if recorded[key] not in (now, None):
            raise DataError(
                f"{folder} holds checkpoints of a run with another {key}: {recorded[key]}, "
                f"now {now}; {remedy}"
            )


def checked_manifest(config: DictConfig, command: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The content of `config.yaml` and of `manifest.json` for a resolved configuration.

    Raises:
        DataError: the checkpoints from which verl would continue are another run's.
    """
    text = OmegaConf.to_yaml(OmegaConf.create(masked(OmegaConf.to_container(config, resolve=True))))
    manifest = _describe_run(config, text, command)
    if config.trainer.get("resume_mode") == "resume_path":
        _check_checkpoints(Path(config.trainer.resume_from_path).expanduser().parent, manifest)
    _check_checkpoints(Path(config.trainer.default_local_dir), manifest)
    return text, manifest


def write_manifest(
    folder: Path, checkpoints: Path, config_text: str, manifest: dict[str, Any]
) -> None:
    """Write both files to the run's folder; the first manifest also beside the checkpoints."""
    text = json.dumps(manifest, indent=2) + "\n"
    write_atomically(folder / CONFIG_NAME, config_text)
    write_atomically(folder / FILE_NAME, text)
    if not holds_checkpoints(checkpoints):
        checkpoints.mkdir(parents=True, exist_ok=True)
        write_atomically(checkpoints / FILE_NAME, text)
