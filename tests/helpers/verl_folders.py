"""Folders as `hpo-verl train` leaves them, without a run."""

import json

from omegaconf import OmegaConf

from hpo_verl.config.recipes import recipes_directory

SUCCESS = "val-core/countdown/acc/mean@1"
STEPS = 20
# Success after half of the steps, and after all.
CURVES = {"a_hpo": (0.3, 0.5), "grpo": (0.2, 0.3)}


def write_verl_run(
    folder, algorithm, seed=0, policy="p0", curve=None, steps=STEPS, config=None, **changes
):
    """A finished run with a configuration: a composed one, or little more than a recipe of `algo/`.

    The changes are values by dotted key.
    """
    folder.mkdir(parents=True)
    config = config or OmegaConf.merge(
        {
            "seed": seed,
            "names": {},
            "data": {"train_batch_size": 16, "train_files": f"/cache/{folder.name}/train.parquet"},
            "trainer": {"experiment_name": "tiny", "default_local_dir": str(folder)},
            "actor_rollout_ref": {"model": {"path": f"/cache/{folder.name}"}},
        },
        OmegaConf.load(recipes_directory() / "algo" / f"{algorithm}.yaml"),
    )
    for key, value in changes.items():
        OmegaConf.update(config, key, value)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    middle, end = curve or CURVES.get(algorithm, (0.2, 0.2))
    lengths = {"hpo/response_length_positive": 12.5, "hpo/response_length_negative": 20.0}
    lines = [
        {"step": 0, "data": {SUCCESS: 0.1}},
        {"step": 1, "data": {"hpo/alpha": 0.25, "timing_s/step": 3.0, **lengths}},
        {"step": steps // 2, "data": {SUCCESS: middle}},
        {"step": steps, "data": {SUCCESS: end}},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {
        "algorithm": str(config.algorithm.adv_estimator),
        "steps": steps,
        "seconds": 3600.0,
        "success_before": 0.1,
        "success_after": end,
        "versions": {"verl": "0.9.1"},
        "seed": seed,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    manifest = {
        "created": "2026-01-01T00:00:00+00:00",
        "git": {"commit": "0123456789abcdef", "changed": True},
        "policy": {"sha256": policy},
        "data": [{"key": "data.train_files", "sha256": f"d{seed}"}],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
