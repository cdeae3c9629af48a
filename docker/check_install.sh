#!/usr/bin/env bash
# Executes the install steps of Dockerfile.cpu in a clean virtual environment:
# the wheel is built from what .dockerignore lets in, and installed where no
# checkout is on the path. Takes minutes and about 2 GB in a temporary folder.
#
#   docker/check_install.sh [train]     with `train`: the image's default command too, for two steps
#
# PYTHON=python3.11 and TORCH_INDEX=URL choose the interpreter and torch's index. pip asks it again
# for every package: where PyTorch's cannot be reached, name another.
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3.11}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir -p "$work/source" "$work/wheels" "$work/runs"
for name in pyproject.toml README.md LICENSE constraints-cpu.txt constraints-gpu.txt hpo_verl data_prep recipes; do
    cp -r "$repository/$name" "$work/source/"
done
find "$work/source" -name __pycache__ -type d -prune -exec rm -r {} +

"$python" -m venv "$work/venv"
export PATH="$work/venv/bin:$PATH" PYTHONNOUSERSITE=1
export TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
unset PYTHONPATH VIRTUAL_ENV

cd "$work/source"
"$python" "$repository/docker/dockerfile_steps.py" "$repository/docker/Dockerfile.cpu" |
    while IFS= read -r step; do
        step=${step//\/wheels/$work/wheels}
        echo "+ $step"
        bash -euo pipefail -c "$step" </dev/null
    done

cd "$work/runs"
export HPO_VERL_CACHE="$work/data"
python -c 'import hpo_verl, sys; assert hpo_verl.__file__.startswith(sys.prefix), hpo_verl.__file__'
python -m data_prep.countdown --help >/dev/null
if [ "${1:-}" = train ]; then
    hpo-verl train countdown-tiny trainer.total_training_steps=2 trainer.test_freq=-1 trainer.save_freq=2
fi
echo "the install steps of Dockerfile.cpu work"
