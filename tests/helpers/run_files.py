"""The files that a run's configuration names, for tests of what is recorded of them."""


def make_run_files(folder):
    """Make a policy's tokenizer, two data files and an empty run folder.

    Returns:
        The policy's folder and the run's; the data are `train.parquet` and `val.parquet`.
    """
    policy, run = folder / "policy", folder / "run"
    for made in (policy, run):
        made.mkdir()
    (policy / "tokenizer.json").write_text("{}")
    for name in ("train", "val"):
        (folder / f"{name}.parquet").write_bytes(name.encode())
    return policy, run
