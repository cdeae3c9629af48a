"""A Python environment with all that is installed here, but for this package."""

import sysconfig
import venv
from importlib.metadata import distribution
from pathlib import Path


def make_bare_environment(folder: Path, imported: Path | None = None) -> Path:
    """Make it of links, so that it takes neither time nor room.

    Args:
        folder: Where; it must not exist.
        imported: A module that every process of the environment imports at its start.

    Returns:
        Its Python. Files of this package, and what makes it known, are not on its path.
    """
    venv.create(folder, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    ours = {file.parts[0] for file in distribution("hpo-verl").files or ()}
    for installed in Path(sysconfig.get_path("purelib")).iterdir():
        if installed.name not in ours:
            (packages / installed.name).symlink_to(installed)
    if imported is not None:
        (packages / "imported.pth").write_text(f"{imported.parent}\nimport {imported.stem}\n")
    return folder / "bin" / "python"
